"""The kernels of a pass over the pixels, of what ops must know of the whole image first, and of a blur's weights."""

from __future__ import annotations

import triton
import triton.language as tl

from loaders.finish.triton.pixels import act, jitter, level

# how a pass samples its input
PLAIN, FLIP, AFFINE, BLUR_X, BLUR_Y = (tl.constexpr(i) for i in range(5))


@triton.jit
def fetch(source, image, pixel, mask, SIZE: tl.constexpr, CHANNELS: tl.constexpr):
    """Pixels of an image in [0, 1]: from crops uint8 [M, S, S, C], or from a pass before, float32 [M, C, S, S]."""
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
def turned(source, image, pixel, mask, row, SIZE: tl.constexpr, CHANNELS: tl.constexpr):
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
    r, g, b = fetch(source, image, y0 * SIZE + x0, mask, SIZE, CHANNELS)
    r1, g1, b1 = fetch(source, image, y0 * SIZE + x1, mask, SIZE, CHANNELS)
    r, g, b = r + share_x * (r1 - r), g + share_x * (g1 - g), b + share_x * (b1 - b)
    r1, g1, b1 = fetch(source, image, y1 * SIZE + x0, mask, SIZE, CHANNELS)
    r2, g2, b2 = fetch(source, image, y1 * SIZE + x1, mask, SIZE, CHANNELS)
    r1, g1, b1 = r1 + share_x * (r2 - r1), g1 + share_x * (g2 - g1), b1 + share_x * (b2 - b1)
    return r + share_y * (r1 - r), g + share_y * (g1 - g), b + share_y * (b1 - b)


