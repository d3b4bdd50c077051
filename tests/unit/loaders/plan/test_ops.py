"""How uniform draws become op parameters: frequencies, ranges, orders."""

from __future__ import annotations

import math

import numpy as np
import pytest

from loaders.plan.ops import (
    TF_LUMA,
    Affine,
    ColourJitter,
    Flip,
    GaussianBlur,
    GaussianKernelBlur,
    Grayscale,
    HsvNoise,
    Noise,
    Op,
    Solarise,
    TfColourJitter,
)

M = 20_000


def table(op: Op, num: int = M) -> dict[str, np.ndarray]:
    parameters = op.parameters(np.random.default_rng(7).random((num, op.num_draws)))
    assert parameters.dtype == np.float32 and parameters.shape == (num, len(op.columns))
    return dict(zip(op.columns, parameters.T, strict=True))


@pytest.mark.parametrize("p", (0.0, 0.5, 1.0))
@pytest.mark.parametrize("kind", Op.__subclasses__())
def test_ops_act_with_their_probability(kind, p):
    """Catches an op that always acts, never acts, or acts with 1 - p."""
    share = table(kind(p=p))["apply"].mean(dtype=np.float64)
    assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / M)


def test_zero_and_almost_one_draws_are_on_the_right_side():
    """Catches u <= p: an op of probability 0 that acts on a draw of exactly 0."""
    extremes = np.array([[0.0], [np.nextafter(1, 0)]])
    assert Flip(p=0.0).parameters(extremes)[:, 0].tolist() == [0, 0]
    assert Flip(p=1.0).parameters(extremes)[:, 0].tolist() == [1, 1]


@pytest.mark.parametrize("kind", (ColourJitter, TfColourJitter))
def test_jitter_orders_are_uniform(kind):
    """Catches permutations that are missing or favoured; chi-square with 23 degrees of freedom."""
    order = table(kind())["order"]
    counts = np.bincount(order.astype(int), minlength=24)
    assert len(counts) == 24 and ((counts - M / 24) ** 2 / (M / 24)).sum() < 49.7  # p = 0.001


def uniform(values: np.ndarray, low: float, high: float) -> None:
    """Inside the range, near both ends, and with the mean and variance of a uniform draw."""
    width = high - low
    assert values.min() >= low - 1e-6 and values.max() <= high + 1e-6
    assert values.min() < low + width / 500 and values.max() > high - width / 500
    assert abs(values.mean(dtype=np.float64) - (low + high) / 2) < 5 * width / math.sqrt(12 * M)
    assert abs(values.std(dtype=np.float64) / width - math.sqrt(1 / 12)) < 0.01


def test_ranges():
    """Catches a factor around 0 in place of 1, a hue of one sign, sigma of another law, degrees taken as radians."""
    jitter = table(ColourJitter(0.8, brightness=0.8, contrast=0.4, saturation=1.5, hue=0.2))
    uniform(jitter["brightness"], 0.2, 1.8)
    uniform(jitter["contrast"], 0.6, 1.4)
    uniform(jitter["saturation"], 0.0, 2.5)  # torchvision cuts the range at 0
    uniform(jitter["hue"], -0.2, 0.2)
    simclr = table(TfColourJitter(0.8, brightness=0.8, contrast=0.4, saturation=1.5, hue=0.2))
    uniform(simclr["gain"], 0.2, 1.8)
    assert (simclr["offset"] == 0).all()
    uniform(simclr["contrast"], 0.6, 1.4)
    uniform(simclr["saturation"], 0.0, 2.5)
    uniform(simclr["hue"], -0.2, 0.2)
    semppl = table(TfColourJitter(0.8, offset=0.4))
    assert (semppl["gain"] == 1).all()
    uniform(semppl["offset"], -0.4, 0.4)
    hsv = table(HsvNoise())
    uniform(hsv["hue"], -0.1, 0.1)
    for x in "sv":
        uniform(np.log2(hsv[f"power_{x}"]), -2.0, 2.0)
        uniform(np.log2(hsv[f"gain_{x}"]), -0.5, 0.5)
        uniform(hsv[f"offset_{x}"], -0.1, 0.1)
    uniform(table(GaussianBlur())["sigma"], 0.1, 2.0)
    uniform(table(GaussianKernelBlur())["sigma"], 0.1, 2.0)
    assert (table(GaussianKernelBlur(taps=9))["reach"] == 4).all()
    grey = table(Grayscale(0.2, TF_LUMA))
    assert [float(grey[c][0]) for c in ("red", "green", "blue")] == pytest.approx([0.2989, 0.5870, 0.1140])
    uniform(table(Solarise())["threshold"], 0.0, 1.0)
    affine = table(Affine(degrees=10.0, scale=(0.9, 1.1), shift=0.1))
    uniform(affine["angle"], -math.radians(10), math.radians(10))
    uniform(affine["scale"], 0.9, 1.1)
    uniform(affine["shift_x"], -0.1, 0.1)
    uniform(affine["shift_y"], -0.1, 0.1)
    uniform(table(Noise(std=(0.02, 0.1)))["std"], 0.02, 0.1)


@pytest.mark.parametrize(
    "op",
    (
        ColourJitter(0.5, 0.8, 0.8, 0.8, 0.2), TfColourJitter(0.5, 0.8, 0.4, 0.8, 0.8, 0.2), HsvNoise(0.5),
        GaussianBlur(0.5), GaussianKernelBlur(0.5), Solarise(0.5), Affine(0.5), Noise(0.5),
    ),
    ids=lambda op: type(op).__name__,
)  # fmt: skip
def test_columns_are_independent(op):
    """Catches a draw that is used twice: a strong contrast always with a strong hue, or only where the op acts."""
    columns = [column for name, column in table(op).items() if name != "reach"]
    correlation = np.corrcoef(np.stack(columns).astype(np.float64))
    assert np.abs(correlation - np.eye(len(correlation))).max() < 5 / math.sqrt(M)


def test_noise_keys_are_exact_integers():
    """Catches keys that float32 rounds, so that finishes would hash different integers."""
    noise = table(Noise())
    for half in (noise["key_low"], noise["key_high"]):
        assert np.array_equal(half, np.floor(half)) and half.min() >= 0 and half.max() < 2**24
        assert len(np.unique(half)) > M - 100
