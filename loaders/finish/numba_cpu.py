"""The fast finish on CPU: the laws of :mod:`loaders.finish.reference`, compiled.

An image is unpacked into planar float32 [C, S, S], small enough for a core's own cache, goes through its ops in place
and is normalised and stored channels-last on the way out. Each op is a C function that is compiled (and cached on
disk) when a chain first names it, so a run that never jitters colours does not wait for that code; one compiled
driver walks the images and calls the ops by address. A task of many images is thus one Python call, made without the
GIL. Threads are the caller's: numba's own pool aborts when two threads use it at once.

The disk cache notices edits of this file only: what it takes from `reference` (orders, luma, hash) is compiled in.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic, register_jitable

from loaders.finish.reference import SUB_OP_ORDERS, noise_words
from loaders.plan import ops
from loaders.plan.ops import LUMA, Op
from loaders.plan.views import Pixels

_intrinsic: Any = intrinsic  # as typed, it would want the typing context of whoever calls

VALUES_PER_BAND = 6144  # what is worked on at a time: 24 kB, of a first-level cache of 32 kB or more
LANES = 1024  # partial sums of a mean
WINDOW_BANDS = 2  # that come in before a blur's window moves
VALUES_PER_TASK = 2**20  # about 1 ms of jitter and blur: long beside a thread's wake-up, short beside a batch

# What an op gets: planes float32 [channels, size, size]; as many values, and a plane and 1024 a channel more, that it
# alone uses between its two functions; its row of parameters (`apply` first); channels, size; the rows top..bottom.
_SIGNATURE = types.intp(*[types.CPointer(types.float32)] * 3, *[types.intp] * 4)
# Of fastmath only what rounds nothing differently. With contraction and reassociation an op gave other bits when it was
# just compiled than when it came from the disk cache, and a run that continues must be bitwise the one that began.
_OPTIONS: dict[str, Any] = {"cache": True, "fastmath": {"nnan", "ninf", "nsz"}, "error_model": "numpy"}

ZERO, ONE, TWO, SIX, BYTE = np.float32(0), np.float32(1), np.float32(2), np.float32(6), np.float32(255)
HALF, SQRT_2, LN_2 = np.float32(0.5), np.float32(2**0.5), np.float32(math.log(2))
LOG_1, LOG_3, LOG_5, LOG_7 = (np.float32(2 / math.log(2) / n) for n in (1, 3, 5, 7))  # series of artanh, of exp:
EXP_2, EXP_3, EXP_4, EXP_5, EXP_6 = (np.float32(1 / math.factorial(n)) for n in (2, 3, 4, 5, 6))
BIAS, MANTISSA_BITS, MANTISSA = np.int32(127), np.int32(23), np.int32(0x7FFFFF)  # of a float32
TINY = np.float32(1e-20)  # in place of a divisor that is 0
RED, GREEN, BLUE = (np.float32(weight) for weight in LUMA)


@njit(**_OPTIONS)
def _clip(value: Any) -> Any:
    return min(max(value, ZERO), ONE)


@_intrinsic
def _fma(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once: one instruction, and the same bits whoever compiles it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@njit(**_OPTIONS)
def _add_luma(red: Any, green: Any, blue: Any, lanes: Any) -> None:
    """Add the luma of every pixel, or of a lone plane (`green` is empty) its values, to one of the lanes: a sum in
    vector code whose order is spelt out."""
    for start in range(0, len(red), LANES):
        r, g, b = red[start : start + LANES], green[start : start + LANES], blue[start : start + LANES]
        if len(green) == 0:
            for i in range(len(r)):
                lanes[i] += r[i]
        else:
            for i in range(len(r)):
                lanes[i] += _fma(RED, r[i], _fma(GREEN, g[i], BLUE * b[i]))


@njit(**_OPTIONS)
def _total(lanes: Any) -> Any:
    total = 0.0
    for value in lanes:
        total += value
    return total


@njit(**_OPTIONS)
def _scale(values: Any, factor: Any, offset: Any) -> None:
    for i in range(len(values)):
        values[i] = _clip(_fma(factor, values[i], offset))


@njit(**_OPTIONS)
def _saturation(red: Any, green: Any, blue: Any, factor: Any) -> None:
    rest = ONE - factor
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        offset = rest * _fma(RED, r, _fma(GREEN, g, BLUE * b))
        red[i] = _clip(_fma(factor, r, offset))
        green[i] = _clip(_fma(factor, g, offset))
        blue[i] = _clip(_fma(factor, b, offset))


@njit(**_OPTIONS)
def _tf_saturation(red: Any, green: Any, blue: Any, factor: Any) -> None:
    """S times `factor`, at most 1: every distance to V grows by the factor, until the least channel is 0."""
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        value = max(r, max(g, b))
        chroma = value - min(r, min(g, b))
        growth = min(factor, value / max(chroma, TINY))
        red[i] = _fma(growth, r - value, value)
        green[i] = _fma(growth, g - value, value)
        blue[i] = _fma(growth, b - value, value)


@njit(**_OPTIONS)
def _hue(red: Any, green: Any, blue: Any, turns: Any) -> None:
    """Hue angles are kept in units of the pixel's chroma (a sixth of a turn is `chroma`), from -3 to 3 around red: no
    division, no branch. Whole thirds of a turn exchange the channels; at most one sixth is left, after which red is
    never nearer around the other side."""
    thirds = np.floor(np.float32(3) * turns + HALF)
    sixths = SIX * turns - TWO * thirds
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        value, least = max(r, max(g, b)), min(r, min(g, b))
        chroma = value - least
        twice, thrice, sixth = TWO * chroma, np.float32(3) * chroma, chroma - least
        angle = g - b if value == r else (b - r + twice if value == g else r - g - twice)
        angle = _fma(sixths, chroma, angle)
        # distance to a channel's own corner: full within one sixth, none beyond two
        red[i] = min(max(twice + least - abs(angle), least), value)
        green[i] = min(max(abs(abs(angle - twice) - thrice) - sixth, least), value)
        blue[i] = min(max(abs(abs(angle + twice) - thrice) - sixth, least), value)
    for _ in range(int(thirds) % 3):
        for i in range(len(red)):
            r, g, b = red[i], green[i], blue[i]
            red[i], green[i], blue[i] = b, r, g


@register_jitable
def _scratch_values(channels: Any, size: Any) -> Any:
    return (channels + 1) * size * size + channels * LANES


@njit(**_OPTIONS)
def _rows(image: Any, size: Any, plane: Any, top: Any, bottom: Any) -> Any:
    """Rows top..bottom of a plane of `image`, flat; nothing where there is no such plane."""
    return image[(plane * size + top) * size : (plane * size + bottom) * size]


def _flip(planes: Any, scratch: Any, row: Any, channels: Any, size: Any, top: Any, bottom: Any) -> Any:
    lines, line = carray(planes, (channels * size, size)), carray(scratch, size)
    for c in range(channels):
        for y in range(c * size + top, c * size + bottom):
            for x in range(size):
                line[x] = lines[y, x]
            for x in range(size):
                lines[y, x] = line[np.uint64(size - 1 - x)]  # unsigned: a signed index that may be negative is slow
    return 0


@njit(**_OPTIONS)
def _jitter_rows(red: Any, green: Any, blue: Any, sub_op: Any, brightness: Any, saturation: Any, hue: Any) -> None:
    """A sub-op that looks at one pixel at a time; a lone plane has no colours to change."""
    if sub_op == 0:
        _scale(red, brightness, ZERO)
        _scale(green, brightness, ZERO)
        _scale(blue, brightness, ZERO)
    elif len(green) > 0 and sub_op == 2:
        _saturation(red, green, blue, saturation)
    elif len(green) > 0:
        _hue(red, green, blue, hue)


def _jitter_to_mean(planes: Any, scratch: Any, row: Any, channels: Any, size: Any, top: Any, bottom: Any) -> Any:
    """The sub-ops before contrast, and the mean luma that contrast needs, which is left in `scratch`."""
    image, lanes = carray(planes, channels * size * size), carray(scratch, LANES)
    apply, order, brightness, contrast, saturation, hue = carray(row, 6)
    r, g, b = _rows(image, size, 0, top, bottom), _rows(image, size, 1, top, bottom), _rows(image, size, 2, top, bottom)
    for sub_op in SUB_OP_ORDERS[int(order)]:
        if sub_op == 1:
            break
        _jitter_rows(r, g, b, sub_op, brightness, saturation, hue)
    if top == 0:
        lanes[:] = ZERO
    _add_luma(r, g, b, lanes)
    if bottom == size:
        lanes[0] = _total(lanes) / (size * size)
    return 0


def _jitter_from_contrast(planes: Any, scratch: Any, row: Any, channels: Any, size: Any, top: Any, bottom: Any) -> Any:
    image, mean = carray(planes, channels * size * size), carray(scratch, 1)[0]
    apply, order, brightness, contrast, saturation, hue = carray(row, 6)
    r, g, b = _rows(image, size, 0, top, bottom), _rows(image, size, 1, top, bottom), _rows(image, size, 2, top, bottom)
    before = True
    for sub_op in SUB_OP_ORDERS[int(order)]:
        if sub_op == 1:
            before = False
            _scale(r, contrast, (ONE - contrast) * mean)
            _scale(g, contrast, (ONE - contrast) * mean)
            _scale(b, contrast, (ONE - contrast) * mean)
        elif not before:
            _jitter_rows(r, g, b, sub_op, brightness, saturation, hue)
    return 0


@njit(**_OPTIONS)
def _tf_jitter_rows(red: Any, green: Any, blue: Any, sub_op: Any, gain: Any, offset: Any, saturation: Any,
                    hue: Any) -> None:  # fmt: skip
    if sub_op == 0:
        _scale(red, gain, offset)
        _scale(green, gain, offset)
        _scale(blue, gain, offset)
    elif len(green) > 0 and sub_op == 2:
        _tf_saturation(red, green, blue, saturation)
    elif len(green) > 0:
        _hue(red, green, blue, hue)


def _tf_jitter_to_means(planes: Any, scratch: Any, row: Any, channels: Any, size: Any, top: Any, bottom: Any) -> Any:
    """The sub-ops before contrast, and each channel's mean."""
    image, lanes = carray(planes, channels * size * size), carray(scratch, (channels, LANES))
    apply, order, gain, offset, contrast, saturation, hue = carray(row, 7)
    r, g, b = _rows(image, size, 0, top, bottom), _rows(image, size, 1, top, bottom), _rows(image, size, 2, top, bottom)
    for sub_op in SUB_OP_ORDERS[int(order)]:
        if sub_op == 1:
            break
        _tf_jitter_rows(r, g, b, sub_op, gain, offset, saturation, hue)
    for c in range(channels):
        if top == 0:
            lanes[c, :] = ZERO
        _add_luma(_rows(image, size, c, top, bottom), r[:0], r[:0], lanes[c])
        if bottom == size:
            lanes[c, 0] = _total(lanes[c]) / (size * size)
    return 0


