"""What each op does to one pixel, as Triton functions, and the numbers by which kernels know the ops."""

from __future__ import annotations

import triton
import triton.language as tl

from loaders.plan.ops import LUMA

# what a pass does to each pixel
JITTER, TF_JITTER, HSV_NOISE, GRAYSCALE, SOLARISE, EQUALIZE, NOISE = (tl.constexpr(i) for i in range(7))

RED, GREEN, BLUE = (tl.constexpr(weight) for weight in LUMA)
TINY = tl.constexpr(1e-20)  # in place of a divisor that is 0


@triton.jit
def clip(value):
    return tl.minimum(tl.maximum(value, 0.0), 1.0)


@triton.jit
def saturation(r, g, b, factor):
    rest = (1 - factor) * (RED * r + GREEN * g + BLUE * b)
    return clip(factor * r + rest), clip(factor * g + rest), clip(factor * b + rest)


@triton.jit
def tf_saturation(r, g, b, factor):
    """S times `factor`, at most 1: every distance to V grows by the factor, until the least channel is 0."""
    value = tl.maximum(r, tl.maximum(g, b))
    chroma = value - tl.minimum(r, tl.minimum(g, b))
    growth = tl.minimum(factor, value / tl.maximum(chroma, TINY))
    return value - growth * (value - r), value - growth * (value - g), value - growth * (value - b)


@triton.jit
def hue(r, g, b, turns):
    """The hue in sixths of a turn, shifted; the value; the chroma."""
    value = tl.maximum(r, tl.maximum(g, b))
    chroma = value - tl.minimum(r, tl.minimum(g, b))
    sixths = tl.where(value == r, g - b, tl.where(value == g, b - r + 2 * chroma, r - g + 4 * chroma))
    sixths = sixths / tl.maximum(chroma, TINY) + 6 * turns
    sixths = tl.where(sixths < 0, sixths + 6, sixths)
    return tl.where(sixths >= 6, sixths - 6, sixths), value, chroma


@triton.jit
def from_hue(sixths, value, chroma):
    """Full within one sixth of the channel's own corner, none beyond two; red's corner is at 0 = 6."""
    least = value - chroma
    r = least + chroma * clip(tl.abs(sixths - 3) - 1)
    g = least + chroma * clip(2 - tl.abs(sixths - 2))
    b = least + chroma * clip(2 - tl.abs(sixths - 4))
    return r, g, b


@triton.jit
def power(x, exponent):
    """x in [0, 1], a positive exponent."""
    return tl.where(x > 0, tl.exp2(exponent * tl.log2(tl.maximum(x, TINY))), 0.0)


@triton.jit
def hsv_noise(r, g, b, row, CHANNELS: tl.constexpr):
    power_v, gain_v, offset_v = tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    if CHANNELS == 1:
        r = clip(power(r, power_v) * gain_v + offset_v)
    else:
        sixths, value, chroma = hue(r, g, b, tl.load(row + 1))
        purity = power(chroma / tl.maximum(value, TINY), tl.load(row + 2)) * tl.load(row + 3) + tl.load(row + 4)
        value = clip(power(value, power_v) * gain_v + offset_v)
        r, g, b = from_hue(sixths, value, value * clip(purity))
    return r, g, b


@triton.jit
def mix32(word):
    """`reference.mix32` on uint32."""
    word = (word ^ (word >> 16)) * 0x21F0AAAD
    word = (word ^ (word >> 15)) * 0x735A2D97
    return word ^ (word >> 15)


@triton.jit
def noisy(value, row, index):
    """Add the noise of value number `index` (uint32): `reference.noise_words`, then Box and Muller's cosine branch."""
    low = mix32(tl.load(row + 2).to(tl.uint32))
    high = mix32(tl.load(row + 3).to(tl.uint32) ^ 0x9E3779B9)
    first = mix32(mix32(2 * index + low) ^ high).to(tl.float32)
    second = mix32(mix32(2 * index + 1 + low) ^ high).to(tl.float32)
    radius = tl.sqrt(-2 * tl.log((first + 0.5) * 2.3283064365386963e-10))  # 2 ** -32
    return clip(value + tl.load(row + 1) * radius * tl.cos((second + 0.5) * 1.4629180792671596e-09))  # 2 pi / 2 ** 32


@triton.jit
def equalized(value, table, mask):
    return tl.load(table + level(value), mask, 0.0)


@triton.jit
def level(value):
    return (value * 255 + 0.5).to(tl.int32)


@triton.jit
def jitter(KIND: tl.constexpr, r, g, b, row, orders, CHANNELS: tl.constexpr, ONLY_BEFORE_CONTRAST: tl.constexpr):
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
            r, g, b = clip(r * gain + offset), clip(g * gain + offset), clip(b * gain + offset)
        elif sub_op == 1:
            factor = tl.load(row + FIRST + 1)
            mean_r, mean_g, mean_b = tl.load(row + FIRST + 4), tl.load(row + FIRST + 5), tl.load(row + FIRST + 6)
            if KIND == JITTER and CHANNELS == 3:
                mean_r = RED * mean_r + GREEN * mean_g + BLUE * mean_b
                mean_g = mean_r
                mean_b = mean_r
            r = clip(factor * r + (1 - factor) * mean_r)
            g = clip(factor * g + (1 - factor) * mean_g)
            b = clip(factor * b + (1 - factor) * mean_b)
        elif CHANNELS == 3:
            if sub_op == 2:
                factor = tl.load(row + FIRST + 2)
                if KIND == JITTER:
                    r, g, b = saturation(r, g, b, factor)
                else:
                    r, g, b = tf_saturation(r, g, b, factor)
            else:
                sixths, value, chroma = hue(r, g, b, tl.load(row + FIRST + 3))
                r, g, b = from_hue(sixths, value, chroma)
    return r, g, b


@triton.jit
def act(KIND: tl.constexpr, r, g, b, row, orders, levels, pixel, mask, CHANNELS: tl.constexpr):
    """One op that needs no other pixel."""
    if KIND == HSV_NOISE:
        r, g, b = hsv_noise(r, g, b, row, CHANNELS)
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
        r = equalized(r, levels, mask)
        if CHANNELS == 3:
            g = equalized(g, levels + 256, mask)
            b = equalized(b, levels + 512, mask)
    elif KIND == NOISE:
        index = pixel.to(tl.uint32) * CHANNELS
        r = noisy(r, row, index)
        if CHANNELS == 3:
            g = noisy(g, row, index + 1)
            b = noisy(b, row, index + 2)
    else:
        r, g, b = jitter(KIND, r, g, b, row, orders, CHANNELS, False)
    return r, g, b
