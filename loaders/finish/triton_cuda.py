"""The finish on CUDA: the laws of :mod:`loaders.finish.reference` as Triton kernels. Not yet run on a GPU: held to the
reference under Triton's interpreter, and compiled for sm_80 and sm_90.

A chain of ops is cut into stages, one launch and one pass over the pixels each. A stage samples its input (as it
stands, mirrored, turned, or as one axis of a blur), sends each pixel through the ops that need no other pixel, and
stores floats for the next stage or, from the last one, the normalised channels-last output. Ops that need to know the
whole image first (contrast its means, equalize its histogram) get it from a launch before their stage, which repeats
the stage up to them and stores nothing but that; reading bytes twice is cheaper than writing and reading floats. So a
chain without blur or contrast is one pass, contrast adds one, a blur adds two, and PAWS's chain takes four.

A blur, of either kind, is one banded matrix along x and then along y: for every image and position the weights of its
neighbours, with what happens at the edge folded in. A kernel writes them first; they are small beside the image.

An image of one channel goes through as three equal ones, of which one is stored.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from loaders.finish.reference import SUB_OP_ORDERS, box_radius
from loaders.plan.ops import (
    LUMA,
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
from loaders.plan.views import Pixels

# how a stage samples its input
PLAIN, FLIP, AFFINE, BLUR_X, BLUR_Y = (tl.constexpr(i) for i in range(5))
# what it does to each pixel
JITTER, TF_JITTER, HSV_NOISE, GRAYSCALE, SOLARISE, EQUALIZE, NOISE = (tl.constexpr(i) for i in range(7))

_SAMPLINGS: dict[type[Op], tuple[tl.constexpr, ...]] = {
    Flip: (FLIP,),
    Affine: (AFFINE,),
    GaussianBlur: (BLUR_X, BLUR_Y),
    GaussianKernelBlur: (BLUR_X, BLUR_Y),
}
_POINTWISE: dict[type[Op], tl.constexpr] = {
    ColourJitter: JITTER,
    TfColourJitter: TF_JITTER,
    HsvNoise: HSV_NOISE,
    Grayscale: GRAYSCALE,
    Solarise: SOLARISE,
    Equalize: EQUALIZE,
    Noise: NOISE,
}
_JITTERS = (ColourJitter, TfColourJitter)

_BLOCK = 1024  # pixels of a program
_RED, _GREEN, _BLUE = (tl.constexpr(weight) for weight in LUMA)
_TINY = tl.constexpr(1e-20)  # in place of a divisor that is 0


# ---- one pixel


@triton.jit
def _clip(value):
    return tl.minimum(tl.maximum(value, 0.0), 1.0)


@triton.jit
def _saturation(r, g, b, factor):
    rest = (1 - factor) * (_RED * r + _GREEN * g + _BLUE * b)
    return _clip(factor * r + rest), _clip(factor * g + rest), _clip(factor * b + rest)


@triton.jit
def _tf_saturation(r, g, b, factor):
    """S times `factor`, at most 1: every distance to V grows by the factor, until the least channel is 0."""
    value = tl.maximum(r, tl.maximum(g, b))
    chroma = value - tl.minimum(r, tl.minimum(g, b))
    growth = tl.minimum(factor, value / tl.maximum(chroma, _TINY))
    return value - growth * (value - r), value - growth * (value - g), value - growth * (value - b)


@triton.jit
def _hue(r, g, b, turns):
    """The hue in sixths of a turn, shifted; the value; the chroma."""
    value = tl.maximum(r, tl.maximum(g, b))
    chroma = value - tl.minimum(r, tl.minimum(g, b))
    sixths = tl.where(value == r, g - b, tl.where(value == g, b - r + 2 * chroma, r - g + 4 * chroma))
    sixths = sixths / tl.maximum(chroma, _TINY) + 6 * turns
    sixths = tl.where(sixths < 0, sixths + 6, sixths)
    return tl.where(sixths >= 6, sixths - 6, sixths), value, chroma


@triton.jit
def _from_hue(sixths, value, chroma):
    """Full within one sixth of the channel's own corner, none beyond two; red's corner is at 0 = 6."""
    least = value - chroma
    r = least + chroma * _clip(tl.abs(sixths - 3) - 1)
    g = least + chroma * _clip(2 - tl.abs(sixths - 2))
    b = least + chroma * _clip(2 - tl.abs(sixths - 4))
    return r, g, b


@triton.jit
def _power(x, exponent):
    """x in [0, 1], a positive exponent."""
    return tl.where(x > 0, tl.exp2(exponent * tl.log2(tl.maximum(x, _TINY))), 0.0)


@triton.jit
def _hsv_noise(r, g, b, row, CHANNELS: tl.constexpr):
    power_v, gain_v, offset_v = tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    if CHANNELS == 1:
        r = _clip(_power(r, power_v) * gain_v + offset_v)
    else:
        sixths, value, chroma = _hue(r, g, b, tl.load(row + 1))
        purity = _power(chroma / tl.maximum(value, _TINY), tl.load(row + 2)) * tl.load(row + 3) + tl.load(row + 4)
        value = _clip(_power(value, power_v) * gain_v + offset_v)
        r, g, b = _from_hue(sixths, value, value * _clip(purity))
    return r, g, b


@triton.jit
def _mix32(word):
    """`reference.mix32` on uint32."""
    word = (word ^ (word >> 16)) * 0x21F0AAAD
    word = (word ^ (word >> 15)) * 0x735A2D97
    return word ^ (word >> 15)


@triton.jit
def _noisy(value, row, index):
    """Add the noise of value number `index` (uint32): `reference.noise_words`, then Box and Muller's cosine branch."""
    low = _mix32(tl.load(row + 2).to(tl.uint32))
    high = _mix32(tl.load(row + 3).to(tl.uint32) ^ 0x9E3779B9)
    first = _mix32(_mix32(2 * index + low) ^ high).to(tl.float32)
    second = _mix32(_mix32(2 * index + 1 + low) ^ high).to(tl.float32)
    radius = tl.sqrt(-2 * tl.log((first + 0.5) * 2.3283064365386963e-10))  # 2 ** -32
    return _clip(value + tl.load(row + 1) * radius * tl.cos((second + 0.5) * 1.4629180792671596e-09))  # 2 pi / 2 ** 32


