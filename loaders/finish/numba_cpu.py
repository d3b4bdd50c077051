"""The fast finish on CPU: the laws of :mod:`loaders.finish.reference`, compiled.

An image is unpacked into planar float32 [C, S, S], small enough for a core's own cache, goes through its ops in place
and is normalised and stored channels-last on the way out. Each op is a C function that is compiled (and cached on
disk) when a chain first names it, so a run that never jitters colours does not wait for that code; one compiled
driver walks the images and calls the ops by address. A task of many images is thus one Python call, made without the
GIL. Threads are the caller's: numba's own pool aborts when two threads use it at once.

The disk cache notices edits of this file only: what it takes from `reference` (orders, luma, hash) is compiled in.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic

from loaders.finish.reference import SUB_OP_ORDERS, noise_words
from loaders.plan import ops
from loaders.plan.ops import LUMA, Op
from loaders.plan.views import Pixels

ROWS_PER_BAND = 8  # of a blur; two buffers of 8 x 230 float32 are 15 kB
VALUES_PER_TASK = 2**20  # about 1 ms of jitter and blur: long beside a thread's wake-up, short beside a batch

# What an op gets: planes float32 [channels, size, size], its row of parameters (`apply` first), the two lengths.
_SIGNATURE = types.void(types.CPointer(types.float32), types.CPointer(types.float32), types.intp, types.intp)
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


@njit(**_OPTIONS)
def _mean_luma(flat: Any) -> Any:
    """Mean luma of planes [C, N], summed in float32 by 16 lanes (vector code without reassociation) over runs of 256
    values, and the runs in float64."""
    channels, n = flat.shape
    lanes = np.empty(16, np.float32)
    total = 0.0
    for start in range(0, n, 256):
        end = min(start + 256, n)
        whole = start + (end - start) // 16 * 16
        lanes[:] = ZERO
        for i in range(start, whole, 16):
            for lane in range(16):
                if channels == 1:
                    lanes[lane] += flat[0, i + lane]
                else:
                    lanes[lane] += RED * flat[0, i + lane] + GREEN * flat[1, i + lane] + BLUE * flat[2, i + lane]
        for i in range(whole, end):
            lanes[0] += flat[0, i] if channels == 1 else RED * flat[0, i] + GREEN * flat[1, i] + BLUE * flat[2, i]
        for lane in range(16):
            total += lanes[lane]
    return np.float32(total / n)


@njit(**_OPTIONS)
def _blend(flat: Any, towards: Any, factor: Any) -> None:
    offset = (ONE - factor) * towards
    for c in range(flat.shape[0]):
        for i in range(flat.shape[1]):
            flat[c, i] = _clip(factor * flat[c, i] + offset)


@njit(**_OPTIONS)
def _saturation(flat: Any, factor: Any) -> None:
    rest = ONE - factor
    for i in range(flat.shape[1]):
        r, g, b = flat[0, i], flat[1, i], flat[2, i]
        offset = rest * (RED * r + GREEN * g + BLUE * b)
        flat[0, i] = _clip(factor * r + offset)
        flat[1, i] = _clip(factor * g + offset)
        flat[2, i] = _clip(factor * b + offset)


@njit(**_OPTIONS)
def _tf_saturation(flat: Any, factor: Any) -> None:
    """S times `factor`, at most 1: every distance to V grows by the factor, until the least channel is 0."""
    for i in range(flat.shape[1]):
        r, g, b = flat[0, i], flat[1, i], flat[2, i]
        value = max(r, max(g, b))
        chroma = value - min(r, min(g, b))
        growth = min(factor, value / max(chroma, TINY))
        flat[0, i] = value - growth * (value - r)
        flat[1, i] = value - growth * (value - g)
        flat[2, i] = value - growth * (value - b)


@njit(**_OPTIONS)
def _hue(flat: Any, turns: Any) -> None:
    """Hue angles are kept in units of the pixel's chroma (a sixth of a turn is `chroma`): no division, no branch."""
    sixths = SIX * turns
    for i in range(flat.shape[1]):
        r, g, b = flat[0, i], flat[1, i], flat[2, i]
        value, least = max(r, max(g, b)), min(r, min(g, b))
        chroma = value - least
        twice = TWO * chroma
        turn = SIX * chroma
        angle = g - b if value == r else (b - r + twice if value == g else r - g + TWO * twice)
        angle += sixths * chroma
        angle = angle + turn if angle < ZERO else angle
        angle = angle - turn if angle >= turn else angle
        # distance to the channel's own corner: full within one sixth, none beyond two; red's corner is at 0 = 6
        flat[0, i] = least + min(max(abs(angle - np.float32(3) * chroma) - chroma, ZERO), chroma)
        flat[1, i] = least + min(max(twice - abs(angle - twice), ZERO), chroma)
        flat[2, i] = least + min(max(twice - abs(angle - TWO * twice), ZERO), chroma)


