"""S4L's recipes: what the release's configurations and the paper say."""

import math
import re
import shlex
from dataclasses import replace

import pytest
from click.testing import CliRunner

from fastssl.commands import dry_run
from fastssl.commands.main import main
from fastssl.costs import memory_model
from fastssl.costs.trace import Untraceable
from fastssl.errors import ConfigError
from fastssl.methods.base import Epochs
from fastssl.methods.s4l import (
    Exemplar,
    Rotation,
    Vat,
)
from fastssl.optim.rates import WarmupStairs
from fastssl.recipes import s4l as recipes
from fastssl.recipes.resolve import resolve
from loaders.plan.ops import Flip, HsvNoise
from loaders.plan.views import SIGNED, Centre, FiveCrops, View


def test_recipes_say_what_the_release_s_configurations_say():
    """Batch, images to a core, rate, decay, warm-up and length of each, and its terms: the constants that the method's
    numbers hang on."""
    said = {}
    for name in ("supervised", "supervised_1pct", "rotation", "exemplar", "vat", "vat_entmin", "pseudo_label", "moam"):
        stage = resolve(f"s4l.{name}")[-1 if name == "pseudo_label" else 0]
        c = stage.config
        spans = c.rate.warmup, *c.rate.falls, stage.length
        said[name] = (
            c.batch_global,
            c.core_images,
            c.rate.peak,
            c.optimizer.weight_decay,
            *(span.count for span in spans),
        )
    tenth = 140, 160, 180, 200
    assert said == {
        "supervised": (256, 32, 0.1, 1e-3, 5, *tenth),
        "supervised_1pct": (256, 32, 0.01, 1e-2, 5, 700, 800, 900, 1000),
        "rotation": (256, 8, 0.03, 1e-3, 5, *tenth),
        "exemplar": (512, 16, 0.1, 1e-3, 10, *tenth),
        "vat": (256, 8, 0.03, 1e-3, 5, *tenth),
        "vat_entmin": (256, 8, 0.03, 1e-3, 5, *tenth),
        "pseudo_label": (256, 32, 0.1, 1e-4, 5, 30, 60, 90, 100),
        "moam": (128, None, 0.1, 2e-4, 10, 100, 150, 190, 200),
    }
    terms = {}
    for name in said:
        c = resolve(f"s4l.{name}")[-1 if name == "pseudo_label" else 0].config
        terms[name] = c.class_weight, c.rotation, c.exemplar, c.vat, c.entropy_weight, c.smoothed, c.half_life
    none = 1.0, None, None, None, 0.0, "all", None
    vat = Vat(0.5, 40.0, "exact", 1e-3, "unit")
    assert terms == {
        "supervised": none,
        "supervised_1pct": none,
        "rotation": (1.0, Rotation(1.0), None, None, 0.0, "all", None),
        "exemplar": (1.0, None, Exemplar(1.0, 1000, False), None, 0.0, "all", None),
        "vat": (1.0, None, None, vat, 0.0, "all", None),
        "vat_entmin": (1.0, None, None, vat, 1.0, "all", None),
        "pseudo_label": none,
        "moam": (0.3, Rotation(0.4), None, replace(vat, weight=0.3, epsilon=32.0), 0.3, "unlabelled", Epochs(1)),
    }
    joint = resolve("s4l.moam")[0].config
    assert math.isclose(joint.class_weight + joint.rotation.weight + joint.vat.weight, 1.0)
    views = {name: (c.view.copies, c.view.ops) for name in said if (c := resolve(f"s4l.{name}")[0].config)}
    plain = 1, (Flip(),)
    noisy = {"supervised_1pct": (1, (Flip(), HsvNoise())), "exemplar": (8, (HsvNoise(), Flip()))}
    assert views == dict.fromkeys(said, plain) | noisy


def test_moam_s_later_stages_are_the_paper_s():
    """Labels by five crops in four turns; the second stage with all losses on pseudo-labels, the third without any but
    the class's, on the labels."""
    joint, label, relearn, finetune = resolve("s4l.moam")
    view = View("label", 224, FiveCrops(resize=256), pixels=SIGNED, copies=5, turns=(0, 1, 2, 3))
    assert label.do == "produce" and label.config.label_view == view
    again = {"pseudo_labels": True, "rate": WarmupStairs(0.1, (Epochs(6), Epochs(12)), warmup=Epochs(1))}
    assert relearn.config == replace(joint.config, **again) and relearn.length == Epochs(18)
    c = finetune.config
    assert (c.batch_global, c.rate.peak, c.optimizer.weight_decay, c.rate.warmup) == (128, 5e-4, 3e-3, Epochs(0))
    assert (*c.rate.falls, finetune.length) == (Epochs(5), Epochs(10), Epochs(15), Epochs(20))
    assert (c.class_weight, c.rotation, c.exemplar, c.vat, c.entropy_weight) == (1.0, None, None, None, 0.0)
    assert (c.labels, c.pseudo_labels, c.half_life) == ("s4l-10", False, None)
    single = resolve("s4l.pseudo_label")[1].config.label_view
    assert (single.copies, single.turns, single.crop) == (1, (0,), Centre(resize=256))


def test_a_weight_that_a_stage_does_not_have_is_set_by_stage():
    """MOAM's last stage has neither rotation nor VAT: the error says what can be typed, and that is taken."""
    with pytest.raises(ConfigError) as error:
        resolve("s4l.moam", ("rotation.weight=.7",))
    said = "rotation.weight: stage finetune has no rotation; set it by stage: "
    assert str(error.value).startswith(said)
    changes = str(error.value).removeprefix(said).removeprefix("--set ").split(" --set ")
    joint, _, relearn, finetune = resolve("s4l.moam", tuple(changes))
    assert (joint.config.rotation.weight, relearn.config.rotation.weight, finetune.config.rotation) == (0.7, 0.7, None)


def test_the_header_s_sweeps_are_accepted(monkeypatch):
    """Catches a key that a recipe no longer has, and another recipe's weight that is named otherwise."""

    def not_traced(stage, facts, world):
        raise Untraceable("too large for a test")

    for module in (dry_run, memory_model):
        monkeypatch.setattr(module, "traced", not_traced)
    text = recipes.__doc__.replace("\\\n", "")
    commands = re.findall(r"^ +fastssl (train s4l.rotation .*--sweep.*)$", text, re.MULTILINE)
    assert len(commands) == 2
    for recipe, term in (("rotation", "rotation"), ("exemplar", "exemplar"), ("vat", "vat"), ("vat_entmin", "vat")):
        for command in commands:
            mine = command.replace("s4l.rotation", f"s4l.{recipe}").replace("rotation.weight", f"{term}.weight")
            result = CliRunner().invoke(main, [*shlex.split(mine), "--dry-run"])
            assert result.exit_code == 0, result.output
            assert "18 runs" in result.output