def _tf_jitter_from_contrast(
    planes: Any, scratch: Any, row: Any, channels: Any, size: Any, top: Any, bottom: Any
) -> Any:
    image, lanes = carray(planes, channels * size * size), carray(scratch, (channels, LANES))
    apply, order, gain, offset, contrast, saturation, hue = carray(row, 7)
    r, g, b = _rows(image, size, 0, top, bottom), _rows(image, size, 1, top, bottom), _rows(image, size, 2, top, bottom)
    before = True
    for sub_op in SUB_OP_ORDERS[int(order)]:
        if sub_op == 1:
            before = False
            for c in range(channels):
                _scale(_rows(image, size, c, top, bottom), contrast, (ONE - contrast) * lanes[c, 0])
        elif not before:
            _tf_jitter_rows(r, g, b, sub_op, gain, offset, saturation, hue)
    return 0


@njit(**_OPTIONS)
def _power(x: Any, exponent: Any) -> Any:
    """x ** exponent for x in [0, 1] and a positive exponent, to 1e-6: 2 ** (exponent * log2(x)) as series, which LLVM
    turns into vector code (ten times faster) as it cannot a call of the C library's powf. 32-bit integers throughout,
    as 64-bit ones would keep the loop scalar."""
    bits = np.float32(max(x, TINY)).view(np.int32)
    mantissa = np.int32((bits & MANTISSA) | BIAS << MANTISSA_BITS).view(np.float32)  # in [1, 2)
    t = (mantissa - SQRT_2) / (mantissa + SQRT_2)  # log2(m) = 1 / 2 + 2 / ln 2 * artanh(t)
    square = t * t
    log2_mantissa = HALF + t * (LOG_1 + square * (LOG_3 + square * (LOG_5 + square * LOG_7)))
    y = max(exponent * (np.float32(np.int32(bits >> MANTISSA_BITS) - BIAS) + log2_mantissa), np.float32(-126))
    whole = np.int32(y - HALF)  # the nearest, as y is not positive
    f = (y - np.float32(whole)) * LN_2
    power = ONE + f * (ONE + f * (EXP_2 + f * (EXP_3 + f * (EXP_4 + f * (EXP_5 + f * EXP_6)))))
    return power * np.int32((whole + BIAS) << MANTISSA_BITS).view(np.float32) if x > TINY else ZERO