@triton.jit
def _equalized(value, table, mask):
    return tl.load(table + _level(value), mask, 0.0)


@triton.jit
def _level(value):
    return (value * 255 + 0.5).to(tl.int32)


@triton.jit
def _jitter(KIND: tl.constexpr, r, g, b, row, orders, CHANNELS: tl.constexpr, ONLY_BEFORE_CONTRAST: tl.constexpr):
    """The four sub-ops in this image's order. The means of the channels stand in `row`, after the op's own columns."""
    FIRST: tl.constexpr = 2 if KIND == JITTER else 3  # column before the contrast
    order = orders + tl.load(row + 1).to(tl.int32) * 5
    num = 4
    if ONLY_BEFORE_CONTRAST:
        num = tl.load(order + 4)
    for place in range(num):
        sub_op = tl.load(order + place)
        if sub_op == 0:
            gain = tl.load(row + 2)
            offset = 0.0
            if KIND == TF_JITTER:
                offset = tl.load(row + 3)
            r, g, b = _clip(r * gain + offset), _clip(g * gain + offset), _clip(b * gain + offset)
        elif sub_op == 1:
            factor = tl.load(row + FIRST + 1)
            mean_r, mean_g, mean_b = tl.load(row + FIRST + 4), tl.load(row + FIRST + 5), tl.load(row + FIRST + 6)
            if KIND == JITTER and CHANNELS == 3:
                mean_r = _RED * mean_r + _GREEN * mean_g + _BLUE * mean_b
                mean_g = mean_r
                mean_b = mean_r
            r = _clip(factor * r + (1 - factor) * mean_r)
            g = _clip(factor * g + (1 - factor) * mean_g)
            b = _clip(factor * b + (1 - factor) * mean_b)
        elif CHANNELS == 3:
            if sub_op == 2:
                factor = tl.load(row + FIRST + 2)
                if KIND == JITTER:
                    r, g, b = _saturation(r, g, b, factor)
                else:
                    r, g, b = _tf_saturation(r, g, b, factor)
            else:
                sixths, value, chroma = _hue(r, g, b, tl.load(row + FIRST + 3))
                r, g, b = _from_hue(sixths, value, chroma)
    return r, g, b


