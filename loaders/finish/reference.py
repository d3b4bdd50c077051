"""The slow and obvious finish: what every op means, one image at a time in NumPy.

The other finishes are held to this one. An image is float [H, W, C] with values in [0, 1] and C = 1 or 3; every op
returns a new image of the same shape and dtype, clipped to [0, 1] after each sub-op. The laws are Pillow's and
torchvision's, or where an op says so TensorFlow's, on values that are never rounded to bytes in between. An op takes
the columns of its parameter table after `apply` (see :mod:`loaders.plan.ops`), in their order.

One-channel images are their own luma: brightness and contrast act on them, saturation, hue and grayscale leave them
as they are. Hue shifts are exact turns, where Pillow's are rounded to 1/256 of a turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
from numba.extending import register_jitable

from loaders.plan import ops
from loaders.plan.ops import LUMA, Op
from loaders.plan.views import Pixels

SUB_OP_ORDERS = np.array(tuple(permutations(range(4))))  # [24, 4]; 0 brightness, 1 contrast, 2 saturation, 3 hue
_WORD = 0xFFFFFFFF


def flip(image: np.ndarray) -> np.ndarray:
    """Mirror left-right."""
    return image[:, ::-1].copy()


def luma(image: np.ndarray, weights: tuple[float, ...] = LUMA) -> np.ndarray:
    """[H, W, C] -> [H, W, 1]."""
    return image if image.shape[2] == 1 else (image @ np.array(weights, image.dtype))[..., None]


def _blend(image: np.ndarray, towards: np.ndarray | float, factor: float) -> np.ndarray:
    return np.clip(towards + factor * (image - towards), 0, 1).astype(image.dtype)


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with black."""
    return _blend(image, 0.0, factor)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the mean luma, which Pillow rounds to a byte and we, like torchvision on tensors, do not."""
    return _blend(image, float(luma(image).mean(dtype=np.float64)), factor)


def saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend with the luma of each pixel."""
    return _blend(image, luma(image), factor)