def _flip(planes: Any, row: Any, channels: Any, size: Any) -> None:
    lines = carray(planes, (channels * size, size))
    line = np.empty(size, np.float32)
    for y in range(channels * size):
        for x in range(size):
            line[x] = lines[y, x]
        for x in range(size):
            lines[y, x] = line[np.uint64(size - 1 - x)]  # unsigned: a signed index that may be negative is slow


def _colour_jitter(planes: Any, row: Any, channels: Any, size: Any) -> None:
    flat = carray(planes, (channels, size * size))
    apply, order, brightness, contrast, saturation, hue = carray(row, 6)
    for sub_op in SUB_OP_ORDERS[int(order)]:
        if sub_op == 0:
            _blend(flat, ZERO, brightness)
        elif sub_op == 1:
            _blend(flat, _mean_luma(flat), contrast)
        elif channels == 3:
            if sub_op == 2:
                _saturation(flat, saturation)
            else:
                _hue(flat, hue)


def _tf_colour_jitter(planes: Any, row: Any, channels: Any, size: Any) -> None:
    flat = carray(planes, (channels, size * size))
    apply, order, gain, offset, contrast, saturation, hue = carray(row, 7)
    for sub_op in SUB_OP_ORDERS[int(order)]:
        if sub_op == 0:
            for c in range(channels):
                for i in range(size * size):
                    flat[c, i] = _clip(gain * flat[c, i] + offset)
        elif sub_op == 1:
            for c in range(channels):
                plane = flat[c : c + 1]
                _blend(plane, _mean_luma(plane), contrast)
        elif channels == 3:
            if sub_op == 2:
                _tf_saturation(flat, saturation)
            else:
                _hue(flat, hue)


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
def _change_hsv(flat: Any, sixths: Any, power_s: Any, gain_s: Any, offset_s: Any,
                power_v: Any, gain_v: Any, offset_v: Any) -> None:  # fmt: skip
    for i in range(flat.shape[1]):
        r, g, b = flat[0, i], flat[1, i], flat[2, i]
        value = max(r, max(g, b))
        chroma = value - min(r, min(g, b))
        angle = g - b if value == r else (b - r + TWO * chroma if value == g else r - g + TWO * TWO * chroma)
        angle = angle / max(chroma, TINY) + sixths
        angle = angle + SIX if angle < ZERO else angle
        angle = angle - SIX if angle >= SIX else angle
        value = _clip(_power(value, power_v) * gain_v + offset_v)
        chroma = value * _clip(_power(chroma / max(r, max(g, max(b, TINY))), power_s) * gain_s + offset_s)
        flat[0, i] = value - chroma + chroma * _clip(abs(angle - np.float32(3)) - ONE)
        flat[1, i] = value - chroma + chroma * _clip(TWO - abs(angle - TWO))
        flat[2, i] = value - chroma + chroma * _clip(TWO - abs(angle - TWO * TWO))


def _hsv_noise(planes: Any, row: Any, channels: Any, size: Any) -> None:
    flat = carray(planes, (channels, size * size))
    apply, turns, power_s, gain_s, offset_s, power_v, gain_v, offset_v = carray(row, 8)
    if channels == 1:
        for i in range(size * size):
            flat[0, i] = _clip(_power(flat[0, i], power_v) * gain_v + offset_v)
    else:
        _change_hsv(flat, SIX * turns, power_s, gain_s, offset_s, power_v, gain_v, offset_v)


def _grayscale(planes: Any, row: Any, channels: Any, size: Any) -> None:
    apply, red, green, blue = carray(row, 4)
    if channels == 3:
        flat = carray(planes, (channels, size * size))
        for i in range(size * size):
            grey = red * flat[0, i] + green * flat[1, i] + blue * flat[2, i]
            flat[0, i] = grey
            flat[1, i] = grey
            flat[2, i] = grey


@njit(**_OPTIONS)
def _copy(source: Any, out: Any) -> None:
    for i in range(len(out)):
        out[i] = source[i]