@triton.jit
def _act(KIND: tl.constexpr, r, g, b, row, orders, levels, pixel, mask, CHANNELS: tl.constexpr):
    """One op that needs no other pixel."""
    if KIND == HSV_NOISE:
        r, g, b = _hsv_noise(r, g, b, row, CHANNELS)
    elif KIND == GRAYSCALE:
        if CHANNELS == 3:
            r = tl.load(row + 1) * r + tl.load(row + 2) * g + tl.load(row + 3) * b
            g = r
            b = r
    elif KIND == SOLARISE:
        threshold = tl.load(row + 1)
        r = tl.where(r >= threshold, 1 - r, r)
        g = tl.where(g >= threshold, 1 - g, g)
        b = tl.where(b >= threshold, 1 - b, b)
    elif KIND == EQUALIZE:
        r = _equalized(r, levels, mask)
        if CHANNELS == 3:
            g = _equalized(g, levels + 256, mask)
            b = _equalized(b, levels + 512, mask)
    elif KIND == NOISE:
        index = pixel.to(tl.uint32) * CHANNELS
        r = _noisy(r, row, index)
        if CHANNELS == 3:
            g = _noisy(g, row, index + 1)
            b = _noisy(b, row, index + 2)
    else:
        r, g, b = _jitter(KIND, r, g, b, row, orders, CHANNELS, False)
    return r, g, b


# ---- a stage


@triton.jit
def _fetch(source, image, pixel, mask, SIZE: tl.constexpr, CHANNELS: tl.constexpr):
    """Pixels of an image in [0, 1]: from crops uint8 [M, S, S, C], or from a stage before, float32 [M, C, S, S]."""
    start = source + image.to(tl.int64) * (SIZE * SIZE * CHANNELS)
    if source.dtype.element_ty == tl.uint8:
        r = tl.load(start + pixel * CHANNELS, mask, 0).to(tl.float32) / 255
        g = r
        b = r
        if CHANNELS == 3:
            g = tl.load(start + pixel * CHANNELS + 1, mask, 0).to(tl.float32) / 255
            b = tl.load(start + pixel * CHANNELS + 2, mask, 0).to(tl.float32) / 255
    else:
        r = tl.load(start + pixel, mask, 0.0)
        g = r
        b = r
        if CHANNELS == 3:
            g = tl.load(start + SIZE * SIZE + pixel, mask, 0.0)
            b = tl.load(start + 2 * SIZE * SIZE + pixel, mask, 0.0)
    return r, g, b