def to_hsv(image: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[H, W, 3] -> hue in turns, saturation and value, each [H, W]. Greys have hue 0, black has saturation 0."""
    red, green, blue = np.moveaxis(image, 2, 0)
    value, chroma = image.max(2), np.ptp(image, 2)
    safe = np.where(chroma > 0, chroma, 1)
    sixths = np.where(
        value == red, (green - blue) / safe, np.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    )
    return sixths / 6 % 1, chroma / np.where(value > 0, value, 1), value


def from_hsv(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The inverse of `to_hsv`; hues may be any number of turns."""
    channels = []
    for corner in (5, 3, 1):  # f(n) = V - V * S * clip(min(k, 4 - k), 0, 1), k = (n + 6 H) mod 6
        k = (corner + 6 * hue) % 6
        channels.append(value - value * saturation * np.clip(np.minimum(k, 4 - k), 0, 1))
    colours: np.ndarray = np.clip(np.stack(channels, 2), 0, 1).astype(value.dtype)
    return colours


def hue(image: np.ndarray, turns: float) -> np.ndarray:
    """Shift the hue of HSV by `turns` of the colour circle; value and saturation stay."""
    if image.shape[2] == 1:
        return image.copy()
    h, s, v = to_hsv(image)
    return from_hsv(h + turns, s, v)


def colour_jitter(
    image: np.ndarray, order: float, brightness_: float, contrast_: float, saturation_: float, hue_: float
) -> np.ndarray:
    """The four sub-ops in the order numbered `order`."""
    sub_ops = ((brightness, brightness_), (contrast, contrast_), (saturation, saturation_), (hue, hue_))
    for index in SUB_OP_ORDERS[int(order)]:
        sub_op, factor = sub_ops[index]
        image = sub_op(image, factor)
    return image


def tf_brightness(image: np.ndarray, gain: float, offset: float) -> np.ndarray:
    return np.clip(image * gain + offset, 0, 1).astype(image.dtype)


def tf_contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blend each channel with its own mean."""
    return _blend(image, image.mean((0, 1), np.float64), factor)


def tf_saturation(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiply the saturation of HSV, at most up to 1."""
    if image.shape[2] == 1:
        return image.copy()
    h, s, v = to_hsv(image)
    return from_hsv(h, np.clip(s * factor, 0, 1), v)


def tf_colour_jitter(
    image: np.ndarray, order: float, gain: float, offset: float, contrast_: float, saturation_: float, hue_: float
) -> np.ndarray:
    """The four sub-ops in the order numbered `order`."""
    for index in SUB_OP_ORDERS[int(order)]:
        if index == 0:
            image = tf_brightness(image, gain, offset)
        else:
            sub_op, factor = ((tf_contrast, contrast_), (tf_saturation, saturation_), (hue, hue_))[index - 1]
            image = sub_op(image, factor)
    return image


def hsv_noise(
    image: np.ndarray,
    turns: float,
    power_s: float, gain_s: float, offset_s: float,
    power_v: float, gain_v: float, offset_v: float,
) -> np.ndarray:  # fmt: skip
    """S4L's change of H, S and V. A one-channel image is its own value."""

    def change(x: np.ndarray, power: float, gain: float, offset: float) -> np.ndarray:
        return np.clip(x**power * gain + offset, 0, 1)

    if image.shape[2] == 1:
        return change(image, power_v, gain_v, offset_v).astype(image.dtype)
    h, s, v = to_hsv(image)
    return from_hsv(h + turns, change(s, power_s, gain_s, offset_s), change(v, power_v, gain_v, offset_v))


def grayscale(image: np.ndarray, *weights: float) -> np.ndarray:
    """Every channel becomes the sum of the channels times `weights` (red, green, blue)."""
    return np.repeat(luma(image, weights), image.shape[2], axis=2)


def box_radius(sigma: float) -> float:
    """Radius of the extended box blur that, done three times, has standard deviation `sigma` [pixels].

    A box of whole radius l and two edge pixels of weight alpha; the variance of one pass is sigma ** 2 / 3 (Gwosdek
    et al. 2011, "Theoretical foundations of Gaussian convolution by extended box filtering", equations 7-14).
    """
    variance = sigma * sigma / 3
    whole = math.floor((math.sqrt(12 * variance + 1) - 1) / 2)
    alpha = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    return whole + alpha


def _box_blur_rows(image: np.ndarray, radius: float) -> np.ndarray:
    """One extended box blur along axis 0, edge pixels repeated."""
    whole, total = int(radius), np.zeros(image.shape, np.float64)
    alpha = radius - whole
    last = len(image) - 1
    for y in range(len(image)):
        for offset in range(-whole - 1, whole + 2):
            weight = alpha if abs(offset) == whole + 1 else 1.0
            total[y] += weight * image[min(max(y + offset, 0), last)]
    return total / (2 * radius + 1)


def gaussian_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Pillow's GaussianBlur(sigma): three extended box blurs along x, then three along y."""
    blurred = image.swapaxes(0, 1)
    for _ in range(3):
        blurred = _box_blur_rows(blurred, box_radius(sigma))
    blurred = blurred.swapaxes(0, 1)
    for _ in range(3):
        blurred = _box_blur_rows(blurred, box_radius(sigma))
    return blurred.astype(image.dtype)


def gaussian_kernel_blur(image: np.ndarray, sigma: float, reach: float) -> np.ndarray:
    """Convolve rows, then columns, with a Gaussian cut off after `reach` pixels; zeros beyond the edge."""
    offsets = range(-int(reach), int(reach) + 1)
    weights = [math.exp(-(k**2) / (2 * sigma**2)) for k in offsets]
    blurred: np.ndarray = image.astype(np.float64)
    for axis in (1, 0):
        total = np.zeros(image.shape)
        for k, weight in zip(offsets, weights, strict=True):
            ends = [(0, 0)] * 3
            ends[axis] = (max(0, -k), max(0, k))
            first = max(0, k)
            total += weight / sum(weights) * np.pad(blurred, ends).take(range(first, first + len(image)), axis)
        blurred = total
    return blurred.astype(image.dtype)


def solarise(image: np.ndarray, threshold: float) -> np.ndarray:
    """Invert the values at or above `threshold`."""
    return np.where(image >= threshold, 1 - image, image)


def equalize(image: np.ndarray) -> np.ndarray:
    """Pillow's ImageOps.equalize of each channel, on values rounded to bytes."""
    levels = np.floor(image * 255 + 0.5).astype(np.int64)
    for c in range(image.shape[2]):
        counts = np.bincount(levels[..., c].ravel(), minlength=256)
        step = (counts.sum() - counts[levels[..., c].max()]) // 255
        if step > 0:  # else too few values to spread: they stay
            below = np.cumsum(counts) - counts
            levels[..., c] = np.minimum((below + step // 2) // step, 255)[levels[..., c]]
    return (levels / 255).astype(image.dtype)


def affine(image: np.ndarray, angle: float, scale: float, shift_x: float, shift_y: float) -> np.ndarray:
    """Rotate by `angle` [radians] counter-clockwise and scale about the centre, then shift right and down by shares
    of the side. Bilinear; positions outside take the nearest edge pixel."""
    size = image.shape[0]
    centre, cos, sin = (size - 1) / 2, math.cos(angle), math.sin(angle)
    out = np.empty_like(image)
    for row in range(size):
        for column in range(size):
            right = (column - centre - shift_x * size) / scale
            down = (row - centre - shift_y * size) / scale
            x = min(max(centre + cos * right - sin * down, 0), size - 1)
            y = min(max(centre + sin * right + cos * down, 0), size - 1)
            x0, y0 = int(x), int(y)
            x1, y1 = min(x0 + 1, size - 1), min(y0 + 1, size - 1)
            top = image[y0, x0] + (x - x0) * (image[y0, x1] - image[y0, x0])
            bottom = image[y1, x0] + (x - x0) * (image[y1, x1] - image[y1, x0])
            out[row, column] = top + (y - y0) * (bottom - top)
    return out


@register_jitable
def mix32(word: Any) -> Any:
    """Integer hash, a bijection of [0, 2**32) (constants of C. Wellons's hash prospector, shifts 16-15-15).

    `word` holds 32 bits in a 64-bit integer, signed or not: only the low half of a product is kept.
    """
    word = ((word ^ (word >> 16)) * 0x21F0AAAD) & _WORD
    word = ((word ^ (word >> 15)) * 0x735A2D97) & _WORD
    return word ^ (word >> 15)


@register_jitable
def noise_words(key_low: Any, key_high: Any, index: Any) -> Any:
    """Two 32-bit words for value number `index` of the image with this key: the law every finish shares."""
    low, high = mix32(key_low), mix32(key_high ^ 0x9E3779B9)
    first = mix32(mix32((2 * index + low) & _WORD) ^ high)
    second = mix32(mix32((2 * index + 1 + low) & _WORD) ^ high)
    return first, second


def noise(image: np.ndarray, std: float, key_low: float, key_high: float) -> np.ndarray:
    """Add Gaussian noise and clip. Values are numbered row by row, channels fastest; a value's two words become two
    uniforms in (0, 1), and Box and Muller's cosine branch makes them one normal draw."""
    index = np.arange(image.size, dtype=np.uint64).reshape(image.shape)
    first, second = noise_words(np.uint64(key_low), np.uint64(key_high), index)
    radius = np.sqrt(-2 * np.log((first + 0.5) / 2**32))
    normal = radius * np.cos(2 * np.pi * (second + 0.5) / 2**32)
    noisy: np.ndarray = np.clip(image + std * normal, 0, 1).astype(image.dtype)
    return noisy


LAWS: dict[type[Op], Callable[..., np.ndarray]] = {
    ops.Flip: flip,
    ops.ColourJitter: colour_jitter,
    ops.TfColourJitter: tf_colour_jitter,
    ops.HsvNoise: hsv_noise,
    ops.Grayscale: grayscale,
    ops.GaussianBlur: gaussian_blur,
    ops.GaussianKernelBlur: gaussian_kernel_blur,
    ops.Solarise: solarise,
    ops.Equalize: equalize,
    ops.Affine: affine,
    ops.Noise: noise,
}


def finish(crops: np.ndarray, ops: tuple[Op, ...], tables: tuple[np.ndarray, ...], pixels: Pixels) -> np.ndarray:
    """Crops to what the network receives.

    crops    uint8 [M, S, S, C]
    tables   one float32 [M, len(op.columns)] for each op
    returns  float32 [M, S, S, C]: (value - mean) / std
    """
    out = np.empty(crops.shape, np.float32)
    for i, crop in enumerate(crops):
        image = crop.astype(np.float32) / np.float32(255)
        for op, table in zip(ops, tables, strict=True):
            apply, *parameters = table[i].tolist()
            if apply:
                image = LAWS[type(op)](image, *parameters)
        out[i] = (image - np.array(pixels.mean)) / np.array(pixels.std)
    return out