@njit(**_OPTIONS)
def _frame_sides(framed: Any, top: Any, bottom: Any, pitch: Any, pad: Any) -> None:
    """Repeat the first and last pixel of rows top..bottom."""
    for y in range(top, bottom):
        left, right = y * pitch + pad, (y + 1) * pitch - pad - 1
        for x in range(1, pad + 1):
            framed[left - x] = framed[left]
            framed[right + x] = framed[right]


@njit(**_OPTIONS)
def _frame_ends(framed: Any, top: Any, bottom: Any, pitch: Any) -> None:
    """Repeat row `top` above it and row `bottom` - 1 below it."""
    for y in range(top):
        _copy(framed[top * pitch : (top + 1) * pitch], framed[y * pitch : (y + 1) * pitch])
        below = (bottom + y) * pitch
        _copy(framed[(bottom - 1) * pitch : bottom * pitch], framed[below : below + pitch])


@njit(**_OPTIONS)
def _box_blur(source: Any, out: Any, first: Any, last: Any, stride: Any, whole: Any, far: Any, near: Any) -> None:
    """out[i] for i in first..last: `far` x the two outermost of 2 * whole + 3 taps, `stride` apart, `near` x the rest.

    Views that start at their tap, as indices that might be negative would keep the loops scalar.
    """
    centre, result = source[first:last], out[first:last]
    reach = (whole + 1) * stride
    before, after = source[first - reach : last - reach], source[first + reach : last + reach]
    for i in range(len(result)):
        result[i] = far * (before[i] + after[i]) + near * centre[i]
    for tap in range(1, whole + 1):
        reach = tap * stride
        before, after = source[first - reach : last - reach], source[first + reach : last + reach]
        for i in range(len(result)):
            result[i] += near * (before[i] + after[i])


def _gaussian_blur(planes: Any, row: Any, channels: Any, size: Any) -> None:
    """The plane stands in a frame `pad` wide that repeats its edge. Bands of rows, blurred as one long row each, go
    through their three horizontal passes while they are in the first-level cache."""
    image = carray(planes, channels * size * size)
    sigma = np.float64(carray(row, 2)[1])
    variance = sigma * sigma / 3
    whole = int((np.sqrt(12 * variance + 1) - 1) / 2)
    alpha = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    near = np.float32(1 / (2 * (whole + alpha) + 1))
    far = np.float32(alpha) * near
    pad = whole + 1
    pitch = size + 2 * pad
    a, b = np.empty(pitch * pitch, np.float32), np.empty(pitch * pitch, np.float32)
    for c in range(channels):
        plane = image[c * size * size : (c + 1) * size * size]
        for top in range(0, size, ROWS_PER_BAND):
            bottom = min(top + ROWS_PER_BAND, size)
            for y in range(top, bottom):
                _copy(plane[y * size : (y + 1) * size], a[(pad + y) * pitch + pad : (pad + y + 1) * pitch - pad])
            first, last = (pad + top) * pitch + pad, (pad + bottom) * pitch - pad
            _frame_sides(a, pad + top, pad + bottom, pitch, pad)
            _box_blur(a, b, first, last, 1, whole, far, near)
            _frame_sides(b, pad + top, pad + bottom, pitch, pad)
            _box_blur(b, a, first, last, 1, whole, far, near)
            _frame_sides(a, pad + top, pad + bottom, pitch, pad)
            _box_blur(a, b, first, last, 1, whole, far, near)
        first, last = pad * pitch, (pad + size) * pitch
        _frame_ends(b, pad, pad + size, pitch)
        _box_blur(b, a, first, last, pitch, whole, far, near)
        _frame_ends(a, pad, pad + size, pitch)
        _box_blur(a, b, first, last, pitch, whole, far, near)
        _frame_ends(b, pad, pad + size, pitch)
        _box_blur(b, a, first, last, pitch, whole, far, near)
        for y in range(size):
            _copy(a[(pad + y) * pitch + pad : (pad + y + 1) * pitch - pad], plane[y * size : (y + 1) * size])


@njit(**_OPTIONS)
def _convolve(source: Any, out: Any, first: Any, last: Any, stride: Any, half: Any) -> None:
    """out[i] for i in first..last: half[0] x source[i] and, for k = 1, 2, ..., half[k] x the values k * stride before
    and after it."""
    centre, result = source[first:last], out[first:last]
    for i in range(len(result)):
        result[i] = half[0] * centre[i]
    for k in range(1, len(half)):
        weight, reach = half[k], k * stride
        before, after = source[first - reach : last - reach], source[first + reach : last + reach]
        for i in range(len(result)):
            result[i] += weight * (before[i] + after[i])


