"""The memory estimate against the published figures of the ResNet-50 job, and what is refused. About 10 s."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner

from fastssl.commands import dry_run
from fastssl.commands.main import main
from fastssl.costs.memory_model import (
    BYTES_PER_PARAMETER,
    DRIVER_BYTES,
    KEPT_PER_OUTPUT,
    ROOM,
    MemoryNeeded,
    describe,
    memory_of,
    refuse_what_cannot_fit,
    stages_with_room,
)
from fastssl.costs.trace import trace_step
from fastssl.errors import ConfigError
from fastssl.methods.base import Facts
from fastssl.recipes.resolve import resolve
from tests.support import fakes

IMAGENET = Facts(num_classes=1000, channels=3, seed=0)


@cache
def memory(world, recipe="paws.rn50_100ep", changes=()):
    (stage,) = resolve(recipe, changes)
    return memory_of(trace_step(stage, IMAGENET, world))


def close(value, rel):
    return pytest.approx(value, rel=rel)


def test_activations_are_the_published_ones():
    """13.4 GB at a 1/64 shard; 107 GB at a 1/8 shard, 60 GB of it kept where norms and ReLUs are computed again.
    Catches a block output or a norm's input kept twice, float32 kept under bf16, a shard of the wrong size."""
    assert memory(64).activations["eager"] == close(13.4e9, 0.02)
    assert memory(8).activations["eager"] == close(107e9, 0.02)
    assert memory(8).activations["compiled"] == close(60e9, 0.04)
    assert memory(8).activations["eager-recompute"] == close(60e9 * 23.5 / 24.9, 0.04)


def test_an_image_keeps_what_was_measured():
    """44, 23.5 and 24.9 MB a 224-pixel image, as the difference between two batches of supports alone."""
    small = ("small_view.size=32", "small_view.copies=1", "batch_global=2")
    few, many = (memory(1, changes=(*small, "classes_global=8", f"images_per_class={n}")) for n in (2, 10))
    image_mb = {how: (many.activations[how] - few.activations[how]) / 64 / 1e6 for how in few.activations}
    assert image_mb == {
        "eager": close(44, 0.02), "eager-recompute": close(23.5, 0.02), "compiled": close(24.9, 0.02),
        "graphed": close(24.9, 0.02),
    }  # fmt: skip


def test_what_stands_beside_activations():
    """Weights, gradients and momentum; four batches of float32 pixels; little workspace."""
    shard = memory(64)
    assert shard.state_bytes == close(38_210_112 * BYTES_PER_PARAMETER, 1e-3)
    assert shard.batch_bytes == 3 * 4 * (233 * 224**2 + 384 * 96**2)
    rest = shard.needed("eager") - shard.activations["eager"]
    assert rest == shard.state_bytes + DRIVER_BYTES + 4 * shard.batch_bytes + shard.workspace_bytes
    assert 0 <= shard.workspace_bytes < 0.3e9


def test_cards_hold_what_they_are_known_to():
    """The published job filled 16 GB cards at 64 ranks; at 8 it needs recomputing on 80 GB, and nothing fits 40 GB."""
    assert "compiled" in memory(64).settings_within(16e9)
    assert memory(8).settings_within(141e9)[0] == "compiled" and "eager" in memory(8).settings_within(141e9)
    assert "eager" not in memory(8).settings_within(80e9)
    assert {"compiled", "eager-recompute"} <= set(memory(8).settings_within(80e9))
    assert memory(8).settings_within(40e9) == []


def test_description_names_every_setting_and_stops_at_the_card_that_holds_all():
    eager = {"eager": 30e9, **dict.fromkeys(KEPT_PER_OUTPUT, 10e9)}
    needs, cards = describe(MemoryNeeded(state_bytes=1e9, batch_bytes=1e9, workspace_bytes=0, activations=eager))
    assert needs == (
        "a GPU needs, by --step: 36 GB eager, 16 GB eager-recompute, 16 GB compiled, 17 GB graphed (modelled)"
    )
    assert cards == "16 GB compiled, eager-recompute; 40 GB all"


