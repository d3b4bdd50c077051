"""The laws of random crops: area, aspect and place against loop-style transcriptions with a generator of their own."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from loaders.plan.boxes import boxes
from loaders.plan.draws import mix
from loaders.plan.views import Centre, ClampedRrc, DistortedBox, FiveCrops, Rrc, View

NUM = 20_000
HEIGHT, WIDTH = 375, 500


def draw(crop, num: int = NUM, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    return boxes(View("v", 224, crop), np.tile([[height, width]], (num, 1)), mix(np.arange(num)))


def shape(box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Widths and heights."""
    return box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]


def clamped(crop: ClampedRrc, height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
    """google-deepmind/semppl's `_decode_and_random_crop`."""
    area = height * width * rng.uniform(*crop.area)
    aspect = math.exp(rng.uniform(math.log(crop.ratio[0]), math.log(crop.ratio[1])))
    w = min(round(math.sqrt(area * aspect)), width)
    h = min(round(math.sqrt(area / aspect)), height)
    left, top = rng.randrange(width - w + 1), rng.randrange(height - h + 1)
    return left, top, left + w, top + h


def distorted(crop: DistortedBox, height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
    """TensorFlow's GenerateRandomCrop, and its retries until the box covers enough."""
    least, most = crop.area[0] * height * width, crop.area[1] * height * width
    for _ in range(100):
        aspect = rng.uniform(*crop.ratio)
        low, high = round(math.sqrt(least / aspect)), round(math.sqrt(most / aspect))
        while round(high * aspect) > width:
            high -= 1
        high = min(high, height)
        h = min(low, high)
        h += rng.randrange(high - h + 1)
        if round(h * aspect) * h < least:
            h += 1
        if round(h * aspect) * h > most:
            h -= 1
        w = round(h * aspect)
        if not (least <= w * h <= most and 0 < w <= width and 0 < h <= height) or w * h < crop.covered * height * width:
            continue
        top = rng.randrange(height - h) if h < height else 0
        left = rng.randrange(width - w) if w < width else 0
        return left, top, left + w, top + h
    return 0, 0, width, height


@pytest.mark.parametrize(
    ("crop", "transcription"),
    (
        (ClampedRrc((0.08, 1.0)), clamped),
        (ClampedRrc((0.05, 0.14)), clamped),
        (DistortedBox((0.08, 1.0)), distorted),
        (DistortedBox((0.05, 1.0), (0.75, 1.33)), distorted),
    ),
)
def test_boxes_follow_their_transcription(crop, transcription):
    """Catches a linear aspect for a log-uniform one, a uniform area for a uniform height, swapped sides, places that
    favour a corner."""
    rng = random.Random(0)
    expected = np.array([transcription(crop, HEIGHT, WIDTH, rng) for _ in range(NUM)], float)
    got = draw(crop)
    assert (got == np.rint(got)).all() and got.min() >= 0
    assert (got[:, 2] <= WIDTH).all() and (got[:, 3] <= HEIGHT).all()
    for column, (ours, theirs) in enumerate(
        ((got[:, 0], expected[:, 0]), (got[:, 1], expected[:, 1]), *zip(shape(got), shape(expected), strict=True))
    ):
        grid = np.quantile(theirs, np.linspace(0.02, 0.98, 49))
        distance = np.abs(np.searchsorted(np.sort(ours), grid) - np.searchsorted(np.sort(theirs), grid)).max() / NUM
        assert distance < 1.95 * math.sqrt(2 / NUM), column  # Kolmogorov-Smirnov at 0.1 %


def test_mean_areas_tell_the_laws_apart():
    """SimCLR's heights are uniform, so its crops of a 500 x 375 image are smaller than torchvision's: .387, not .431.

    Catches one law under the other's name.
    """
    for crop, mean, smallest in ((DistortedBox((0.08, 1.0)), 0.387, 0.1), (Rrc((0.08, 1.0)), 0.431, 0.0796)):
        w, h = shape(draw(crop, 100_000))
        area = w * h / (HEIGHT * WIDTH)
        assert abs(area.mean() - mean) < 0.003 and abs(area.min() - smallest) < 5e-4


def test_a_box_that_cannot_cover_enough_is_the_whole_image():
    """Catches an endless loop, or a box drawn from nothing, where 100 attempts fail: a strip of 1000 x 10."""
    assert (draw(DistortedBox((0.5, 1.0)), 50, 10, 1000) == (0, 0, 1000, 10)).all()


def test_clamped_sides_stay_in_thin_images():
    """Catches a clamp of the wrong side, and an empty box where a side rounds to nothing."""
    w, h = shape(draw(ClampedRrc((0.08, 1.0)), 1000, 3, 400))
    assert (w <= 400).all() and (h <= 3).all() and (h == 3).any()
    w, h = shape(draw(ClampedRrc((0.01, 0.02)), 1000, 1, 3))
    assert (w == 1).all() and (h == 1).all()


@pytest.mark.parametrize("crop", (Rrc((0.08, 1.0)), ClampedRrc((0.08, 1.0)), DistortedBox((0.08, 1.0))))
def test_no_rows(crop):
    """Catches a crash on an empty batch."""
    assert draw(crop, 0).shape == (0, 4)


def test_five_crops_are_the_centre_and_the_corners():
    """Of two images whose shorter side is scaled from 375 to 256 pixels, one wide, one tall. Catches copies taken for
    images, and corners that rounding leaves or passes."""
    sizes = np.array([[375, 500], [1000, 375]])
    view = View("five", 224, FiveCrops(resize=256), copies=5)
    found = boxes(view, np.tile(sizes, (5, 1)), mix(np.arange(10))).reshape(5, 2, 4)
    assert np.array_equal(found[0], boxes(View("one", 224, Centre(resize=256)), sizes, mix(np.arange(2))))
    for image, (height, width) in enumerate(sizes):
        corners = found[1:, image]
        assert np.allclose(corners[:, 0] * [1, 0, 1, 0], 0) and np.allclose(corners[:, 1] * [1, 1, 0, 0], 0)
        assert np.allclose(corners[:, 2][[1, 3]], width) and np.allclose(corners[:, 3][[2, 3]], height)
        assert (corners[:, 2] <= width).all() and (corners[:, 3] <= height).all()
    w, h = shape(found.reshape(-1, 4))
    assert np.allclose(w[::2], 224 * 500 / 341) and np.allclose(h[::2], 328.125)  # 341 columns: truncated
    assert np.allclose(w[1::2], 328.125) and np.allclose(h[1::2], 224 * 1000 / 682)


def test_five_crops_are_five_copies():
    with pytest.raises(ValueError, match="5 copies, not 1"):
        View("five", 224, FiveCrops())
