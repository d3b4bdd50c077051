"""Every method on every kind of trunk: our vision transformer, and timm's networks with batch norms and without.

The paths are those of `test_every_method`, two steps of each stage. What needs timm skips without it.
"""

import importlib.util
from dataclasses import dataclass, fields, replace

import pytest

from fastssl.engine import stages
from fastssl.engine.job import Job
from fastssl.engine.join import facts_of
from fastssl.errors import ConfigError
from fastssl.methods.base import Ref, Steps
from fastssl.methods.supervised import FirstLayer
from fastssl.nn.encoders.encoder import Encoder
from fastssl.nn.encoders.timm_models import Timm
from fastssl.nn.encoders.vit import ViT
from fastssl.recipes.supervised import finetune
from loaders.plan.views import FiveCrops, View
from loaders.store.data import open_data
from tests.end_to_end.command import metrics
from tests.support.interrupted import assert_same_stages, run_in_pieces
from tests.test_every_method import (
    REAL,
    _one_thread,  # noqa: F401  (every test here uses it)
    paths,
    simclrv2,
    supervised,
)

WIDTH = 32  # of hidden layers


@dataclass(frozen=True)
class On:
    """A trunk, and the sizes of large and small crops that it takes."""

    encoder: Encoder
    size: int
    small: int
    batch_norms: bool


TRUNKS = {
    "our transformer": On(ViT(8, 4, WIDTH, 2, 2), 8, 4, batch_norms=False),
    "timm without batch norms": On(Timm("convnext_atto"), 32, 32, batch_norms=False),
    "timm with batch norms": On(Timm("regnety_002"), 32, 32, batch_norms=True),
}


@pytest.fixture(params=TRUNKS)
def on(request) -> On:
    found = TRUNKS[request.param]
    if isinstance(found.encoder, Timm) and not importlib.util.find_spec("timm"):
        pytest.skip("timm missing: the extra `timm`")
    return found


def simclrv2_fine_tuned():
    """From its first projection layer."""
    (stage,) = supervised()
    config = replace(stage.config, head=FirstLayer(WIDTH, bias=False))
    return (*simclrv2(), finetune(config, stage.length, Ref(stage="pretrain")))


PATHS = {name: paths()[name] for name in REAL} | {"simclrv2 fine-tuning": simclrv2_fine_tuned()}


def enlarged(crop, size):
    """Where squares are cut from the image, of one that holds them."""
    return replace(crop, resize=size) if isinstance(crop, FiveCrops) else crop


def moved(stage, on: On):
    """The stage on that trunk, crops and hidden layers as it needs them; without batch norms one core is the batch."""
    known = {f.name: getattr(stage.config, f.name) for f in fields(stage.config)}
    settings = {
        name: replace(view, size=on.size if view.size >= 8 else on.small, crop=enlarged(view.crop, on.size))
        for name, view in known.items()
        if isinstance(view, View)
    }
    settings |= {name: on.encoder for name, value in known.items() if isinstance(value, Encoder)}
    settings |= {"hidden_features": WIDTH} if "hidden_features" in known else {}
    settings |= {"core_images": None} if known.get("core_images") and not on.batch_norms else {}
    stage = replace(stage, config=replace(stage.config, **settings))
    if stage.do != "train":
        return stage
    return replace(stage, length=Steps(2), log_every=Steps(1), checkpoint_every=Steps(2), evaluate=())


@pytest.mark.parametrize("path", PATHS)
def test_two_steps_of_every_method(path, on, tmp_path):
    """Catches a layer that only a ResNet has, a size that only its crops are, and losses that are not finite."""
    chain = tuple(moved(stage, on) for stage in PATHS[path])
    stages.run(Job(path, chain, (), ("digits",), tmp_path, 0, "cpu", 1))
    for stage in chain:
        if stage.do == "train":
            lines = metrics(tmp_path / stage.name if len(chain) > 1 else tmp_path)
            assert [line["step"] for line in lines] == [1, 2]
            assert all(isinstance(line["loss"], float) for line in lines)  # "nan" is a string


def test_paws_on_it_continues_bitwise(on, tmp_path):
    """Weights, optimiser and statistics. Catches buffers under names that a checkpoint loses."""
    (stage,) = (moved(each, on) for each in PATHS["paws"])
    chain = (replace(stage, length=Steps(4)),)
    whole, pieces = (Job("paws", chain, (), ("digits",), tmp_path / name, 0, "cpu", 1) for name in ("whole", "pieces"))
    stages.run(whole)
    assert run_in_pieces(pieces, every=3) == 1
    assert_same_stages(tmp_path / "whole", tmp_path / "pieces", chain)


@pytest.mark.parametrize("path", ["s4l rotation", "s4l vat", "s4l moam"])
def test_virtual_cores_without_batch_norms_are_refused_in_a_line(path, on):
    """Before a step, by the trunk's name and with what to set; where there are batch norms, they are taken. Exemplar's
    triplets know of cores whatever the trunk."""
    (*_, stage) = [stage for stage in PATHS[path] if stage.do == "train"]
    config = replace(moved(stage, on).config, core_images=8)
    method = config.build(facts_of(open_data(("digits",)), 0), {})
    if on.batch_norms:
        method.nets()
        return
    with pytest.raises(ConfigError) as caught:
        method.nets()
    told = f"{on.encoder.name} has no batch norm, so virtual cores of 8 images mean nothing: --set core_images=none"
    assert str(caught.value) == told
