"""The reference finish against Pillow and colorsys; the compiled CPU finish against the reference."""

from __future__ import annotations

import colorsys
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from sklearn.datasets import load_sample_images

from loaders.finish import numba_cpu, reference
from loaders.plan.ops import (
    LUMA,
    TF_LUMA,
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
    TfColourJitter,
)
from loaders.plan.views import CIFAR10, IMAGENET, SIGNED, UNIT, Pixels

LEVEL = 1 / 255
STRONG = ColourJitter(p=1.0, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
SIMCLR_JITTER = TfColourJitter(0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
SEMPPL_JITTER = TfColourJitter(0.8, offset=0.4, contrast=0.4, saturation=0.2, hue=0.1)
PAWS_IMAGENET = (Flip(), ColourJitter(0.8, 0.8, 0.8, 0.8, 0.2), Grayscale(0.2), GaussianBlur(0.5))
PAWS_CIFAR = (Flip(), ColourJitter(0.8, 0.4, 0.4, 0.4, 0.1), Solarise(0.2), Equalize(0.2))
SIMCLR = (Flip(), SIMCLR_JITTER, Grayscale(0.2, TF_LUMA), GaussianKernelBlur(0.5))
SEMPPL = (Flip(), SEMPPL_JITTER, Grayscale(0.2, TF_LUMA), GaussianKernelBlur(0.1, taps=9), Solarise(0.2, (0.5, 0.5)))
EXEMPLAR = (HsvNoise(), Flip())


PHOTOS = [Image.fromarray(image) for image in load_sample_images().images]


def photos(num: int, size: int, channels: int) -> np.ndarray:
    """Crops of scikit-learn's two photographs, every other one enlarged until it is smooth; uint8 [M, S, S, C]."""
    crops = []
    for i in range(num):
        photo = PHOTOS[i % 2]
        side = max(4, size // 4) if i % 4 >= 2 else min(400, 4 * size)
        left, top = 13 * i % 200, 7 * i % 27
        crop = photo.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
        crops.append(np.asarray(crop if channels == 3 else crop.convert("L")).reshape(size, size, channels))
    return np.stack(crops)


def random_crops(num: int, size: int, channels: int) -> np.ndarray:
    """Independent bytes, with one grey, one black and one white image for the corners of HSV and equalize."""
    crops = np.random.default_rng(size).integers(0, 256, (num, size, size, channels), np.uint8)
    crops[0] = crops[0, ..., :1]
    crops[1], crops[2] = 0, 255
    return crops


def tables(ops: tuple[Op, ...], num: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return tuple(op.parameters(rng.random((num, op.num_draws))) for op in ops)


def fast(
    crops: np.ndarray,
    ops: tuple[Op, ...],
    tables_: tuple[np.ndarray, ...],
    pixels: Pixels = UNIT,
    pool: ThreadPoolExecutor | None = None,
) -> np.ndarray:
    out = np.full(crops.shape, np.nan, np.float32)
    numba_cpu.finish(crops, ops, tables_, pixels, out, pool)
    return out


PHOTO = photos(4, 96, 3)[1]
FLOATS, PILLOW = PHOTO / 255, Image.fromarray(PHOTO)


@pytest.mark.parametrize("factor", (0.0, 0.2, 0.7, 1.0, 1.3, 1.8))
@pytest.mark.parametrize(
    ("law", "enhancer"),
    (
        (reference.brightness, ImageEnhance.Brightness),
        (reference.contrast, ImageEnhance.Contrast),
        (reference.saturation, ImageEnhance.Color),
    ),
)
def test_blends_follow_pillow(law, enhancer, factor):
    """Catches a blend towards the wrong end, a wrong luma, a factor that is one off."""
    expected = np.asarray(enhancer(PILLOW).enhance(factor)) / 255
    assert np.abs(law(FLOATS, factor) - expected).max() <= 2 * LEVEL


def test_grayscale_follows_pillow():
    """Catches a mean of channels in place of the luma."""
    expected = np.asarray(PILLOW.convert("L").convert("RGB")) / 255
    assert np.abs(reference.grayscale(FLOATS, *LUMA) - expected).max() <= LEVEL


def test_grayscale_weights_are_the_ops():
    """Catches weights that are ignored or in BGR order: TensorFlow's make white a little grey."""
    white_red = np.array([[[255] * 3, [255, 0, 0]]] * 2, np.uint8)[None]
    ops = (Grayscale(1.0, TF_LUMA),)
    assert np.allclose(reference.finish(white_red, ops, tables(ops, 1), UNIT)[0, 0, :, 1], (0.9999, 0.2989))


@pytest.mark.parametrize("factor", (0.0, 0.4, 1.0, 1.7))
def test_tf_contrast_and_brightness(factor):
    """Catches a contrast about the luma's mean in place of each channel's, and an offset that is scaled."""
    for c in range(3):
        mean = FLOATS[..., c].sum() / FLOATS[..., c].size
        expected = np.clip(factor * (FLOATS[..., c] - mean) + mean, 0, 1)
        assert np.allclose(reference.tf_contrast(FLOATS, factor)[..., c], expected, atol=1e-12)
    assert np.allclose(reference.tf_brightness(FLOATS, factor, -0.3), np.clip(factor * FLOATS - 0.3, 0, 1), atol=1e-12)


def test_hsv_laws_follow_colorsys():
    """Catches S scaled about the luma, a clip that is missing, powers or draws of S and V exchanged, hue after them."""

    def clip(x: float) -> float:
        return min(max(x, 0.0), 1.0)

    for image in random_crops(4, 12, 3) / 255:
        saturated = {f: reference.tf_saturation(image, f) for f in (0.0, 0.6, 1.8)}
        noisy = reference.hsv_noise(image, 0.07, 0.5, 1.2, -0.05, 2.0, 0.9, 0.08)
        for y, x in np.ndindex(image.shape[:2]):
            h, s, v = colorsys.rgb_to_hsv(*image[y, x])
            for factor, ours in saturated.items():
                assert np.allclose(ours[y, x], colorsys.hsv_to_rgb(h, clip(s * factor), v), atol=1e-12)
            s, v = clip(s**0.5 * 1.2 - 0.05), clip(v**2 * 0.9 + 0.08)
            assert np.allclose(noisy[y, x], colorsys.hsv_to_rgb((h + 0.07) % 1, s, v), atol=1e-12)


def test_jitters_run_their_sub_ops_in_the_numbered_order():
    """Catches an order that is ignored, or one of the other jitter's sub-ops: number 9 is contrast, saturation, hue,
    brightness."""
    image = reference.tf_contrast(FLOATS, 1.6)
    expected = reference.tf_brightness(reference.hue(reference.tf_saturation(image, 0.4), 0.2), 1.5, -0.2)
    assert np.allclose(reference.tf_colour_jitter(FLOATS, 9.0, 1.5, -0.2, 1.6, 0.4, 0.2), expected)
    image = reference.contrast(FLOATS, 1.6)
    expected = reference.brightness(reference.hue(reference.saturation(image, 0.4), 0.2), 1.5)
    assert np.allclose(reference.colour_jitter(FLOATS, 9.0, 1.5, 1.6, 0.4, 0.2), expected)


@pytest.mark.parametrize(("sigma", "reach", "corner"), ((1.0, 11, 0.49), (2.0, 2, None), (0.1, 4, 1.0)))
def test_kernel_blur_is_a_zero_padded_convolution(sigma, reach, corner):
    """Catches Pillow's approximation, repeated edges (a corner of all-ones becomes .49 in SimCLR at sigma 1), a kernel
    of another length, weights that do not add up to 1."""
    kernel = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    kernel /= kernel.sum()
    image = FLOATS[:32, :32]
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * reach + 1, 2 * reach + 1), (0, 1))
    expected = np.einsum("yxcij,i,j->yxc", windows, kernel, kernel)
    assert np.allclose(reference.gaussian_kernel_blur(image, sigma, float(reach)), expected, atol=1e-12)
    if corner is not None:
        assert abs(reference.gaussian_kernel_blur(np.ones((32, 32, 3)), sigma, float(reach))[0, 0, 0] - corner) < 0.005


def test_kernel_blur_taps_are_a_tenth_of_the_view():
    """Catches an even kernel, or the taps of 224 pixels for every view."""
    assert [GaussianKernelBlur.taps_for(size) for size in (224, 96, 32)] == [23, 9, 3]


@pytest.mark.parametrize("steps", (-51, -3, 0, 20, 51, 128))
def test_hue_follows_pillow_as_far_as_bytes_allow(steps):
    """Catches a shift of the wrong sign or size. Pillow keeps hue in bytes of 6 / 256 of a sector, so single values
    differ by a few levels where the mean does not."""
    hue, saturation, value = PILLOW.convert("HSV").split()
    shifted = hue.point(lambda h: (h + steps) % 256)
    expected = np.asarray(Image.merge("HSV", (shifted, saturation, value)).convert("RGB")) / 255
    difference = np.abs(reference.hue(FLOATS, steps / 256) - expected)
    assert difference.mean() <= 2 * LEVEL and difference.max() <= 8 * LEVEL


def test_hue_follows_colorsys_exactly():
    """Catches what Pillow's quantisation would hide: a wrong sector border, wrap-around, greys."""
    crops = random_crops(4, 12, 3) / 255
    crops[3, :6] = np.round(crops[3, :6])  # pure colours: two channels equal
    for turns in (-0.5, -0.2, 0.0, 1 / 6, 0.2, 0.5):
        for image in crops:
            ours = reference.hue(image, turns)
            for rgb, shifted in zip(image.reshape(-1, 3), ours.reshape(-1, 3), strict=True):
                h, s, v = colorsys.rgb_to_hsv(*rgb)
                assert np.allclose(shifted, colorsys.hsv_to_rgb((h + turns) % 1, s, v), atol=1e-12)


@pytest.mark.parametrize("size", (8, 33, 96))
@pytest.mark.parametrize("sigma", (0.1, 0.5, 1.0, 1.5, 2.0, 4.7))
def test_blur_follows_pillow(size, sigma):
    """Catches a wrong box radius, true Gaussian weights, zeros beyond the edge.

    Pillow rounds after each of six passes: at most half a level each, three in all.
    """
    for crop in (photos(2, size, 3)[1], random_crops(4, size, 3)[3]):
        expected = np.asarray(Image.fromarray(crop).filter(ImageFilter.GaussianBlur(sigma))) / 255
        levels_off = np.abs(reference.gaussian_blur(crop / 255, sigma) - expected) * 255
        assert levels_off.max() <= 3 and levels_off.mean() < 1.1


@pytest.mark.parametrize("threshold", (0, 1, 77, 128, 255))
def test_solarise_follows_pillow(threshold):
    """Catches > in place of >=, and a threshold in other units."""
    expected = np.asarray(ImageOps.solarize(PILLOW, threshold)) / 255
    assert np.abs(reference.solarise(FLOATS, threshold / 255) - expected).max() < 1e-9


@pytest.mark.parametrize("size", (8, 17, 18, 32, 96))
def test_equalize_is_pillows(size):
    """Catches a channel-mixed histogram, and the overflow that Pillow clips on images of 256 to 1000 pixels."""
    for crop in (*photos(4, size, 3), *random_crops(4, size, 3)):
        expected = np.asarray(ImageOps.equalize(Image.fromarray(crop)))
        assert np.array_equal(np.round(reference.equalize(crop / 255) * 255), expected)


def test_flip_mirrors_left_right():
    """Catches an upside-down flip."""
    assert np.array_equal(reference.flip(PHOTO), np.asarray(ImageOps.mirror(PILLOW)))


def test_affine_turns_shifts_and_scales():
    """Catches clockwise turns, swapped or inverted shifts, a centre that is half a pixel off, the inverse scale."""
    assert np.allclose(reference.affine(FLOATS, math.pi / 2, 1, 0, 0), np.rot90(FLOATS), atol=1e-9)
    moved = reference.affine(FLOATS, 0, 1, 12 / 96, -24 / 96)
    assert np.allclose(moved[:-24, 12:], FLOATS[24:, :-12], atol=1e-9)
    assert np.allclose(moved[:-24, :12], FLOATS[24:, :1], atol=1e-9)  # the edge is repeated
    assert np.allclose(moved[-24:], moved[-25], atol=1e-9)
    enlarged = reference.affine(FLOATS, 0, 2, 0, 0)
    inner = Image.fromarray(PHOTO[24:72, 24:72]).resize((96, 96), Image.Resampling.BILINEAR)
    assert np.abs(enlarged - np.asarray(inner) / 255)[2:-2, 2:-2].max() <= 1.01 * LEVEL


def test_affine_follows_pillows_transform():
    """Catches a rotation composed with the shift in the wrong order. Pillow takes the inverse map of pixel corners."""
    angle, scale, shift_x, shift_y = 0.15, 1.1, 0.08, -0.05
    cos, sin, centre = math.cos(angle) / scale, math.sin(angle) / scale, 48.0
    right, down = centre + 96 * shift_x, centre + 96 * shift_y
    inverse = (cos, -sin, centre - cos * right + sin * down, sin, cos, centre - sin * right - cos * down)
    expected = PILLOW.transform((96, 96), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
    ours = reference.affine(FLOATS, angle, scale, shift_x, shift_y)
    assert np.abs(ours - np.asarray(expected) / 255)[16:-16, 16:-16].max() <= LEVEL


def test_noise_is_standard_normal_and_keyed():
    """Catches a wrong spread, correlated neighbours, keys whose low or high half is ignored."""
    grey = np.full((128, 128, 3), 0.5)
    one, again, low, high = (
        (reference.noise(grey, 0.1, *key) - 0.5) / 0.1 for key in ((5, 9), (5, 9), (6, 9), (5, 10))
    )
    count = one.size
    assert np.array_equal(one, again)
    assert abs(one.mean()) < 5 / math.sqrt(count) and abs(one.std() - 1) < 5 / math.sqrt(2 * count)
    for other in (low, high, np.roll(one, 1), np.roll(one, 1, axis=1)):
        assert abs((one * other).mean()) < 5 / math.sqrt(count)
    assert abs((np.abs(one) > 2).mean() - 0.0455) < 0.005


def test_noise_words_are_pinned():
    """Catches an edit of the hash: old runs could not be replayed."""
    words = [
        reference.noise_words(np.uint64(low), np.uint64(high), np.uint64(index))
        for low, high, index in ((0, 0, 0), (2**24 - 1, 1, 150527))
    ]
    assert [tuple(int(word) for word in pair) for pair in words] == [(340428713, 4025183836), (1601831873, 3815954196)]


def test_noise_stays_in_range():
    """Catches values outside [0, 1] that a later op cannot take."""
    noisy = reference.noise(FLOATS, 0.5, 1, 2)
    assert noisy.min() == 0 and noisy.max() == 1


def test_one_channel_images_keep_to_their_own_laws():
    """Catches a colour op that crashes on, or changes, grey images."""
    grey = FLOATS[..., :1]
    for unchanged in (reference.saturation(grey, 0.3), reference.hue(grey, 0.2), reference.grayscale(grey, *TF_LUMA),
                      reference.tf_saturation(grey, 0.3)):  # fmt: skip
        assert np.array_equal(unchanged, grey)
    expected = np.asarray(ImageEnhance.Contrast(Image.fromarray(PHOTO[..., 0])).enhance(1.6)) / 255
    assert np.abs(reference.contrast(grey, 1.6)[..., 0] - expected).max() <= 2 * LEVEL


ALWAYS: tuple[Op, ...] = (
    Flip(1.0), STRONG, Grayscale(1.0), GaussianBlur(1.0), GaussianBlur(1.0, (3.0, 9.0)), Solarise(1.0), Equalize(1.0),
    Affine(), Affine(degrees=180.0, scale=(0.3, 3.0), shift=0.6), Noise(), Noise(std=(0.5, 0.5)),
    replace(SIMCLR_JITTER, p=1.0), replace(SEMPPL_JITTER, p=1.0), Grayscale(1.0, TF_LUMA), HsvNoise(),
    GaussianKernelBlur(1.0), GaussianKernelBlur(1.0, (0.5, 4.0), taps=9), Solarise(1.0, (0.5, 0.5)),
)  # fmt: skip


@pytest.mark.parametrize("channels", (1, 3))
@pytest.mark.parametrize("size", (1, 8, 18, 33, 96))
@pytest.mark.parametrize("op", ALWAYS, ids=lambda op: type(op).__name__)
def test_every_compiled_op_follows_the_reference(op, size, channels):
    """Catches a compiled op that differs: channel mix-ups, edges, odd sizes, one channel."""
    num = 3 if size == 96 else 8
    for crops in (photos(num, size, channels), random_crops(num, size, channels)):
        table = tables((op,), num)
        expected = reference.finish(crops, (op,), table, UNIT)
        assert np.abs(fast(crops, (op,), table) - expected).max() < 0.02 * LEVEL


@pytest.mark.parametrize(
    ("op", "factors"), ((STRONG, (1.7, 0.4, 1.6, 0.2)), (replace(SEMPPL_JITTER, p=1.0), (1.2, 0.2, 0.4, 1.6, 0.2)))
)
def test_every_order_of_the_jitters_follows_the_reference(op, factors):
    """Catches sub-ops in another order than the numbered one."""
    crops = photos(1, 32, 3)[[0] * 24]
    table = np.tile(np.array((1, 0, *factors), np.float32), (24, 1))
    table[:, 1] = range(24)
    expected = reference.finish(crops, (op,), (table,), UNIT)
    assert np.abs(fast(crops, (op,), (table,)) - expected).max() < 0.02 * LEVEL
    assert len({image.tobytes() for image in expected}) > 12  # clipping makes the orders differ


@pytest.mark.parametrize(
    ("ops", "size", "channels", "pixels"),
    (
        (PAWS_IMAGENET, 224, 3, IMAGENET),
        (PAWS_IMAGENET, 96, 3, IMAGENET),
        (SIMCLR, 224, 3, UNIT),
        (SEMPPL, 96, 3, IMAGENET),
        (EXEMPLAR, 96, 3, SIGNED),
        (SIMCLR, 33, 1, UNIT),
        (EXEMPLAR, 33, 1, SIGNED),
        (PAWS_CIFAR, 32, 3, CIFAR10),
        (PAWS_CIFAR, 18, 3, CIFAR10),
        (PAWS_CIFAR, 32, 1, UNIT),
        ((Affine(), Noise()), 8, 1, SIGNED),
        ((), 33, 3, IMAGENET),
        ((), 8, 1, SIGNED),
    ),
)
def test_chains_follow_the_reference(ops, size, channels, pixels):
    """Catches ops applied out of turn or where `apply` is 0, and a wrong mean or std.

    Solarise and equalize are discontinuous: behind the jitter a value next to a step may fall on its other side.
    """
    num = 4 if size == 224 else 32
    for crops in (photos(num, size, channels), random_crops(num, size, channels)):
        table = tables(ops, num, seed=size)
        expected = reference.finish(crops, ops, table, pixels)
        ours = fast(crops, ops, table, pixels)
        assert ours.dtype == np.float32 and expected.dtype == np.float32
        far = np.abs(ours - expected) * np.array(pixels.std) > 0.02 * LEVEL
        steps = {Solarise, Equalize} & {type(op) for op in ops}
        assert far.mean() <= (1e-3 if steps else 0)


def test_normalisation_is_value_minus_mean_over_std():
    """Catches a std that multiplies, or channels taken in BGR order."""
    crops = np.broadcast_to(np.array((255, 0, 51), np.uint8), (1, 4, 4, 3)).copy()
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225]
    for finished in (reference.finish(crops, (), (), IMAGENET), fast(crops, (), (), IMAGENET)):
        assert np.allclose(finished[0, 2, 1], expected, atol=1e-6)


def test_no_rows():
    """Catches a crash on an empty batch."""
    crops = np.empty((0, 32, 32, 3), np.uint8)
    with ThreadPoolExecutor(2) as pool:
        assert fast(crops, PAWS_CIFAR, tables(PAWS_CIFAR, 0), CIFAR10, pool).shape == (0, 32, 32, 3)
    assert reference.finish(crops, PAWS_CIFAR, tables(PAWS_CIFAR, 0), CIFAR10).shape == (0, 32, 32, 3)


def test_output_is_channels_last():
    """Catches a copy between the finish and the first convolution."""
    crops = photos(2, 32, 3)
    x = torch.from_numpy(fast(crops, (), ())).permute(0, 3, 1, 2)
    assert x.shape == (2, 3, 32, 32) and x.is_contiguous(memory_format=torch.channels_last)


def test_concurrent_calls_equal_serial_ones(monkeypatch):
    """Catches scratch memory shared between threads or tasks, and tasks that write each other's rows."""
    monkeypatch.setattr(numba_cpu, "VALUES_PER_TASK", 5 * 32 * 32 * 3)  # ragged: 48 images in tasks of 5
    crops = [photos(48, 32, 3), random_crops(48, 32, 3)]
    ops = (*PAWS_IMAGENET, Solarise(), Equalize(), Affine(), Noise())
    params = [tables(ops, 48, seed) for seed in (1, 2)]
    serial = [fast(c, ops, t) for c, t in zip(crops, params, strict=True)]
    with ThreadPoolExecutor(2) as pool, ThreadPoolExecutor(2) as callers:
        for _ in range(20):
            calls = [callers.submit(fast, c, ops, t, UNIT, pool) for c, t in zip(crops, params, strict=True)]
            for call, expected in zip(calls, serial, strict=True):
                assert np.array_equal(call.result(), expected)


def test_only_the_named_ops_are_compiled(monkeypatch):
    """Catches a digits run that waits for colour ops to compile."""
    named = []
    compile_ = numba_cpu._compiled
    monkeypatch.setattr(numba_cpu, "_compiled", lambda body: named.append(body) or compile_(body))
    fast(random_crops(4, 8, 1), (Affine(), Noise()), tables((Affine(), Noise()), 4))
    assert named == [numba_cpu._keep, numba_cpu._affine, numba_cpu._noise]


def test_every_level_is_divided_by_255():
    """Catches a product with 1 / 255, which rounds half of the levels otherwise: evaluated again, a run of before
    would have another accuracy."""
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    assert np.array_equal(fast(levels, (), ()), levels.astype(np.float32) / np.float32(255))


@pytest.mark.parametrize("offset", (0, 1, 8))
def test_where_the_output_stands_changes_no_bit(offset):
    """Catches streamed stores that round otherwise than the plain ones, which serve addresses they cannot."""
    crops, ops = photos(3, 32, 3), PAWS_IMAGENET
    out = np.full(crops.size + 40, np.nan, np.float32)
    start = (-out.ctypes.data % 64) // 4 + offset
    numba_cpu.finish(crops, ops, tables(ops, 3), IMAGENET, out[start : start + crops.size].reshape(crops.shape))
    assert np.array_equal(
        out[start : start + crops.size].reshape(crops.shape), fast(crops, ops, tables(ops, 3), IMAGENET)
    )
    assert np.isnan(out[:start]).all() and np.isnan(out[start + crops.size :]).all()


@pytest.mark.parametrize("sigma", (0.1, 1.0, 1.5, 3.0, 8.0))
@pytest.mark.parametrize("size", (8, 13, 25, 60, 97))
def test_blurs_of_any_reach(size, sigma):
    """Catches ends of lines that meet, a window that moves too early, bands shorter than the reach; another blur and
    a mean behind it see only rows that are finished."""
    crops = random_crops(4, size, 3)
    ops = (GaussianBlur(1.0, (sigma, sigma)), STRONG, GaussianKernelBlur(1.0, (sigma, sigma), taps=15), Equalize(0.0))
    table = tables(ops, 4)
    expected = reference.finish(crops, ops, table, UNIT)
    assert np.abs(fast(crops, ops, table) - expected).max() < 0.06 * LEVEL  # three ops of 0.02 each


def test_ops_are_known_to_both_finishes():
    """Catches a new op that only one finish implements."""
    assert set(numba_cpu._BODIES) == set(reference.LAWS) == set(Op.__subclasses__())