def _gaussian_kernel_blur(planes: Any, row: Any, channels: Any, size: Any) -> None:
    """The plane stands in a frame of zeros, `pad` wide; bands of rows as in `_gaussian_blur`."""
    image = carray(planes, channels * size * size)
    apply, sigma, reach = carray(row, 3)
    pad = int(reach)
    half = np.empty(pad + 1, np.float32)
    total = ZERO
    for k in range(pad + 1):
        half[k] = np.exp(np.float32(-0.5) * (np.float32(k) / sigma) ** 2)
        total += half[k] if k == 0 else TWO * half[k]
    for k in range(pad + 1):
        half[k] /= total
    pitch = size + 2 * pad
    a, b = np.zeros(pitch * pitch, np.float32), np.zeros(pitch * pitch, np.float32)
    for c in range(channels):
        plane = image[c * size * size : (c + 1) * size * size]
        for top in range(0, size, ROWS_PER_BAND):
            bottom = min(top + ROWS_PER_BAND, size)
            for y in range(top, bottom):
                _copy(plane[y * size : (y + 1) * size], a[(pad + y) * pitch + pad : (pad + y + 1) * pitch - pad])
            _convolve(a, b, (pad + top) * pitch + pad, (pad + bottom) * pitch - pad, 1, half)
        for y in range(pad, pad + size):  # a row at a time, straight into the plane
            first = y * pitch + pad
            _convolve(b, a, first, first + size, pitch, half)
            _copy(a[first : first + size], plane[(y - pad) * size : (y - pad + 1) * size])
            a[first : first + size] = ZERO


def _solarise(planes: Any, row: Any, channels: Any, size: Any) -> None:
    values = carray(planes, channels * size * size)
    threshold = carray(row, 2)[1]
    for i in range(len(values)):
        values[i] = ONE - values[i] if values[i] >= threshold else values[i]