@triton.jit
def _turned(source, image, pixel, mask, row, SIZE: tl.constexpr, CHANNELS: tl.constexpr):
    """`reference.affine`; an image to which it does not apply is turned by nothing."""
    apply = tl.load(row) != 0
    angle = tl.where(apply, tl.load(row + 1), 0.0)
    scale = tl.where(apply, tl.load(row + 2), 1.0)
    right = (pixel % SIZE) - (SIZE - 1) / 2 - tl.where(apply, tl.load(row + 3), 0.0) * SIZE
    down = (pixel // SIZE) - (SIZE - 1) / 2 - tl.where(apply, tl.load(row + 4), 0.0) * SIZE
    cos, sin = tl.cos(angle) / scale, tl.sin(angle) / scale
    x = tl.minimum(tl.maximum((SIZE - 1) / 2 + cos * right - sin * down, 0.0), SIZE - 1.0)
    y = tl.minimum(tl.maximum((SIZE - 1) / 2 + sin * right + cos * down, 0.0), SIZE - 1.0)
    x0, y0 = x.to(tl.int32), y.to(tl.int32)
    x1, y1 = tl.minimum(x0 + 1, SIZE - 1), tl.minimum(y0 + 1, SIZE - 1)
    share_x, share_y = x - x0, y - y0
    r, g, b = _fetch(source, image, y0 * SIZE + x0, mask, SIZE, CHANNELS)
    r1, g1, b1 = _fetch(source, image, y0 * SIZE + x1, mask, SIZE, CHANNELS)
    r, g, b = r + share_x * (r1 - r), g + share_x * (g1 - g), b + share_x * (b1 - b)
    r1, g1, b1 = _fetch(source, image, y1 * SIZE + x0, mask, SIZE, CHANNELS)
    r2, g2, b2 = _fetch(source, image, y1 * SIZE + x1, mask, SIZE, CHANNELS)
    r1, g1, b1 = r1 + share_x * (r2 - r1), g1 + share_x * (g2 - g1), b1 + share_x * (b2 - b1)
    return r + share_y * (r1 - r), g + share_y * (g1 - g), b + share_y * (b1 - b)


@triton.jit
def _blurred(source, image, pixel, mask, weights, along, STEP: tl.constexpr, taps, REACH: tl.constexpr,
             SIZE: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """The sum over the pixels `STEP` apart, from `REACH` before to `REACH` after; `along`: the places on that axis."""
    r = tl.zeros(pixel.shape, tl.float32)
    g = tl.zeros(pixel.shape, tl.float32)
    b = tl.zeros(pixel.shape, tl.float32)
    start = weights + image.to(tl.int64) * ((2 * REACH + 1) * SIZE) + along
    for tap in range(taps):
        offset = tap - REACH
        inside = mask & (along + offset >= 0) & (along + offset < SIZE)
        weight = tl.load(start + tap * SIZE, mask, 0.0)
        r1, g1, b1 = _fetch(source, image, pixel + offset * STEP, inside, SIZE, CHANNELS)
        r, g, b = r + weight * r1, g + weight * g1, b + weight * b1
    return r, g, b


@triton.jit
def _sample(source, unblurred, image, pixel, mask, row, weights, SAMPLING: tl.constexpr, REACH: tl.constexpr,
            SIZE: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """Where a stage begins. Blurred along y, images that are not to be blurred come from before the blur along x."""
    if SAMPLING == PLAIN:
        r, g, b = _fetch(source, image, pixel, mask, SIZE, CHANNELS)
    elif SAMPLING == FLIP:
        mirrored = pixel + SIZE - 1 - 2 * (pixel % SIZE)
        r, g, b = _fetch(source, image, tl.where(tl.load(row) != 0, mirrored, pixel), mask, SIZE, CHANNELS)
    elif SAMPLING == AFFINE:
        r, g, b = _turned(source, image, pixel, mask, row, SIZE, CHANNELS)
    else:
        taps = tl.where(tl.load(row) != 0, 2 * REACH + 1, 0)
        if SAMPLING == BLUR_X:
            r, g, b = _blurred(source, image, pixel, mask, weights, pixel % SIZE, 1, taps, REACH, SIZE, CHANNELS)
        else:
            r, g, b = _blurred(source, image, pixel, mask, weights, pixel // SIZE, SIZE, taps, REACH, SIZE, CHANNELS)
            if taps == 0:
                r, g, b = _fetch(unblurred, image, pixel, mask, SIZE, CHANNELS)
    return r, g, b


@triton.jit
def _through(source, unblurred, image, pixel, mask, table, weights, orders, levels, COLUMNS: tl.constexpr,
             TABLES: tl.constexpr, SAMPLING: tl.constexpr, COLUMN: tl.constexpr, REACH: tl.constexpr,
             CHAIN: tl.constexpr, SIZE: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """Sample, then every op of the chain that applies to this image."""
    row = table + image.to(tl.int64) * COLUMNS
    start = levels + image.to(tl.int64) * (TABLES * CHANNELS * 256)
    r, g, b = _sample(
        source, unblurred, image, pixel, mask, row + COLUMN, weights, SAMPLING, REACH, SIZE, CHANNELS
    )  # fmt: skip
    for k in tl.static_range(len(CHAIN)):
        if tl.load(row + CHAIN[k][1]) != 0:
            r, g, b = _act(
                CHAIN[k][0], r, g, b, row + CHAIN[k][1], orders, start + CHAIN[k][2] * CHANNELS * 256, pixel, mask,
                CHANNELS,
            )  # fmt: skip
    return r, g, b


@triton.jit
def _stage_kernel(source, unblurred, table, weights, orders, levels, out, COLUMNS: tl.constexpr, TABLES: tl.constexpr,
                  SAMPLING: tl.constexpr, COLUMN: tl.constexpr, REACH: tl.constexpr, CHAIN: tl.constexpr,
                  NORMALISE: tl.constexpr, SIZE: tl.constexpr, CHANNELS: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """One block of pixels of one image. NORMALISE: (gain, bias) of each channel in the last stage, else None."""
    image = tl.program_id(0)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < SIZE * SIZE
    if SAMPLING == BLUR_X:  # images that are not to be blurred are left out
        mask = pixel < tl.where(tl.load(table + image.to(tl.int64) * COLUMNS + COLUMN) != 0, SIZE * SIZE, 0)
    r, g, b = _through(source, unblurred, image, pixel, mask, table, weights, orders, levels, COLUMNS, TABLES,
                       SAMPLING, COLUMN, REACH, CHAIN, SIZE, CHANNELS)  # fmt: skip
    start = out + image.to(tl.int64) * (SIZE * SIZE * CHANNELS)
    if NORMALISE is not None:
        tl.store(start + pixel * CHANNELS, r * NORMALISE[0][0] + NORMALISE[0][1], mask)
        if CHANNELS == 3:
            tl.store(start + pixel * CHANNELS + 1, g * NORMALISE[1][0] + NORMALISE[1][1], mask)
            tl.store(start + pixel * CHANNELS + 2, b * NORMALISE[2][0] + NORMALISE[2][1], mask)
    else:
        tl.store(start + pixel, r, mask)
        if CHANNELS == 3:
            tl.store(start + SIZE * SIZE + pixel, g, mask)
            tl.store(start + 2 * SIZE * SIZE + pixel, b, mask)


# ---- what an op must know of the whole image


@triton.jit
def _means_kernel(source, unblurred, table, weights, orders, levels, COLUMNS: tl.constexpr, TABLES: tl.constexpr,
                  SAMPLING: tl.constexpr, COLUMN: tl.constexpr, REACH: tl.constexpr, CHAIN: tl.constexpr,
                  KIND: tl.constexpr, AT: tl.constexpr, MEANS: tl.constexpr, SIZE: tl.constexpr,
                  CHANNELS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The channel means of one image just before the contrast of the jitter in column AT, into column MEANS."""
    image = tl.program_id(0)
    row = table + image.to(tl.int64) * COLUMNS
    sum_r = tl.zeros((BLOCK,), tl.float32)
    sum_g = tl.zeros((BLOCK,), tl.float32)
    sum_b = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, tl.where(tl.load(row + AT) != 0, SIZE * SIZE, 0), BLOCK):
        pixel = first + tl.arange(0, BLOCK)
        mask = pixel < SIZE * SIZE
        r, g, b = _through(source, unblurred, image, pixel, mask, table, weights, orders, levels, COLUMNS, TABLES,
                           SAMPLING, COLUMN, REACH, CHAIN, SIZE, CHANNELS)  # fmt: skip
        r, g, b = _jitter(KIND, r, g, b, row + AT, orders, CHANNELS, True)
        sum_r += tl.where(mask, r, 0.0)
        sum_g += tl.where(mask, g, 0.0)
        sum_b += tl.where(mask, b, 0.0)
    tl.store(row + MEANS, tl.sum(sum_r) / (SIZE * SIZE))
    tl.store(row + MEANS + 1, tl.sum(sum_g) / (SIZE * SIZE))
    tl.store(row + MEANS + 2, tl.sum(sum_b) / (SIZE * SIZE))


@triton.jit
def _equalizing_table(counts, out, NUM: tl.constexpr):
    """Pillow's table of ImageOps.equalize from the counts of the 256 levels, as values in [0, 1]."""
    level = tl.arange(0, 256)
    highest = tl.max(tl.where(counts > 0, level, 0))
    step = (NUM - tl.sum(tl.where(level == highest, counts, 0))) // 255
    below = tl.cumsum(counts, 0) - counts
    spread = tl.minimum((below + step // 2) // tl.maximum(step, 1), 255)
    tl.store(out + level, tl.where(step > 0, spread, level) / 255)


@triton.jit
def _levels_kernel(source, unblurred, table, weights, orders, levels, COLUMNS: tl.constexpr, TABLES: tl.constexpr,
                   SAMPLING: tl.constexpr, COLUMN: tl.constexpr, REACH: tl.constexpr, CHAIN: tl.constexpr,
                   AT: tl.constexpr, TABLE: tl.constexpr, SIZE: tl.constexpr, CHANNELS: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    """The tables of one image for the equalize in column AT, number TABLE of `levels` [M, TABLES, C, 256]."""
    image = tl.program_id(0)
    count_r = tl.zeros((256,), tl.int32)
    count_g = tl.zeros((256,), tl.int32)
    count_b = tl.zeros((256,), tl.int32)
    applies = tl.load(table + image.to(tl.int64) * COLUMNS + AT) != 0
    for first in range(0, tl.where(applies, SIZE * SIZE, 0), BLOCK):
        pixel = first + tl.arange(0, BLOCK)
        mask = pixel < SIZE * SIZE
        r, g, b = _through(source, unblurred, image, pixel, mask, table, weights, orders, levels, COLUMNS, TABLES,
                           SAMPLING, COLUMN, REACH, CHAIN, SIZE, CHANNELS)  # fmt: skip
        count_r += tl.histogram(_level(r), 256, mask)
        if CHANNELS == 3:
            count_g += tl.histogram(_level(g), 256, mask)
            count_b += tl.histogram(_level(b), 256, mask)
    start = levels + (image.to(tl.int64) * TABLES + TABLE) * (CHANNELS * 256)
    _equalizing_table(count_r, start, SIZE * SIZE)
    if CHANNELS == 3:
        _equalizing_table(count_g, start + 256, SIZE * SIZE)
        _equalizing_table(count_b, start + 512, SIZE * SIZE)


# ---- weights of a blur


@triton.jit
def _tap_weight(offset, whole, alpha):
    """Of an extended box: 1 within `whole`, `alpha` one further."""
    distance = tl.abs(offset)
    return tl.where(distance <= whole, 1.0, tl.where(distance == whole + 1, alpha, 0.0))


@triton.jit
def _beyond(distance, whole, alpha):
    """The sum of an extended box's weights that lie beyond an edge pixel `distance` pixels away."""
    return tl.where(distance <= whole, whole - distance + alpha, 0.0)


@triton.jit
def _box_weights_kernel(table, weights, COLUMNS: tl.constexpr, COLUMN: tl.constexpr, REACH: tl.constexpr,
                        SIZE: tl.constexpr, TAPS_BLOCK: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Three extended box blurs, edge pixels repeated in each, as one matrix: weights [M, 2 * REACH + 1, S], where [m,
    REACH + d, i] is the weight of pixel i + d in pixel i. See `reference.box_radius`."""
    image = tl.program_id(0)
    row = table + image.to(tl.int64) * COLUMNS + COLUMN
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    tap = tl.arange(0, TAPS_BLOCK)[None, :]
    target = i + tap - REACH
    sigma = tl.load(row + 1)
    variance = sigma * sigma / 3
    whole = ((tl.sqrt(12 * variance + 1) - 1) / 2).to(tl.int32)
    edge = (whole + 1) * (whole + 1)
    alpha = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - edge))
    total = tl.zeros((BLOCK, TAPS_BLOCK), tl.float32)
    reach = tl.where(tl.load(row) != 0, whole + 1, -1)  # no weights where it does not apply
    for third in range(-reach, reach + 1):
        at_second = tl.minimum(tl.maximum(i + third, 0), SIZE - 1)
        for second in range(-reach, reach + 1):
            at_first = tl.minimum(tl.maximum(at_second + second, 0), SIZE - 1)
            weight = _tap_weight(target - at_first, whole, alpha)
            weight += tl.where(target == 0, _beyond(at_first, whole, alpha), 0.0)
            weight += tl.where(target == SIZE - 1, _beyond(SIZE - 1 - at_first, whole, alpha), 0.0)
            total += _tap_weight(third, whole, alpha) * _tap_weight(second, whole, alpha) * weight
    width = 2 * (whole + alpha) + 1
    out = weights + (image.to(tl.int64) * (2 * REACH + 1) + tap) * SIZE + i
    tl.store(out, total / (width * width * width), (i < SIZE) & (tap <= 2 * REACH))


@triton.jit
def _gaussian_weights_kernel(table, weights, COLUMNS: tl.constexpr, COLUMN: tl.constexpr, REACH: tl.constexpr,
                             SIZE: tl.constexpr, TAPS_BLOCK: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A normalised Gaussian, the same everywhere: beyond the edge are zeros. Layout as in `_box_weights_kernel`."""
    image = tl.program_id(0)
    sigma = tl.load(table + image.to(tl.int64) * COLUMNS + COLUMN + 1)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    tap = tl.arange(0, TAPS_BLOCK)[None, :]
    distance = (tap - REACH) / sigma
    weight = tl.where(tap <= 2 * REACH, tl.exp(-0.5 * distance * distance), 0.0)
    weight = weight / tl.sum(weight)
    out = weights + (image.to(tl.int64) * (2 * REACH + 1) + tap) * SIZE + i
    tl.store(out, weight + tl.zeros((BLOCK, 1), tl.float32), (i < SIZE) & (tap <= 2 * REACH))


# ---- the launches


@dataclass
class _Stage:
    """Op number `sampler` samples as `sampling` says, then the ops numbered `chain` act."""

    sampling: int = PLAIN.value
    sampler: int = 0
    chain: list[int] = field(default_factory=list)


def stages_of(ops: tuple[Op, ...]) -> list[_Stage]:
    """The chain cut into passes over the pixels."""
    stages = [_Stage()]
    for k, op in enumerate(ops):
        if type(op) in _POINTWISE:
            stages[-1].chain.append(k)
        else:
            stages += [_Stage(sampling.value, k) for sampling in _SAMPLINGS[type(op)]]
    first_is_idle = len(stages) > 1 and not stages[0].chain
    return stages[first_is_idle:]


def finish(
    crops: Tensor, ops: tuple[Op, ...], tables: tuple[np.ndarray, ...], pixels: Pixels, out: Tensor
) -> None:  # fmt: skip
    """Crops to what the network receives, written into `out`: queued on the current stream, nothing waits.

    crops    uint8 [M, S, S, C] on a CUDA device, C = 1 or 3, contiguous
    tables   one float32 [M, len(op.columns)] for each op, on the host
    out      float32, float16 or bfloat16 [M, S, S, C] on the same device, contiguous: (value - mean) / std
    """
    num_images, size, width, channels = crops.shape
    assert size == width and channels in (1, 3) and out.shape == crops.shape
    assert crops.is_contiguous() and out.is_contiguous() and crops.dtype == torch.uint8
    if num_images:
        _Call(crops, ops, tables).run(pixels, out)


class _Call:
    """One call of `finish`: what its launches share."""

    def __init__(self, crops: Tensor, ops: tuple[Op, ...], tables: tuple[np.ndarray, ...]):
        self.crops, self.ops = crops, ops
        self.num_images, self.size, _, self.channels = crops.shape
        num_equalizes = sum(isinstance(op, Equalize) for op in ops)
        self.levels = self._floats(max(1, num_equalizes), self.channels, 256)
        # the columns of all ops side by side, each jitter's followed by room for its means
        widths = [table.shape[1] + 3 * isinstance(op, _JITTERS) for op, table in zip(ops, tables, strict=True)]
        self.columns = np.cumsum([0, *widths]).tolist()
        joined = np.zeros((self.num_images, max(1, self.columns[-1])), np.float32)
        for first, table in zip(self.columns, tables, strict=False):
            joined[:, first : first + table.shape[1]] = table
        self.table = self._to_device(torch.from_numpy(joined))

    def run(self, pixels: Pixels, out: Tensor) -> None:
        source = unblurred = self.crops
        weights = self.table  # stands for none: read by blurs only
        stages = stages_of(self.ops)
        for stage in stages:
            if stage.sampling == BLUR_X.value:
                unblurred, weights = source, self._blur_weights(stage.sampler)
            arguments = (source, unblurred, self.table, weights, _orders(self.crops.device), self.levels)
            for place, k in enumerate(stage.chain):
                if isinstance(self.ops[k], _JITTERS):
                    means = self.columns[k + 1] - 3
                    kind = _POINTWISE[type(self.ops[k])].value
                    _means_kernel[(self.num_images,)](
                        *arguments, **self._constants(stage, place), KIND=kind, AT=self.columns[k], MEANS=means
                    )
                elif isinstance(self.ops[k], Equalize):
                    _levels_kernel[(self.num_images,)](
                        *arguments, **self._constants(stage, place), AT=self.columns[k], TABLE=self._table_of(k)
                    )
            last = stage is stages[-1]
            source = out if last else self._floats(self.channels, self.size, self.size)
            constants = self._constants(stage, len(stage.chain))
            _stage_kernel[(self.num_images, triton.cdiv(self.size**2, constants["BLOCK"]))](
                *arguments, source, **constants, NORMALISE=_gains(pixels, self.channels) if last else None
            )

    def _constants(self, stage: _Stage, num_ops: int) -> dict[str, Any]:
        """What kernels are compiled for: the stage up to `num_ops` of its pointwise ops."""
        kinds = [(_POINTWISE[type(self.ops[k])].value, self.columns[k], self._table_of(k)) for k in stage.chain]
        blurs = stage.sampling in (BLUR_X.value, BLUR_Y.value)
        return {
            "COLUMNS": self.table.shape[1],
            "TABLES": self.levels.shape[1],
            "SAMPLING": stage.sampling,
            "COLUMN": self.columns[stage.sampler],
            "REACH": _reach(self.ops[stage.sampler]) if blurs else 0,
            "CHAIN": tuple(kinds[:num_ops]),
            "SIZE": self.size,
            "CHANNELS": self.channels,
            "BLOCK": min(_BLOCK, triton.next_power_of_2(self.size**2)),
        }

    def _table_of(self, k: int) -> int:
        """Which of `levels` is op k's, if it is an equalize."""
        return sum(isinstance(op, Equalize) for op in self.ops[:k])

    def _blur_weights(self, k: int) -> Tensor:
        """float32 [M, 2 * reach + 1, S], see `_box_weights_kernel`."""
        op, reach = self.ops[k], _reach(self.ops[k])
        weights = self._floats(2 * reach + 1, self.size)
        taps_block = triton.next_power_of_2(2 * reach + 1)
        block = max(1, min(_BLOCK // taps_block, triton.next_power_of_2(self.size)))
        kernel = _gaussian_weights_kernel if isinstance(op, GaussianKernelBlur) else _box_weights_kernel
        kernel[(self.num_images, triton.cdiv(self.size, block))](
            self.table, weights, COLUMNS=self.table.shape[1], COLUMN=self.columns[k], REACH=reach, SIZE=self.size,
            TAPS_BLOCK=taps_block, BLOCK=block,
        )  # fmt: skip
        return weights

    def _floats(self, *shape: int) -> Tensor:
        return torch.empty((self.num_images, *shape), device=self.crops.device)

    def _to_device(self, values: Tensor) -> Tensor:
        return values.pin_memory().to(self.crops.device, non_blocking=True) if self.crops.is_cuda else values


def _reach(op: Op) -> int:
    """How far, in pixels, the blur of any image may look."""
    if isinstance(op, GaussianKernelBlur):
        return op.taps // 2
    assert isinstance(op, GaussianBlur)
    return 3 * (math.floor(box_radius(op.sigma[1])) + 1)


def _gains(pixels: Pixels, channels: int) -> tuple[tuple[float, float], ...]:
    """(gain, bias) of each channel."""
    mean, std = (np.broadcast_to(np.array(v), channels).tolist() for v in (pixels.mean, pixels.std))
    return tuple((1 / s, -m / s) for m, s in zip(mean, std, strict=True))


@functools.cache
def _orders(device: torch.device) -> Tensor:
    """int32 [24, 5]: the sub-ops of each order of a jitter, then the place of its contrast."""
    orders = SUB_OP_ORDERS.tolist()
    return torch.tensor([[*order, order.index(1)] for order in orders], dtype=torch.int32, device=device)