@njit(**_OPTIONS)
def _change_hsv(red: Any, green: Any, blue: Any, sixths: Any, power_s: Any, gain_s: Any, offset_s: Any,
                power_v: Any, gain_v: Any, offset_v: Any) -> None:  # fmt: skip
    for i in range(len(red)):
        r, g, b = red[i], green[i], blue[i]
        value = max(r, max(g, b))
        chroma = value - min(r, min(g, b))
        angle = g - b if value == r else (b - r + TWO * chroma if value == g else r - g + TWO * TWO * chroma)
        angle = angle / max(chroma, TINY) + sixths
        angle = angle + SIX if angle < ZERO else angle
        angle = angle - SIX if angle >= SIX else angle
        value = _clip(_power(value, power_v) * gain_v + offset_v)
        chroma = value * _clip(_power(chroma / max(r, max(g, max(b, TINY))), power_s) * gain_s + offset_s)
        red[i] = value - chroma + chroma * _clip(abs(angle - np.float32(3)) - ONE)
        green[i] = value - chroma + chroma * _clip(TWO - abs(angle - TWO))
        blue[i] = value - chroma + chroma * _clip(TWO - abs(angle - TWO * TWO))


def _hsv_noise(planes: Any, scratch: Any, row: Any, channels: Any, size: Any, top: Any, bottom: Any) -> Any:
    image = carray(planes, channels * size * size)
    apply, turns, power_s, gain_s, offset_s, power_v, gain_v, offset_v = carray(row, 8)
    r, g, b = _rows(image, size, 0, top, bottom), _rows(image, size, 1, top, bottom), _rows(image, size, 2, top, bottom)
    if channels == 1:
        for i in range(len(r)):
            r[i] = _clip(_power(r[i], power_v) * gain_v + offset_v)
    else:
        _change_hsv(r, g, b, SIX * turns, power_s, gain_s, offset_s, power_v, gain_v, offset_v)
    return 0