def _equalize(planes: Any, row: Any, channels: Any, size: Any) -> None:
    flat = carray(planes, (channels, size * size))
    levels, table = np.empty(size * size, np.uint8), np.empty(256, np.float32)
    for c in range(channels):
        counts = np.zeros(256, np.int64)
        highest = 0
        for i in range(len(levels)):
            level = int(flat[c, i] * BYTE + np.float32(0.5))
            levels[i] = level
            counts[level] += 1
            highest = max(highest, level)
        step = (len(levels) - counts[highest]) // 255
        below = step // 2
        for level in range(256):
            table[level] = (min(below // step, 255) if step > 0 else level) / 255
            below += counts[level]
        for i in range(len(levels)):
            flat[c, i] = table[levels[i]]


def _affine(planes: Any, row: Any, channels: Any, size: Any) -> None:
    image = carray(planes, (channels, size, size))
    source = image.copy()
    apply, angle, scale, shift_x, shift_y = carray(row, 5)
    centre, edge = (size - 1) / 2, size - 1.0
    cos, sin = np.cos(np.float64(angle)) / scale, np.sin(np.float64(angle)) / scale
    for y_out in range(size):
        down = y_out - centre - shift_y * size
        for x_out in range(size):
            right = x_out - centre - shift_x * size
            x = min(max(centre + cos * right - sin * down, 0.0), edge)
            y = min(max(centre + sin * right + cos * down, 0.0), edge)
            x0, y0 = int(x), int(y)
            x1, y1 = min(x0 + 1, size - 1), min(y0 + 1, size - 1)
            share_x, share_y = np.float32(x - x0), np.float32(y - y0)
            for c in range(channels):
                top = source[c, y0, x0] + share_x * (source[c, y0, x1] - source[c, y0, x0])
                bottom = source[c, y1, x0] + share_x * (source[c, y1, x1] - source[c, y1, x0])
                image[c, y_out, x_out] = top + share_y * (bottom - top)


def _noise(planes: Any, row: Any, channels: Any, size: Any) -> None:
    flat = carray(planes, (channels, size * size))
    apply, std, key_low, key_high = carray(row, 4)
    for c in range(channels):
        for i in range(size * size):
            first, second = noise_words(int(key_low), int(key_high), i * channels + c)
            radius = np.sqrt(-TWO * np.log(np.float32((first + 0.5) / 2**32)))
            normal = radius * np.cos(np.float32(2 * np.pi * (second + 0.5) / 2**32))
            flat[c, i] = _clip(flat[c, i] + std * normal)


_BODIES: dict[type[Op], Callable[..., None]] = {
    ops.Flip: _flip,
    ops.ColourJitter: _colour_jitter,
    ops.TfColourJitter: _tf_colour_jitter,
    ops.HsvNoise: _hsv_noise,
    ops.Grayscale: _grayscale,
    ops.GaussianBlur: _gaussian_blur,
    ops.GaussianKernelBlur: _gaussian_kernel_blur,
    ops.Solarise: _solarise,
    ops.Equalize: _equalize,
    ops.Affine: _affine,
    ops.Noise: _noise,
}


@functools.cache
def _compiled(body: Callable[..., None]) -> Any:
    """An op as a C function; kept alive here, as its address is all that the driver holds."""
    return cfunc(_SIGNATURE, **_OPTIONS)(body)


@intrinsic
def _call(typing_context: Any, address: Any, planes: Any, row: Any) -> Any:
    """Call the op compiled at `address` on planes float32 [C, S, S] and its row of parameters."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        view, parameters = (
            context.make_array(kind)(context, builder, value)
            for kind, value in zip(signature.args[1:], arguments[1:], strict=True)
        )
        channels, size = (builder.extract_value(view.shape, axis) for axis in (0, 1))
        passed = (view.data, parameters.data, channels, size)
        function = ir.FunctionType(ir.VoidType(), [value.type for value in passed])
        builder.call(builder.inttoptr(arguments[0], function.as_pointer()), passed)
        return context.get_dummy_value()

    return types.void(address, planes, row), generate


@njit(cache=True, error_model="numpy")
def _unpack(interleaved: Any, flat: Any) -> None:
    """uint8 [N * C] -> planes [C, N]. The channel count is spelt out, as a loop over it would keep the loop scalar."""
    if len(flat) == 3:
        for i in range(flat.shape[1]):
            flat[0, i] = np.float32(interleaved[3 * i]) / BYTE
            flat[1, i] = np.float32(interleaved[3 * i + 1]) / BYTE
            flat[2, i] = np.float32(interleaved[3 * i + 2]) / BYTE
    else:
        for i in range(flat.shape[1]):
            flat[0, i] = np.float32(interleaved[i]) / BYTE


@njit(**_OPTIONS)
def _store(flat: Any, gain: Any, bias: Any, interleaved: Any) -> None:
    """Planes [C, N] -> normalised float32 [N * C]."""
    if len(flat) == 3:
        for i in range(flat.shape[1]):
            interleaved[3 * i] = flat[0, i] * gain[0] + bias[0]
            interleaved[3 * i + 1] = flat[1, i] * gain[1] + bias[1]
            interleaved[3 * i + 2] = flat[2, i] * gain[2] + bias[2]
    else:
        for i in range(flat.shape[1]):
            interleaved[i] = flat[0, i] * gain[0] + bias[0]


@njit(nogil=True, cache=True, error_model="numpy")
def _drive(crops: Any, kernels: Any, offsets: Any, table: Any, gain: Any, bias: Any, out: Any) -> None:
    """Every image: unpack, run the ops whose `apply` is set, normalise and store."""
    num_images, size, _, channels = crops.shape
    planes = np.empty((channels, size, size), np.float32)
    for i in range(num_images):
        _unpack(crops[i].reshape(-1), planes.reshape(channels, -1))
        for k in range(len(kernels)):
            if table[i, offsets[k]]:  # the column `apply`
                _call(kernels[k], planes, table[i, offsets[k] :])  # type: ignore[call-arg]
        _store(planes.reshape(channels, -1), gain, bias, out[i].reshape(-1))


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
    kernels = np.array([_compiled(_BODIES[type(op)]).address for op in ops], np.int64)
    offsets = np.cumsum([0, *(table.shape[1] for table in tables)])
    table = np.concatenate([*tables, np.empty((num_images, 0), np.float32)], axis=1)
    mean, std = (np.broadcast_to(np.array(v, np.float32), channels) for v in (pixels.mean, pixels.std))
    gain, bias = 1 / std, -mean / std
    per_task = max(1, VALUES_PER_TASK // (size * size * channels))

    def task(start: int) -> None:
        rows = slice(start, start + per_task)
        _drive(crops[rows], kernels, offsets, table[rows], gain, bias, out[rows])

    starts = range(0, num_images, per_task)
    for _ in map(task, starts) if pool is None else pool.map(task, starts):
        pass