def test_a_setting_that_a_network_has_not_is_not_offered():
    """A transformer's blocks can be computed again, a trunk of others' has none that we know."""
    (stage,) = fakes.stages("paws")
    (vit,) = resolve("paws.digits", ("encoder=vit(8,4,16,2,2)",))
    digits = Facts(10, 1, 0)
    without, with_blocks = (memory_of(trace_step(each, digits, 1)) for each in (stage, vit))
    assert "eager-recompute" in describe(with_blocks)[0] and "eager-recompute" not in describe(without)[0]
    assert describe(without)[1] == "16 GB all" and without.needed("eager-recompute") == without.needed("eager")


def test_dry_run_prints_the_estimate_or_why_there_is_none(tmp_path):
    """For the headline job, and for a chain of stages whose last needs what an earlier one makes."""
    result = CliRunner().invoke(main, ["train", "paws.rn50_100ep", "--gpus", "8", "--dry-run"])
    needs, cards = describe(memory(8))
    assert f"  memory       {needs}\n  cards        {cards}\n" in result.output
    text = dry_run.describe(fakes.job(fakes.stages("s4l"), tmp_path, world=2))
    assert "  memory       not estimated: the loss needs 'labels', which an earlier stage makes" in text
    assert text.count("  memory  ") == 2  # the stage between only labels


def test_a_network_without_convolutions_saves_nothing_by_recomputing():
    (stage,) = fakes.stages("paws")
    estimate = memory_of(trace_step(stage, Facts(10, 1, 0), 2))
    assert len(set(estimate.activations.values())) == 1


# ---------------------------------------------------------------------------------------------------------- refusing


def refusal(world, how, card_bytes, changes=()):
    (stage,) = resolve("paws.rn50_100ep", changes)
    with pytest.raises(ConfigError) as caught:
        refuse_what_cannot_fit(stage, IMAGENET, world, how, card_bytes)
    return str(caught.value)


def test_a_shard_that_cannot_fit_names_the_setting_that_would():
    needed = [round(memory(8).needed(how) / 1e9) for how in ("eager", "compiled")]
    assert refusal(8, "eager", 80e9) == (
        f"a rank needs about {needed[0]} GB of the card's 80 GB as --step eager; --step compiled needs about "
        f"{needed[1]} GB"
    )


def test_where_no_setting_fits_it_names_the_ranks_that_would():
    """Catches a number of ranks that the batches cannot be shared by, or that does not fit either."""
    assert refusal(8, "compiled", 40e9).endswith("no setting of --step makes it fit; on 16 ranks --step compiled would")
    assert memory(16).needed("compiled") <= 40e9
    assert "choose a smaller network" in refusal(64, "eager", 1.5e9)


def test_a_card_with_room_computes_nothing_again():
    """Of a step that an H200 does 8 to 12 % faster so, by its bytes. Catches norms that are computed twice whatever the
    card, and a stage that is told to keep all where that does not fit."""
    job = fakes.job(resolve("paws.rn50_100ep"), Path("run"), device="cuda", world=16)
    (stage,) = job.stages
    whole = memory(16).needed("compiled") - memory(16).activations["compiled"] + memory(16).whole_bytes
    assert whole > memory(16).needed("compiled")
    assert stages_with_room(job, 141e9) == (stage.name,)
    assert stages_with_room(job, 1.01 * whole / ROOM) == (stage.name,)
    assert stages_with_room(job, 0.99 * whole / ROOM) == ()
    assert stages_with_room(replace(job, how="eager"), 141e9) == ()


def test_what_fits_or_cannot_be_traced_passes():
    (stage,) = resolve("paws.rn50_100ep")
    refuse_what_cannot_fit(stage, IMAGENET, 8, "compiled", 80e9)
    refuse_what_cannot_fit(fakes.stages("semppl")[0], Facts(10, 1, 0), 2, "eager", 1.0)
