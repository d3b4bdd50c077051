"""AutoAugment's operations against transcriptions in NumPy, and what a flip after them does."""

import numpy as np
import pytest
from PIL import Image

from loaders.plan.autoaugment import SUB_POLICIES
from loaders.renderers.autoaugment import OPERATIONS, augment

SIZE = 61
LUMA = (0.299, 0.587, 0.114)


@pytest.fixture(scope="module", params=[1, 3])
def crop(request):
    """Smooth colours with some noise, in 20..239, of odd side: uint8 [S, S, 1 or 3]."""
    rng = np.random.default_rng(request.param)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    pixels = 20 + np.asarray(coarse) * 0.8 + rng.integers(0, 16, (SIZE, SIZE, 3))
    return pixels.astype(np.uint8)[..., : request.param].copy()


def done(name, crop, level=0, sign=1):
    """The operation's result, int64 like `crop`'s transcriptions."""
    image = Image.fromarray(crop[..., 0] if crop.shape[2] == 1 else crop)
    return np.asarray(OPERATIONS[name](image, level, sign)).reshape(crop.shape).astype(np.int64)


def test_every_operation_of_the_policy_is_there_and_no_other():
    assert {name for steps in SUB_POLICIES for name, _, _ in steps} == OPERATIONS.keys()


@pytest.mark.parametrize(("level", "kept"), [(5, 6), (6, 6), (7, 6), (8, 5)])
def test_posterize(crop, level, kept):
    """Catches 4 - n bits, which all but blacken an image, and the scale turned round."""
    assert np.array_equal(done("posterize", crop, level), crop >> (8 - kept) << (8 - kept))


@pytest.mark.parametrize(("level", "threshold"), [(0, 256), (3, 180), (4, 154), (5, 128), (7, 77), (8, 52)])
def test_solarize(crop, level, threshold):
    """Catches the scale turned round, and a threshold that is itself left as it was."""
    expected = np.where(crop >= threshold, 255 - crop, crop)
    assert np.array_equal(done("solarize", crop, level), expected)
    assert threshold == 256 or (expected != crop).any()


def test_invert(crop):
    assert np.array_equal(done("invert", crop), 255 - crop)


def test_equalize(crop):
    """Each channel's values by how many are below them."""
    expected = np.empty(crop.shape, np.int64)
    for c in range(crop.shape[2]):
        counts = np.bincount(crop[..., c].ravel(), minlength=256)
        step = (crop[..., c].size - counts[crop[..., c].max()]) // 255
        assert step > 0
        expected[..., c] = np.minimum((np.cumsum(counts) - counts + step // 2) // step, 255)[crop[..., c]]
    assert np.array_equal(done("equalize", crop), expected)


def test_autocontrast(crop):
    """Each channel from its least to its greatest value onto 0..255. Catches one scale for all channels."""
    low, high = crop.min(axis=(0, 1)).astype(float), crop.max(axis=(0, 1)).astype(float)
    expected = (crop - low) * (255 / (high - low))
    found = done("autocontrast", crop)
    assert np.abs(found - expected).max() <= 1
    assert (found.min(axis=(0, 1)) == 0).all() and (found.max(axis=(0, 1)) == 255).all()


def degenerate(name, crop):
    """What the three blends blend with, float64 like `crop`."""
    grey = crop @ np.array(LUMA) if crop.shape[2] == 3 else crop[..., 0].astype(float)
    if name == "colour":
        return np.repeat(np.round(grey)[..., None], crop.shape[2], axis=2)
    if name == "contrast":
        return np.full(crop.shape, np.floor(grey.mean() + 0.5))
    crop = crop.astype(float)
    smooth = crop.copy()
    for y in range(1, SIZE - 1):
        for x in range(1, SIZE - 1):
            smooth[y, x] = (crop[y - 1 : y + 2, x - 1 : x + 2].sum((0, 1)) + 4 * crop[y, x]) / 13
    return smooth


@pytest.mark.parametrize(("level", "factor"), [(0, 0.1), (2, 0.46), (4, 0.82), (7, 1.36), (8, 1.54)])
@pytest.mark.parametrize("name", ["colour", "contrast", "sharpness"])
def test_blends(crop, name, level, factor):
    """Catches factors of 1 + n, of levels in ninths, and a blend the wrong way round."""
    other = degenerate(name, crop)
    expected = np.clip(other + factor * (crop - other), 0, 255)
    assert np.abs(done(name, crop, level) - expected).max() <= 2


def moved(crop, source):
    """`crop` with every pixel from where `source(x, y)`, of centres at halves, says; grey from outside."""
    out = np.full(crop.shape, 128)
    for y in range(SIZE):
        for x in range(SIZE):
            at_x, at_y = (int(np.floor(v)) for v in source(x + 0.5, y + 0.5))
            if 0 <= at_x < SIZE and 0 <= at_y < SIZE:
                out[y, x] = crop[at_y, at_x]
    return out


def share_unlike(a, b):
    return (a != b).any(axis=2).mean()


@pytest.mark.parametrize("sign", [1, -1])
def test_shear(crop, sign):
    """0.15 at level 5, of pixels and not of degrees, from the top; grey comes in at one side."""
    expected = moved(crop, lambda x, y: (x + sign * 0.15 * y, y))
    assert share_unlike(done("shear_x", crop, 5, sign), expected) < 0.01
    side = expected[-1, -1] if sign > 0 else expected[-1, 0]
    assert (side == 128).all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("level", "degrees"), [(3, 9), (8, 24), (9, 27)])
def test_rotate(crop, level, degrees, sign):
    """About the middle, counter-clockwise, grey in the corners. Catches radians, black and an enlarged image."""
    cos, sin = np.cos(np.deg2rad(sign * degrees)), np.sin(np.deg2rad(sign * degrees))
    middle = SIZE / 2
    expected = moved(
        crop,
        lambda x, y: (
            middle + cos * (x - middle) - sin * (y - middle),
            middle + sin * (x - middle) + cos * (y - middle),
        ),
    )
    assert share_unlike(done("rotate", crop, level, sign), expected) < 0.01
    assert (expected[0, 0] == 128).all()


@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_the_mirror_image_is_the_operation_of_the_other_sign_on_the_mirrored_crop(crop, name):
    """Which is why a view may flip after the policy where the papers flip before it."""
    mirrored = np.ascontiguousarray(crop[:, ::-1])
    for level in sorted({level for steps in SUB_POLICIES for each, _, level in steps if each == name}):
        here, there = done(name, mirrored, level, 1)[:, ::-1], done(name, crop, level, -1)
        assert share_unlike(here, there) < (0.01 if name in ("rotate", "shear_x") else 1e-12)


def test_both_operations_are_done_in_their_order_and_none_where_none_is_to_be(crop):
    """Sub-policy 7 posterises, then equalises: neither order nor level is the other's."""
    for signs, names in (((0, 0), ()), ((1, 0), ("posterize",)), ((0, -1), ("equalize",))):
        augmented, expected = crop.copy(), crop.astype(np.int64)
        augment(augmented, np.array([7, *signs], np.int8))
        for name in names:
            expected = done(name, crop, 5)
        assert np.array_equal(augmented, expected)
    augmented = crop.copy()
    augment(augmented, np.array([7, 1, 1], np.int8))
    expected = done("equalize", done("posterize", crop, 5).astype(np.uint8), 2)
    assert np.array_equal(augmented, expected)
    assert not np.array_equal(expected, done("posterize", done("equalize", crop, 2).astype(np.uint8), 5))