@triton.jit
def blurred(source, image, pixel, mask, weights, along, STEP: tl.constexpr, taps, REACH: tl.constexpr,
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
        r1, g1, b1 = fetch(source, image, pixel + offset * STEP, inside, SIZE, CHANNELS)
        r, g, b = r + weight * r1, g + weight * g1, b + weight * b1
    return r, g, b


@triton.jit
def sample(source, unblurred, image, pixel, mask, row, weights, SAMPLING: tl.constexpr, REACH: tl.constexpr,
            SIZE: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """Where a pass begins. Blurred along y, images that are not to be blurred come from before the blur along x."""
    if SAMPLING == PLAIN:
        r, g, b = fetch(source, image, pixel, mask, SIZE, CHANNELS)
    elif SAMPLING == FLIP:
        mirrored = pixel + SIZE - 1 - 2 * (pixel % SIZE)
        r, g, b = fetch(source, image, tl.where(tl.load(row) != 0, mirrored, pixel), mask, SIZE, CHANNELS)
    elif SAMPLING == AFFINE:
        r, g, b = turned(source, image, pixel, mask, row, SIZE, CHANNELS)
    else:
        taps = tl.where(tl.load(row) != 0, 2 * REACH + 1, 0)
        if SAMPLING == BLUR_X:
            r, g, b = blurred(source, image, pixel, mask, weights, pixel % SIZE, 1, taps, REACH, SIZE, CHANNELS)
        else:
            r, g, b = blurred(source, image, pixel, mask, weights, pixel // SIZE, SIZE, taps, REACH, SIZE, CHANNELS)
            if taps == 0:
                r, g, b = fetch(unblurred, image, pixel, mask, SIZE, CHANNELS)
    return r, g, b


@triton.jit
def through(source, unblurred, image, pixel, mask, table, weights, orders, levels, COLUMNS: tl.constexpr,
             TABLES: tl.constexpr, SAMPLING: tl.constexpr, COLUMN: tl.constexpr, REACH: tl.constexpr,
             CHAIN: tl.constexpr, SIZE: tl.constexpr, CHANNELS: tl.constexpr):  # fmt: skip
    """Sample, then every op of the chain that applies to this image."""
    row = table + image.to(tl.int64) * COLUMNS
    start = levels + image.to(tl.int64) * (TABLES * CHANNELS * 256)
    r, g, b = sample(
        source, unblurred, image, pixel, mask, row + COLUMN, weights, SAMPLING, REACH, SIZE, CHANNELS
    )  # fmt: skip
    for k in tl.static_range(len(CHAIN)):
        if tl.load(row + CHAIN[k][1]) != 0:
            r, g, b = act(
                CHAIN[k][0], r, g, b, row + CHAIN[k][1], orders, start + CHAIN[k][2] * CHANNELS * 256, pixel, mask,
                CHANNELS,
            )  # fmt: skip
    return r, g, b


@triton.jit
def pass_kernel(source, unblurred, table, weights, orders, levels, out, COLUMNS: tl.constexpr, TABLES: tl.constexpr,
                  SAMPLING: tl.constexpr, COLUMN: tl.constexpr, REACH: tl.constexpr, CHAIN: tl.constexpr,
                  NORMALISE: tl.constexpr, SIZE: tl.constexpr, CHANNELS: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """One block of pixels of one image. NORMALISE: (gain, bias) of each channel in the last pass, else None."""
    image = tl.program_id(0)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = pixel < SIZE * SIZE
    if SAMPLING == BLUR_X:  # images that are not to be blurred are left out
        mask = pixel < tl.where(tl.load(table + image.to(tl.int64) * COLUMNS + COLUMN) != 0, SIZE * SIZE, 0)
    r, g, b = through(source, unblurred, image, pixel, mask, table, weights, orders, levels, COLUMNS, TABLES,
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
def means_kernel(source, unblurred, table, weights, orders, levels, COLUMNS: tl.constexpr, TABLES: tl.constexpr,
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
        r, g, b = through(source, unblurred, image, pixel, mask, table, weights, orders, levels, COLUMNS, TABLES,
                           SAMPLING, COLUMN, REACH, CHAIN, SIZE, CHANNELS)  # fmt: skip
        r, g, b = jitter(KIND, r, g, b, row + AT, orders, CHANNELS, True)
        sum_r += tl.where(mask, r, 0.0)
        sum_g += tl.where(mask, g, 0.0)
        sum_b += tl.where(mask, b, 0.0)
    tl.store(row + MEANS, tl.sum(sum_r) / (SIZE * SIZE))
    tl.store(row + MEANS + 1, tl.sum(sum_g) / (SIZE * SIZE))
    tl.store(row + MEANS + 2, tl.sum(sum_b) / (SIZE * SIZE))


@triton.jit
def equalizing_table(counts, out, NUM: tl.constexpr):
    """Pillow's table of ImageOps.equalize from the counts of the 256 levels, as values in [0, 1]."""
    level = tl.arange(0, 256)
    highest = tl.max(tl.where(counts > 0, level, 0))
    step = (NUM - tl.sum(tl.where(level == highest, counts, 0))) // 255
    below = tl.cumsum(counts, 0) - counts
    spread = tl.minimum((below + step // 2) // tl.maximum(step, 1), 255)
    tl.store(out + level, tl.where(step > 0, spread, level) / 255)


@triton.jit
def levels_kernel(source, unblurred, table, weights, orders, levels, COLUMNS: tl.constexpr, TABLES: tl.constexpr,
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
        r, g, b = through(source, unblurred, image, pixel, mask, table, weights, orders, levels, COLUMNS, TABLES,
                           SAMPLING, COLUMN, REACH, CHAIN, SIZE, CHANNELS)  # fmt: skip
        count_r += tl.histogram(level(r), 256, mask)
        if CHANNELS == 3:
            count_g += tl.histogram(level(g), 256, mask)
            count_b += tl.histogram(level(b), 256, mask)
    start = levels + (image.to(tl.int64) * TABLES + TABLE) * (CHANNELS * 256)
    equalizing_table(count_r, start, SIZE * SIZE)
    if CHANNELS == 3:
        equalizing_table(count_g, start + 256, SIZE * SIZE)
        equalizing_table(count_b, start + 512, SIZE * SIZE)


# ---- weights of a blur


@triton.jit
def tap_weight(offset, whole, alpha):
    """Of an extended box: 1 within `whole`, `alpha` one further."""
    distance = tl.abs(offset)
    return tl.where(distance <= whole, 1.0, tl.where(distance == whole + 1, alpha, 0.0))


@triton.jit
def beyond(distance, whole, alpha):
    """The sum of an extended box's weights that lie beyond an edge pixel `distance` pixels away."""
    return tl.where(distance <= whole, whole - distance + alpha, 0.0)


@triton.jit
def box_weights_kernel(table, weights, COLUMNS: tl.constexpr, COLUMN: tl.constexpr, REACH: tl.constexpr,
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
            weight = tap_weight(target - at_first, whole, alpha)
            weight += tl.where(target == 0, beyond(at_first, whole, alpha), 0.0)
            weight += tl.where(target == SIZE - 1, beyond(SIZE - 1 - at_first, whole, alpha), 0.0)
            total += tap_weight(third, whole, alpha) * tap_weight(second, whole, alpha) * weight
    width = 2 * (whole + alpha) + 1
    out = weights + (image.to(tl.int64) * (2 * REACH + 1) + tap) * SIZE + i
    tl.store(out, total / (width * width * width), (i < SIZE) & (tap <= 2 * REACH))


@triton.jit
def gaussian_weights_kernel(table, weights, COLUMNS: tl.constexpr, COLUMN: tl.constexpr, REACH: tl.constexpr,
                             SIZE: tl.constexpr, TAPS_BLOCK: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A normalised Gaussian, the same everywhere: beyond the edge are zeros. Layout as in `box_weights_kernel`."""
    image = tl.program_id(0)
    sigma = tl.load(table + image.to(tl.int64) * COLUMNS + COLUMN + 1)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    tap = tl.arange(0, TAPS_BLOCK)[None, :]
    distance = (tap - REACH) / sigma
    weight = tl.where(tap <= 2 * REACH, tl.exp(-0.5 * distance * distance), 0.0)
    weight = weight / tl.sum(weight)
    out = weights + (image.to(tl.int64) * (2 * REACH + 1) + tap) * SIZE + i
    tl.store(out, weight + tl.zeros((BLOCK, 1), tl.float32), (i < SIZE) & (tap <= 2 * REACH))