def _grayscale(planes: Any, scratch: Any, row: Any, channels: Any, size: Any, top: Any, bottom: Any) -> Any:
    apply, red, green, blue = carray(row, 4)
    if channels == 3:
        image = carray(planes, channels * size * size)
        r, g = _rows(image, size, 0, top, bottom), _rows(image, size, 1, top, bottom)
        b = _rows(image, size, 2, top, bottom)
        for i in range(len(r)):
            grey = _fma(red, r[i], _fma(green, g[i], blue * b[i]))
            r[i] = grey
            g[i] = grey
            b[i] = grey
    return 0


@njit(**_OPTIONS)
def _convolve(source: Any, out: Any, first: Any, last: Any, stride: Any, half: Any) -> None:
    """out[i] for i in first..last: half[0] x source[i] and, for k = 1, 2, ..., half[k] x the values k * stride before
    and after it. Three k at a time: len(half) - 1 is a multiple of 3.

    Views that start at their tap, as indices that might be negative would keep the loops scalar.
    """
    centre, result, weight = source[first:last], out[first:last], half[0]
    for k in range(1, len(half), 3):
        w1, w2, w3 = half[k], half[k + 1], half[k + 2]
        reach = k * stride
        before1, after1 = source[first - reach : last - reach], source[first + reach : last + reach]
        reach += stride
        before2, after2 = source[first - reach : last - reach], source[first + reach : last + reach]
        reach += stride
        before3, after3 = source[first - reach : last - reach], source[first + reach : last + reach]
        if k == 1:
            for i in range(len(result)):
                near = _fma(w1, before1[i] + after1[i], weight * centre[i])
                result[i] = _fma(w3, before3[i] + after3[i], _fma(w2, before2[i] + after2[i], near))
        else:
            for i in range(len(result)):
                near = _fma(w1, before1[i] + after1[i], result[i])
                result[i] = _fma(w3, before3[i] + after3[i], _fma(w2, before2[i] + after2[i], near))


@njit(**_OPTIONS)
def _copy(source: Any, out: Any) -> None:
    """(Not `out[:] = source`, for which numba compiles the wording of an error, for seconds.)"""
    for i in range(len(out)):
        out[i] = source[i]


@njit(**_OPTIONS)
def _mix_rows(source: Any, weights: Any, out: Any) -> None:
    """out[x] = the sum over j of weights[j] * source[j, x]."""
    for x in range(len(out)):
        out[x] = weights[0] * source[0, x]
    for j in range(1, len(source)):
        weight, line = weights[j], source[j]
        for x in range(len(out)):
            out[x] = _fma(weight, line[x], out[x])


@njit(**_OPTIONS)
def _mix_ends(line: Any, weights: Any, out: Any) -> None:
    """The outermost outputs of a line on the left, and mirrored on the right; three at a time, each with weights [j]
    of its own."""
    reach, n = len(weights) // 2, np.uint64(len(line) - 1)
    for first in range(0, reach, 3):
        left1, left2, left3, right1, right2, right3 = ZERO, ZERO, ZERO, ZERO, ZERO, ZERO
        for j in range(np.uint64(first + 3 + reach)):
            w1, w2, w3 = weights[first, j], weights[first + 1, j], weights[first + 2, j]
            left, right = line[j], line[n - j]
            left1, left2, left3 = _fma(w1, left, left1), _fma(w2, left, left2), _fma(w3, left, left3)
            right1, right2, right3 = _fma(w1, right, right1), _fma(w2, right, right2), _fma(w3, right, right3)
        out[first], out[first + 1], out[first + 2] = left1, left2, left3
        out[len(line) - 1 - first], out[len(line) - 2 - first], out[len(line) - 3 - first] = right1, right2, right3


@njit(**_OPTIONS)
def _blur_lines(lines: Any, weights: Any, reach: Any, out: Any) -> None:
    """Along x. A band is one long line; its lines' ends are put right afterwards."""
    size = lines.shape[1]
    if reach > 0:
        _convolve(lines.reshape(-1), out.reshape(-1), reach, lines.size - reach, 1, weights[reach, reach:])
        for y in range(len(lines)):
            _mix_ends(lines[y], weights, out[y])
    else:
        for y in range(len(lines)):
            for x in range(size):
                total = ZERO
                for j in range(size):
                    total = _fma(weights[x, j], lines[y, j], total)
                out[y, x] = total


