"""Antialiased crop-and-resize of uint8 images: the bytes that Pillow's `Image.resize` gives, compiled with numba.

Pillow's law (libImaging/Resample.c): output pixel `o` looks at the source around its centre, box start + (o + 0.5) *
scale, through a triangle (bilinear) or a cubic (bicubic, a = -0.5) that is widened by the scale when shrinking; the
weights are normalised and kept as multiples of 2^-22; one axis first, rounded and clipped to uint8, then the other.
The cubic without antialias is the same with a window that is never widened.

How it is fast: both passes are weighted sums of long contiguous rows of bytes, a form that compilers turn into vector
code. For the pass along x the source is turned (columns become contiguous), in blocks of 16 x 16 bytes that are
exchanged within vector registers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from loaders.plan.views import Filter

CODES = {Filter.BILINEAR: 0, Filter.BICUBIC: 1, Filter.BICUBIC_ALIASED: 2}  # what `resize_box` calls them

_BILINEAR, _ALIASED = CODES[Filter.BILINEAR], CODES[Filter.BICUBIC_ALIASED]
_PRECISION = 22  # bits of a weight; Pillow's: 32 less 8 of a pixel and 2 for a sign and overshoot
_HALF = 1 << (_PRECISION - 1)
_GROUP = 4  # taps summed in one sweep
_BAND = 128  # source rows turned at a time: they stay in the second-level cache
# of a function that only compiled code calls: without wrappers for Python it compiles sooner
_INNER: dict[str, Any] = {"nogil": True, "cache": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_BLOCK = 16  # bytes of a vector register that every CPU has


@njit(nogil=True, cache=True)
def resize_box(src, box, clip, size, filter, out):
    """Scale the part `box` of `src` to `size` x `size` pixels.

    src   uint8 [H, W, C], contiguous
    box   (x0, y0, x1, y1) floats, source pixels
    clip  (x0, y0, x1, y1) ints, what the filter may look at, inside the image and around the box. The box itself:
          Pillow's crop, then resize. The whole image: Pillow's `resize(box=box)`, which looks a little past the box.
    filter  one of CODES
    out   uint8 [size, size, C], contiguous

    Raises ValueError where the box is empty or not inside the clip. Releases the GIL.
    """
    left, top, right, bottom = clip
    # Pillow keeps boxes as float32.
    x0, y0, x1, y1 = np.float32(box[0]), np.float32(box[1]), np.float32(box[2]), np.float32(box[3])
    if not (left <= x0 < x1 <= right and top <= y0 < y1 <= bottom):
        raise ValueError("the box is not inside the clip")
    if left < 0 or top < 0 or right > src.shape[1] or bottom > src.shape[0]:
        raise ValueError("the clip is not inside the image")
    channels = src.shape[2]
    first_x, weights_x = _taps(x0, x1, left, right, size, filter)
    first_y, weights_y = _taps(y0, y1, top, bottom, size, filter)
    used_right = min(right, first_x[-1] + weights_x.shape[1])
    used_bottom = min(bottom, first_y[-1] + weights_y.shape[1])
    rows = src.reshape(src.shape[0], -1)[first_y[0] : used_bottom, first_x[0] * channels : used_right * channels]
    first_x -= first_x[0]
    first_y -= first_y[0]
    result = out.reshape(size, size * channels)[:, : size * channels]  # as `rows` strided: compiled once for both
    shrink_x, shrink_y = right - left - size, bottom - top - size
    if shrink_y > max(0, 2 * shrink_x):  # as Pillow 13; older ones always begin with x
        middle = np.empty((size, rows.shape[1]), np.uint8)[:, : rows.shape[1]]
        _along_y(rows, first_y, weights_y, middle)
        _along_x(middle, first_x, weights_x, channels, result)
    else:
        middle = np.empty((len(rows), size * channels), np.uint8)[:, : size * channels]
        _along_x(rows, first_x, weights_x, channels, middle)
        _along_y(middle, first_y, weights_y, result)


@njit(nogil=True, cache=True)
def resize_boxes(images, ids, boxes, cut_first, filter, out):
    """`resize_box` for many: images uint8 [N, H, W, C], ids int64 [M], boxes float64 [M, 4] -> out uint8 [M, S, S, C].

    `cut_first` makes each box its own clip, else the whole image is. (Here, not with its caller: numba's cache of a
    function does not notice changes in other files.)
    """
    height, width = images.shape[1:3]
    size = out.shape[1]
    for m in range(len(ids)):
        x0, y0, x1, y1 = boxes[m]
        clip = (int(x0), int(y0), int(x1), int(y1)) if cut_first else (0, 0, width, height)
        if x1 - x0 == size and y1 - y0 == size and x0 == int(x0) and y0 == int(y0):
            _copy(images[ids[m]], int(x0), int(y0), out[m])
        else:
            resize_box(images[ids[m]], (x0, y0, x1, y1), clip, size, filter, out[m])


@njit(**_INNER)
def _copy(image, left, top, out):
    """out[y, x] = image[top + y, left + x]. (Spelt out: numba's assignment of slices compiles, for seconds, what words
    its error message.)"""
    for y in range(out.shape[0]):
        for x in range(out.shape[1]):
            for c in range(out.shape[2]):
                out[y, x, c] = image[top + y, left + x, c]


@njit(nogil=True, cache=True)
def resize_copies(image, mask, boxes, greys, cut_first, filter, first, step, out):
    """A view's crops of one image, uint8 [H, W, C]: rows first, first + step, ... of boxes float64 [M, 4] and of out
    uint8 [M, S, S, C]; where greys, int16 [M], is not -1 the image stands on that level, but for `mask`, bool [H, W].
    """
    only, images = np.zeros(1, np.int64), image.reshape((1, *image.shape))
    for row in range(first, len(out), step):
        part, shown = slice(row, row + 1), images
        if greys[row] >= 0:
            shown = over_grey(images, mask, np.uint8(greys[row]), boxes[row], cut_first)
        resize_boxes(shown, only, boxes[part], cut_first, filter, out[part])


@njit(nogil=True, cache=True)
def over_grey(image, mask, grey, box, cut_first):
    """image uint8 [1, H, W, C] with the level `grey` wherever `mask`, bool [H, W], does not hold: a new image, for
    `resize_boxes` to cut `box` from with the same `cut_first`. If that is set nothing beyond the box will be looked at,
    and nothing is filled in there."""
    height, width, channels = image.shape[1:]
    masked = np.empty((1, height, width, channels), np.uint8)
    left, top, right, bottom = 0, 0, width, height
    if cut_first:
        left, top, right, bottom = int(box[0]), int(box[1]), int(box[2]), int(box[3])
    for y in range(top, bottom):
        for x in range(left, right):
            for c in range(channels):
                masked[0, y, x, c] = image[0, y, x, c] if mask[y, x] else grey
    return masked


@njit(**_INNER)
def _kernel(x, filter):
    x = abs(x)
    if filter == _BILINEAR:
        return max(0.0, 1.0 - x)
    if x < 1.0:
        return (1.5 * x - 2.5) * x * x + 1.0
    if x < 2.0:
        return ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return 0.0


@njit(**_INNER)
def _taps(start, end, low, high, size, filter):
    """Which source pixels make each output pixel along one axis, and how much of each.

    The box start..end becomes `size` pixels; the filter stays within low..high. Returns (first int64 [size], weights
    int32 [size, T] in units of 2^-22): output o is the sum over k of weights[o, k] * source[first[o] + k]. T is a
    multiple of `_GROUP`; a window may reach beyond `high` with weights of zero.
    """
    scale = np.float64(end - start) / size
    stretch = 1.0 if filter == _ALIASED else max(scale, 1.0)
    support = stretch * (1.0 if filter == _BILINEAR else 2.0)
    first = np.empty(size, np.int64)
    weights = np.zeros((size, int(np.ceil(2.0 * support)) + 1 + _GROUP), np.int32)
    values = np.empty(weights.shape[1])
    shrink = 1.0 / stretch
    widest = 0
    for o in range(size):
        centre = start + (o + 0.5) * scale
        begin = max(low, int(np.floor(centre - support + 0.5)))
        stop = min(high, int(np.floor(centre + support + 0.5)))
        total = 0.0
        for x in range(begin, stop):
            values[x - begin] = _kernel((x + 0.5 - centre) * shrink, filter)
            total += values[x - begin]
        for k in range(stop - begin):
            weight = values[k] / total
            weights[o, k] = int(np.floor(abs(weight) * (1 << _PRECISION) + 0.5)) * (1 if weight > 0 else -1)
        first[o] = begin
        widest = max(widest, stop - begin)
    return first, weights[:, : -(-widest // _GROUP) * _GROUP]


@njit(**_INNER)
def _along_y(rows, first, weights, out):
    """rows uint8 [n, L] -> out uint8 [size, L]."""
    sums = np.empty(rows.shape[1], np.int32)
    for o in range(len(out)):
        _sum_rows(rows, first[o], weights[o], sums, out[o])


@njit(**_INNER)
def _along_x(rows, first, weights, channels, out):
    """rows uint8 [n, W * C] -> out uint8 [n, size * C]."""
    num_bands = -(-len(rows) // _BAND)
    band = -(-len(rows) // num_bands)
    columns = np.empty((rows.shape[1], band), np.uint8)
    columns_out = np.empty((out.shape[1], band), np.uint8)
    # One row a pixel: its channels, and in each the rows of the band.
    pixels = columns.reshape(-1, channels * band)[:, : channels * band]
    pixels_out = columns_out.reshape(-1, channels * band)[:, : channels * band]
    for y in range(0, len(rows), band):
        height = min(band, len(rows) - y)
        _turn(rows[y : y + height], columns[:, :band])
        _along_y(pixels, first, weights, pixels_out)
        _turn(columns_out[:, :height], out[y : y + height])


@njit(**_INNER)
def _sum_rows(rows, first, weights, sums, out):
    """out[i] = the rounded, clipped sum over k of weights[k] * rows[first + k, i]; `sums` is scratch."""
    last = len(rows) - 1
    num = len(weights)
    for k in range(0, num, _GROUP):
        a, b = rows[min(first + k, last)], rows[min(first + k + 1, last)]
        c, d = rows[min(first + k + 2, last)], rows[min(first + k + 3, last)]
        p, q, r, s = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        if num == _GROUP:
            for i in range(len(out)):
                out[i] = _byte(np.int32(_HALF + a[i] * p + b[i] * q + c[i] * r + d[i] * s))
        elif k == 0:
            for i in range(len(out)):
                sums[i] = np.int32(_HALF + a[i] * p + b[i] * q + c[i] * r + d[i] * s)
        elif k + _GROUP < num:
            for i in range(len(out)):
                sums[i] += np.int32(a[i] * p + b[i] * q + c[i] * r + d[i] * s)
        else:
            for i in range(len(out)):
                out[i] = _byte(np.int32(sums[i] + a[i] * p + b[i] * q + c[i] * r + d[i] * s))


@njit(**_INNER)
def _byte(total):
    return np.uint8(min(max(total >> _PRECISION, 0), 255))


@njit(**_INNER)
def _turn(rows, columns):
    """rows uint8 [n, m] -> columns[:m, :n], its transpose; the bytes of a row are adjacent in both. The last blocks
    overlap those before them."""
    n, m = rows.shape
    if n < _BLOCK or m < _BLOCK:
        for y in range(n):
            for x in range(m):
                columns[x, y] = rows[y, x]
        return
    source, pitch = rows.ctypes.data, rows.strides[0]
    out, pitch_out = columns.ctypes.data, columns.strides[0]
    for k in range(0, n, _BLOCK):
        y = min(k, n - _BLOCK)
        for j in range(0, m, _BLOCK):
            x = min(j, m - _BLOCK)
            _turn_block(source + y * pitch + x, pitch, out + x * pitch_out + y, pitch_out)  # type: ignore[call-arg]


@intrinsic
def _turn_block(typing_context: Any, source: Any, pitch: Any, out: Any, pitch_out: Any) -> Any:
    """Transpose 16 x 16 bytes at address `source`, rows `pitch` bytes apart, to `out`: four rounds, each of which
    shuffles row k and row k + 8 together into rows 2 k and 2 k + 1."""
    row = ir.VectorType(ir.IntType(8), _BLOCK)
    half = _BLOCK // 2

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def at(start: Any, step: Any, k: int) -> Any:
            address = builder.add(start, builder.mul(step, ir.Constant(step.type, k)))
            return builder.inttoptr(address, row.as_pointer())

        def shuffled(a: Any, b: Any, begin: int) -> Any:
            places = [place for i in range(begin, begin + half) for place in (i, _BLOCK + i)]
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), _BLOCK), places))

        source, pitch, out, pitch_out = arguments
        rows = [builder.load(at(source, pitch, k), align=1) for k in range(_BLOCK)]
        for _ in range(4):
            rows = [shuffled(rows[k], rows[k + half], begin) for k in range(half) for begin in (0, half)]
        for k in range(_BLOCK):
            builder.store(rows[k], at(out, pitch_out, k), align=1)
        return context.get_dummy_value()

    return types.void(source, pitch, out, pitch_out), generate
