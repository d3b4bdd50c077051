"""The CUDA finish against the reference: on a GPU where there is one, else under Triton's interpreter (conftest.py)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from loaders import loader
from loaders.finish import reference
from loaders.finish.triton import finish as triton_finish
from loaders.finish.triton import passes
from loaders.plan.ops import (
    Affine,
    ColourJitter,
    Equalize,
    Flip,
    GaussianBlur,
    GaussianKernelBlur,
    Grayscale,
    HsvNoise,
    Noise,
    Op,
    Solarise,
)
from loaders.plan.plan import Plan, ViewRows
from loaders.plan.views import CIFAR10, IMAGENET, SIGNED, UNIT, Pixels, Rrc, Shuffled, Stream, View, Whole
from loaders.store.data import DataSets
from loaders.store.source import ArraySource
from tests.parity.test_finish import (
    ALWAYS,
    EXEMPLAR,
    LEVEL,
    PAWS_CIFAR,
    PAWS_IMAGENET,
    SEMPPL,
    SEMPPL_JITTER,
    SIMCLR,
    STRONG,
    photos,
    random_crops,
    tables,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDE = GaussianBlur(1.0, (3.0, 9.0))  # too many loops for an interpreter: a narrower one stands in
OPS = (*(op for op in ALWAYS if op != WIDE), GaussianBlur(1.0, (2.2, 2.8)))


def fast(crops: np.ndarray, ops: tuple[Op, ...], tables_: tuple[np.ndarray, ...], pixels: Pixels = UNIT,
         dtype: torch.dtype = torch.float32) -> np.ndarray:  # fmt: skip
    out = torch.full(crops.shape, float("nan"), dtype=dtype, device=DEVICE)
    triton_finish.finish(torch.from_numpy(crops).to(DEVICE), ops, tables_, pixels, out)
    return out.float().cpu().numpy()


@pytest.mark.parametrize("op", OPS, ids=lambda op: type(op).__name__)
def test_every_op_follows_the_reference(op):
    """Catches a law that differs, channel mix-ups, edges, a second block of pixels, images smaller than a blur."""
    for crops in (photos(3, 33, 3), random_crops(3, 7, 1), random_crops(3, 1, 3), photos(1, 33, 1)):
        table = tables((op,), len(crops))
        expected = reference.finish(crops, (op,), table, UNIT)
        assert np.abs(fast(crops, (op,), table) - expected).max() < 0.02 * LEVEL


@pytest.mark.parametrize(
    ("op", "factors"), ((STRONG, (1.7, 0.4, 1.6, 0.2)), (replace(SEMPPL_JITTER, p=1.0), (1.2, 0.2, 0.4, 1.6, 0.2)))
)
def test_every_order_of_the_jitters_follows_the_reference(op, factors):
    """Catches means that are taken after the contrast, or before sub-ops that precede it."""
    crops = photos(1, 12, 3)[[0] * 24]
    table = np.tile(np.array((1, 0, *factors), np.float32), (24, 1))
    table[:, 1] = range(24)
    expected = reference.finish(crops, (op,), (table,), UNIT)
    assert np.abs(fast(crops, (op,), (table,)) - expected).max() < 0.02 * LEVEL


@pytest.mark.parametrize(
    ("ops", "size", "channels", "pixels"),
    (
        (PAWS_IMAGENET, 24, 3, IMAGENET),
        (PAWS_CIFAR, 18, 3, CIFAR10),
        (SIMCLR, 24, 3, UNIT),
        (SEMPPL, 24, 3, IMAGENET),
        (EXEMPLAR, 24, 3, SIGNED),
        ((Affine(0.5), Noise(0.5)), 8, 1, SIGNED),
        ((Solarise(0.5), Affine(0.5), Equalize(0.5), ColourJitter(0.5, 0.4, 0.4), Flip(), Equalize(0.5)), 18, 3, UNIT),
        ((GaussianBlur(), ColourJitter(0.5, 0.4, 0.4, 0.4, 0.1), GaussianKernelBlur(0.5, taps=5), Flip()), 12, 1, UNIT),
        ((HsvNoise(0.5), Grayscale(0.5), ColourJitter(0.5, 0.4, 0.4), ColourJitter(0.5, 0.4, 0.4)), 12, 3, UNIT),
        ((), 9, 3, IMAGENET),
        ((), 8, 1, SIGNED),
    ),
)
def test_chains_follow_the_reference(ops, size, channels, pixels):
    """Catches ops that act where `apply` is 0, stages out of turn, means or histograms of another op, a wrong std.

    Solarise and equalize are discontinuous: behind the jitter a value next to a step may fall on its other side.
    """
    crops = photos(8, size, channels)
    table = tables(ops, 8, seed=size)
    far = np.abs(fast(crops, ops, table, pixels) - reference.finish(crops, ops, table, pixels)) * np.array(pixels.std)
    steps = {Solarise, Equalize} & {type(op) for op in ops}
    assert (far > 0.02 * LEVEL).mean() <= (2e-3 if steps else 0)


@pytest.mark.parametrize(("dtype", "relative"), ((torch.float16, 2**-11), (torch.bfloat16, 2**-7)))
def test_half_outputs_are_the_rounded_floats(dtype, relative):
    """Catches arithmetic in half precision: only the last value is rounded. (The interpreter cuts bfloat16 off.)"""
    crops, table = photos(2, 12, 3), tables(PAWS_IMAGENET, 2)
    expected = reference.finish(crops, PAWS_IMAGENET, table, IMAGENET)
    error = np.abs(fast(crops, PAWS_IMAGENET, table, IMAGENET, dtype) - expected)
    assert (error <= relative * np.abs(expected) + 0.02 * LEVEL).all()


@pytest.mark.parametrize("num", (0, 1))
def test_few_rows(num):
    """Catches a launch over nothing, and a shape that loses its first axis."""
    crops = photos(1, 9, 3)[:num]
    table = tables(PAWS_CIFAR, num)
    expected = reference.finish(crops, PAWS_CIFAR, table, CIFAR10)
    assert fast(crops, PAWS_CIFAR, table, CIFAR10).shape == expected.shape


def test_the_loaders_gpu_path_is_its_cpu_path():
    """Catches turns made from a turned crop or the wrong way round, and a view that only one path finishes."""
    crops = photos(3, 12, 3)
    view = View("v", 12, Whole(), (Flip(), Solarise(0.5)), UNIT, turns=(1, 0, 2))
    rows = ViewRows(view, np.zeros((3, 4)), tables(view.ops, 3))
    out = torch.empty((3, *crops.shape), device=DEVICE)
    finished = loader._finished_on_gpu(rows, crops, out).cpu().numpy()
    upright = reference.finish(crops, view.ops, rows.tables, UNIT)
    for turn, found in zip(view.turns, finished, strict=True):
        assert np.abs(found - np.rot90(upright, turn, (1, 2))).max() < 0.02 * LEVEL


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
def test_batches_on_a_gpu_are_those_of_the_cpu():
    """Catches slots that are written while they are copied, and batches that are read before they are there."""
    source = ArraySource("noise", random_crops(256, 32, 3), np.arange(256) % 4, tuple("abcd"))
    views = (View("v", 32, Rrc((0.3, 1.0)), PAWS_IMAGENET, copies=2),)
    plan = Plan((Stream("s", "train", views, Shuffled(), 64),), "s", seed=0)
    bound = loader.bind(plan, DataSets({"train": source}))
    with loader.Loader(bound) as on_cpu, loader.Loader(bound, device=DEVICE) as on_gpu:
        for ours, theirs in zip(on_gpu.batches(0, 12), on_cpu.batches(0, 12), strict=True):
            difference = ours.parts["s"].x["v"].cpu() - theirs.parts["s"].x["v"]
            assert difference.abs().max() * 0.23 < 0.02 * LEVEL
            ours.release()
            theirs.release()


def test_passes_are_as_few_as_neighbours_allow():
    """Catches a chain that is cut where nothing needs it: PAWS's is one pass of colour and two of the blur."""
    samplings = [one_pass.sampling for one_pass in triton_finish.passes_of(PAWS_IMAGENET)]
    assert samplings == [passes.FLIP.value, passes.BLUR_X.value, passes.BLUR_Y.value]
    assert len(triton_finish.passes_of(PAWS_CIFAR)) == 1 and len(triton_finish.passes_of(())) == 1
    assert [one_pass.chain for one_pass in triton_finish.passes_of((Noise(), Flip(), Solarise()))] == [[0], [2]]


def test_ops_are_known():
    """Catches a new op that has no kernel."""
    assert set(triton_finish._SAMPLINGS) | set(triton_finish._POINTWISE) == set(Op.__subclasses__())