@njit(**_OPTIONS)
def _blur_columns(window: Any, base: Any, weights: Any, reach: Any, top: Any, bottom: Any, out: Any) -> None:
    """Rows top..bottom of `out` [size, size] along y, from the lines of which `window` has those from `base` on."""
    size = len(out)
    edge = reach if reach > 0 else size
    for y in range(top, min(bottom, edge)):
        _mix_rows(window[: y + reach + 1 if reach > 0 else size], weights[y], out[y])
    first, last = max(top, edge), min(bottom, size - edge)
    if first < last:
        source = window[first - reach - base :].reshape(-1)
        result = out[first - reach :].reshape(-1)
        _convolve(source, result, reach * size, (reach + last - first) * size, size, weights[reach, reach:])
    for y in range(max(top, edge, size - edge), bottom):
        _mix_rows(window[y - reach - base : size - base], weights[size - 1 - y, : size - y + reach][::-1], out[y])


@njit(**_OPTIONS)
def _blur(images: Any, memory: Any, reach: Any, top: Any, bottom: Any) -> Any:
    """A separable blur whose weights stand in `memory`: weights[i, j] of value j in output i near a line's end; those
    of output `reach`, the first that no end touches, are the kernel. Rows leave it `reach` behind those that come in;
    those between are kept, blurred along x, in a window that moves now and then."""
    channels, size, _ = images.shape
    apart = size > 2 * reach  # else the ends meet
    num = 2 * reach + 1 if apart else size
    weights = memory[1 : 1 + num * num].reshape((num, num))
    height = min(size, 2 * reach + WINDOW_BANDS * (VALUES_PER_BAND // (size * channels) + 1))
    windows = memory[1 + num * num :][: channels * height * size].reshape((channels, height, size))
    base = 0 if top == 0 else int(memory[0])
    if bottom - base > height:
        kept = max(0, top - 2 * reach)
        for c in range(channels):
            for y in range(kept, top):
                _copy(windows[c, y - base], windows[c, y - kept])
        base = kept
    memory[0] = base
    lag, reach = (reach, reach) if apart else (size, 0)
    first, last = max(0, top - lag), size if bottom == size else max(0, bottom - lag)
    for c in range(channels):
        _blur_lines(images[c, top:bottom], weights, reach, windows[c, top - base : bottom - base])
        _blur_columns(windows[c], base, weights, reach, first, last, images[c])
    return lag


@njit(**_OPTIONS)
def _three_boxes(weights: Any, sigma: Any) -> None:
    """Each output's weights [n, n]: a line's single values blurred as the reference does. The boxes have 2 * whole + 1
    taps of weight `near` and two of `far`; the ends of a line are repeated."""
    variance = sigma * sigma / 3
    whole = _whole(sigma)
    alpha = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    near = 1 / (2 * (whole + alpha) + 1)
    far, last = alpha * near, len(weights) - 1
    values = np.eye(len(weights))
    for _ in range(3):
        source = values.copy()
        for y in range(last + 1):
            for x in range(last + 1):
                total = far * (source[max(y - whole - 1, 0), x] + source[min(y + whole + 1, last), x])
                for k in range(-whole, whole + 1):
                    total += near * source[min(max(y + k, 0), last), x]
                values[y, x] = total
    for y in range(last + 1):
        for x in range(last + 1):
            weights[y, x] = values[y, x]


@njit(**_OPTIONS)
def _whole(sigma: Any) -> Any:
    return int((np.sqrt(4 * sigma * sigma + 1) - 1) / 2)


def _gaussian_blur(planes: Any, scratch: Any, row: Any, channels: Any, size: Any, top: Any, bottom: Any) -> Any:
    """Three boxes are one kernel, except near the ends of a line."""
    memory = carray(scratch, _scratch_values(channels, size))
    sigma = np.float64(carray(row, 2)[1])
    reach = 3 * (_whole(sigma) + 1)
    if top == 0:
        num = min(2 * reach + 1, size)
        _three_boxes(memory[1 : 1 + num * num].reshape((num, num)), sigma)
    return _blur(carray(planes, (channels, size, size)), memory, reach, top, bottom)


def _gaussian_kernel_blur(planes: Any, scratch: Any, row: Any, channels: Any, size: Any, top: Any, bottom: Any) -> Any:
    """Zeros beyond the edge: near it, outputs have fewer weights. Taps that are not there make the reach a multiple
    of 3."""
    memory = carray(scratch, _scratch_values(channels, size))
    apply, sigma, last_tap = carray(row, 3)
    reach = (int(last_tap) + 2) // 3 * 3
    if top == 0:
        num = min(2 * reach + 1, size)
        weights, half = memory[1 : 1 + num * num].reshape((num, num)), np.zeros(reach + num, np.float32)
        total = ZERO
        for k in range(int(last_tap) + 1):
            half[k] = np.exp(np.float32(-0.5) * (np.float32(k) / sigma) ** 2)
            total += half[k] if k == 0 else TWO * half[k]
        for i in range(num):
            for j in range(num):
                weights[i, j] = half[abs(i - j)] / total
    return _blur(carray(planes, (channels, size, size)), memory, reach, top, bottom)


def _solarise(planes: Any, scratch: Any, row: Any, channels: Any, size: Any, top: Any, bottom: Any) -> Any:
    image = carray(planes, channels * size * size)
    threshold = carray(row, 2)[1]
    for c in range(channels):
        values = _rows(image, size, c, top, bottom)
        for i in range(len(values)):
            values[i] = ONE - values[i] if values[i] >= threshold else values[i]
    return 0


def _level_counts(planes: Any, scratch: Any, row: Any, channels: Any, size: Any, top: Any, bottom: Any) -> Any:
    """What equalize makes of each level, left in `scratch`: exact, as counts stay below 2 ** 24."""
    image, tables = carray(planes, channels * size * size), carray(scratch, (channels, 256))
    for c in range(channels):
        table = tables[c]
        if top == 0:
            table[:] = ZERO
        for value in _rows(image, size, c, top, bottom):
            table[int(value * BYTE + HALF)] += ONE
        if bottom == size:
            highest = 255
            while table[highest] == ZERO:
                highest -= 1
            step = (size * size - int(table[highest])) // 255
            below = step // 2
            for level in range(256):
                count = int(table[level])
                table[level] = (min(below // step, 255) if step > 0 else level) / 255
                below += count
    return 0


def _equalize(planes: Any, scratch: Any, row: Any, channels: Any, size: Any, top: Any, bottom: Any) -> Any:
    image, tables = carray(planes, channels * size * size), carray(scratch, (channels, 256))
    for c in range(channels):
        values = _rows(image, size, c, top, bottom)
        for i in range(len(values)):
            values[i] = tables[c, int(values[i] * BYTE + HALF)]
    return 0


def _keep(planes: Any, scratch: Any, row: Any, channels: Any, size: Any, top: Any, bottom: Any) -> Any:
    image, kept = carray(planes, channels * size * size), carray(scratch, channels * size * size)
    for c in range(channels):
        _copy(_rows(image, size, c, top, bottom), _rows(kept, size, c, top, bottom))
    return 0


def _affine(planes: Any, scratch: Any, row: Any, channels: Any, size: Any, top: Any, bottom: Any) -> Any:
    image, source = carray(planes, (channels, size, size)), carray(scratch, (channels, size, size))
    apply, angle, scale, shift_x, shift_y = carray(row, 5)
    centre, edge = (size - 1) / 2, size - 1.0
    cos, sin = np.cos(np.float64(angle)) / scale, np.sin(np.float64(angle)) / scale
    for y_out in range(top, bottom):
        down = y_out - centre - shift_y * size
        for x_out in range(size):
            right = x_out - centre - shift_x * size
            x = min(max(centre + cos * right - sin * down, 0.0), edge)
            y = min(max(centre + sin * right + cos * down, 0.0), edge)
            x0, y0 = int(x), int(y)
            x1, y1 = min(x0 + 1, size - 1), min(y0 + 1, size - 1)
            share_x, share_y = np.float32(x - x0), np.float32(y - y0)
            for c in range(channels):
                upper = source[c, y0, x0] + share_x * (source[c, y0, x1] - source[c, y0, x0])
                lower = source[c, y1, x0] + share_x * (source[c, y1, x1] - source[c, y1, x0])
                image[c, y_out, x_out] = upper + share_y * (lower - upper)
    return 0


def _noise(planes: Any, scratch: Any, row: Any, channels: Any, size: Any, top: Any, bottom: Any) -> Any:
    flat = carray(planes, (channels, size * size))
    apply, std, key_low, key_high = carray(row, 4)
    for c in range(channels):
        for i in range(top * size, bottom * size):
            first, second = noise_words(int(key_low), int(key_high), i * channels + c)
            radius = np.sqrt(-TWO * np.log(np.float32((first + 0.5) / 2**32)))
            normal = radius * np.cos(np.float32(2 * np.pi * (second + 0.5) / 2**32))
            flat[c, i] = _clip(flat[c, i] + std * normal)
    return 0


# An op that must see the whole image before it can change it is two functions: the first goes through all bands.
_BODIES: dict[type[Op], tuple[Callable[..., int], ...]] = {
    ops.Flip: (_flip,),
    ops.ColourJitter: (_jitter_to_mean, _jitter_from_contrast),
    ops.TfColourJitter: (_tf_jitter_to_means, _tf_jitter_from_contrast),
    ops.HsvNoise: (_hsv_noise,),
    ops.Grayscale: (_grayscale,),
    ops.GaussianBlur: (_gaussian_blur,),
    ops.GaussianKernelBlur: (_gaussian_kernel_blur,),
    ops.Solarise: (_solarise,),
    ops.Equalize: (_level_counts, _equalize),
    ops.Affine: (_keep, _affine),
    ops.Noise: (_noise,),
}


@functools.cache
def _compiled(body: Callable[..., int]) -> Any:
    """An op as a C function; kept alive here, as its address is all that the driver holds."""
    return cfunc(_SIGNATURE, **_OPTIONS)(body)


def _addresses(op: Op) -> tuple[int, int]:
    first, *second = (_compiled(body).address for body in _BODIES[type(op)])
    return first, second[0] if second else 0


@_intrinsic
def _call(
    typing_context: Any,
    address: Any,
    planes: Any,
    scratch: Any,
    row: Any,
    channels: Any,
    size: Any,
    top: Any,
    bottom: Any,
) -> Any:
    """Call the op compiled at `address` on rows top..bottom."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        arrays = (
            context.make_array(kind)(context, builder, value).data
            for kind, value in zip(signature.args[1:4], arguments[1:4], strict=True)
        )
        passed = (*arrays, *arguments[4:])
        function = ir.FunctionType(passed[-1].type, [value.type for value in passed])
        return builder.call(builder.inttoptr(arguments[0], function.as_pointer()), passed)

    lengths = (types.intp,) * 4
    return types.intp(address, planes, scratch, row, *lengths), generate


@njit(**_OPTIONS)
def _unpack(crop: Any, planes: Any, channels: Any, size: Any, top: Any, bottom: Any) -> None:
    """Rows of a crop, uint8 [size * size * channels], to planes. Written out by channel, as a loop over them would keep
    the loop scalar."""
    r, g, b = (
        _rows(planes, size, 0, top, bottom),
        _rows(planes, size, 1, top, bottom),
        _rows(planes, size, 2, top, bottom),
    )
    values = crop[top * size * channels :]
    if channels == 3:
        for i in range(len(r)):
            r[i] = np.float32(values[3 * i]) / BYTE
            g[i] = np.float32(values[3 * i + 1]) / BYTE
            b[i] = np.float32(values[3 * i + 2]) / BYTE
    else:
        for i in range(len(r)):
            r[i] = np.float32(values[i]) / BYTE


@_intrinsic
def _stream_pixels(
    typing_context: Any, red: Any, green: Any, blue: Any, gain: Any, bias: Any, at: Any, out: Any
) -> Any:
    """Pixels at..at + 8, normalised, to out[3 * at : 3 * at + 24], past the caches: batches are larger than these, and
    a line that is written whole need not be read first. The address of out[3 * at] is a multiple of 32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        eight, word = ir.VectorType(ir.FloatType(), 8), ir.IntType(32)

        def address(k: int, index: Any) -> Any:
            array = context.make_array(signature.args[k])(context, builder, arguments[k])
            return builder.gep(array.data, [index])

        def shuffled(first: Any, second: Any, places: list[int]) -> Any:
            return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(word, len(places)), places))

        def splat(k: int, channel: int) -> Any:
            value = builder.load(address(k, ir.Constant(word, channel)))
            vector = builder.insert_element(ir.Constant(eight, ir.Undefined), value, word(0))
            return shuffled(vector, vector, [0] * 8)

        at, planes = arguments[5], []
        for k in range(3):
            values = builder.load(builder.bitcast(address(k, at), eight.as_pointer()), align=4)
            planes.append(builder.fadd(builder.fmul(values, splat(3, k)), splat(4, k)))
        two = shuffled(planes[0], planes[1], list(range(16)))
        three = shuffled(planes[2], planes[2], list(range(16)))
        nontemporal = builder.module.add_metadata([word(1)])
        for part in range(3):
            places = [8 * (i % 3) + i // 3 for i in range(8 * part, 8 * part + 8)]  # of 0..24, planes one after another
            start = builder.add(builder.mul(at, at.type(3)), at.type(8 * part))
            target = builder.bitcast(address(6, start), eight.as_pointer())
            store = builder.store(shuffled(two, three, places), target, align=32)
            store.set_metadata("nontemporal", nontemporal)
        return context.get_dummy_value()

    return types.void(red, green, blue, gain, bias, types.intp, out), generate


@_intrinsic
def _fence(typing_context: Any) -> Any:
    """What was streamed is there for other threads before anything that is stored from now on."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate


@njit(**_OPTIONS)
def _store(planes: Any, channels: Any, size: Any, top: Any, bottom: Any, gain: Any, bias: Any, out: Any) -> None:
    """Rows of planes -> normalised float32 [size * size * channels]."""
    r, g, b = (
        _rows(planes, size, 0, top, bottom),
        _rows(planes, size, 1, top, bottom),
        _rows(planes, size, 2, top, bottom),
    )
    values = out[top * size * channels :]
    if channels == 1:
        for i in range(len(r)):
            values[i] = r[i] * gain[0] + bias[0]
        return
    whole = len(r) // 8 * 8 if values.ctypes.data % 32 == 0 else 0
    for i in range(0, whole, 8):
        _stream_pixels(r, g, b, gain, bias, i, values)
    for i in range(whole, len(r)):
        values[3 * i] = r[i] * gain[0] + bias[0]
        values[3 * i + 1] = g[i] * gain[1] + bias[1]
        values[3 * i + 2] = b[i] * gain[2] + bias[2]


def _drive(crops: Any, kernels: Any, offsets: Any, table: Any, gain: Any, bias: Any, memory: Any, out: Any,
           num_images: Any, num_ops: Any, num_columns: Any, channels: Any, size: Any) -> None:  # fmt: skip
    """Every image in as many sweeps as it has ops of two functions, and one more. A sweep takes a band of rows through
    all that can be done to it while it is in the first-level cache."""
    num_values, band = channels * size * size, max(1, VALUES_PER_BAND // (size * channels))
    room = _scratch_values(channels, size)
    crops, out = carray(crops, num_images * num_values), carray(out, num_images * num_values)
    addresses, offsets = carray(kernels, (num_ops, 2)), carray(offsets, num_ops)
    table, gain, bias = carray(table, (num_images, num_columns)), carray(gain, channels), carray(bias, channels)
    memory = carray(memory, num_values + num_ops * room)
    planes, scratch = memory[:num_values], memory[num_values:].reshape((num_ops, room))
    for i in range(num_images):
        crop, finished = crops[i * num_values : (i + 1) * num_values], out[i * num_values : (i + 1) * num_values]
        halfway, first = -1, 0
        while first <= num_ops:
            stop = first
            while stop < num_ops and (addresses[stop, 1] == 0 or table[i, offsets[stop]] == 0):
                stop += 1
            for start in range(0, size, band):
                top, bottom = start, min(start + band, size)
                if first == 0:
                    _unpack(crop, planes, channels, size, top, bottom)
                else:
                    row = table[i, offsets[halfway] :]
                    _call(addresses[halfway, 1], planes, scratch[halfway], row, channels, size, top, bottom)
                for k in range(first, min(stop + 1, num_ops)):
                    if table[i, offsets[k]]:  # the column `apply`
                        row = table[i, offsets[k] :]
                        lag = _call(addresses[k, 0], planes, scratch[k], row, channels, size, top, bottom)
                        top, bottom = max(0, top - lag), size if bottom == size else max(0, bottom - lag)
                if stop == num_ops:
                    _store(planes, channels, size, top, bottom, gain, bias, finished)
            halfway, first = stop, stop + 1
    _fence()


@functools.cache
def _driver() -> Callable[..., None]:
    """`_drive` as a function of addresses: ctypes lets go of the GIL while it runs, and arrays without an owner need
    no counting of references, which took a tenth of the time."""
    floats, longs = types.CPointer(types.float32), types.CPointer(types.int64)
    pointers = (types.CPointer(types.uint8), longs, longs, floats, floats, floats, floats, floats)
    compiled: Any = cfunc(types.void(*pointers, *[types.intp] * 5), **_OPTIONS)(_drive)
    prototype = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * len(pointers), *[ctypes.c_ssize_t] * 5)
    function: Any = prototype(compiled.address)
    function.compiled = compiled  # kept alive
    return function


_own = threading.local()


def _memory(num_values: int) -> np.ndarray:
    """What this thread works in; kept, as fresh pages cost as much as a view's colours."""
    if len(getattr(_own, "memory", ())) < num_values:
        _own.memory = np.empty(num_values, np.float32)
    memory: np.ndarray = _own.memory
    return memory


class Threads(Protocol):
    """What `finish` asks of a pool: an Executor's `map`."""

    def map(self, task: Callable[[int], None], starts: Iterable[int], /) -> Iterable[None]: ...


def finish(
    crops: np.ndarray,
    ops: tuple[Op, ...],
    tables: tuple[np.ndarray, ...],
    pixels: Pixels,
    out: np.ndarray,
    pool: Threads | None = None,
) -> None:
    """Crops to what the network receives, written into `out`.

    crops    uint8 [M, S, S, C], C = 1 or 3, C-contiguous
    tables   one float32 [M, len(op.columns)] for each op
    out      float32 [M, S, S, C], C-contiguous: (value - mean) / std
    pool     threads to spread the images over (never one that this call itself runs on); None: this thread
    """
    num_images, size, width, channels = crops.shape
    assert size == width and channels in (1, 3) and out.shape == crops.shape
    assert crops.flags.c_contiguous and out.flags.c_contiguous
    kernels = np.array([_addresses(op) for op in ops], np.int64).reshape(-1, 2)
    offsets = np.cumsum([0, *(table.shape[1] for table in tables)])
    table = np.concatenate([*tables, np.empty((num_images, 0), np.float32)], axis=1)
    mean, std = (np.broadcast_to(np.array(v, np.float32), channels) for v in (pixels.mean, pixels.std))
    gain, bias = 1 / std, -mean / std
    drive, num_values = _driver(), channels * size * size + len(ops) * _scratch_values(channels, size)
    per_task = max(1, VALUES_PER_TASK // (size * size * channels))

    def task(start: int) -> None:
        rows = slice(start, start + per_task)
        arrays = (crops[rows], kernels, offsets, table[rows], gain, bias, _memory(num_values), out[rows])
        addresses = (array.ctypes.data for array in arrays)
        drive(*addresses, len(crops[rows]), len(ops), table.shape[1], channels, size)

    starts = range(0, num_images, per_task)
    for _ in map(task, starts) if pool is None else pool.map(task, starts):
        pass
