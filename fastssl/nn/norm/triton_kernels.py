"""Batch norm's passes over memory as Triton kernels: what `global_batch_norm` runs on CUDA when it is not compiled.

Batch norm does little arithmetic: it is as fast as its traffic is small. Each function here reads every operand once
and writes every result once, the residual sum and the ReLU of a residual block included:

    forward     statistics       reads x                  normalise         reads x, residual, writes y
    backward    gradient_sums    reads g, x, y            input_gradient    reads g, x, y, writes dx, masked g

What ReLU let through is read from y or, where there was no residual, rebuilt from x: a read less in both of the latter.

x, g, y and residual are [N, C] or [N, C, H, W], float32, bfloat16 or float16 in any mix. They are taken as M rows of C
channels: dense channels-last memory as it stands, any other layout after a copy to it. Arithmetic and tensors "_C"
(one number per channel, contiguous) are float32.

Sums over rows go by chunks of rows, then over the chunks, in an order that only the shape decides: the same input has
the same statistics to the last bit, on any GPU.

Not yet run on a GPU: held to float64 references under Triton's interpreter, and compiled for sm_80 and sm_90.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# What ReLU let through: y > 0; or, for y = ReLU(x * scale + shift), the pair (scale_C, shift_C); or, without ReLU, all.
Mask = Tensor | tuple[Tensor, Tensor] | None


# ---- kernels; a program has one tile of ROWS x CHANNELS in hand at a time


@triton.jit
def _load(tensor, start, offsets, inside):
    return tl.load(tensor + start + offsets, inside, 0.0).to(tl.float32)


@triton.jit
def _of_channels(tensor_C, channel, C):
    return tl.load(tensor_C + channel, channel < C, 0.0)[None, :]


@triton.jit
def _column(C, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """Of this program's column of tiles: the channels [CHANNELS]; the tile's rows [ROWS]; offsets in memory [ROWS,
    CHANNELS] from the tile's first row."""
    channel = tl.program_id(0) % tl.cdiv(C, CHANNELS) * CHANNELS + tl.arange(0, CHANNELS)
    row = tl.arange(0, ROWS)
    return channel, row, row[:, None] * C + channel[None, :]


@triton.jit
def _passed(g, x, y, scale_C, shift_C, start, offsets, inside, channel, C):
    """g where ReLU let it through. By torch's rule it passes where y is NaN."""
    if y is not None:
        g = tl.where(_load(y, start, offsets, inside) <= 0, 0.0, g)
    elif scale_C is not None:
        z = tl.fma(x, _of_channels(scale_C, channel, C), _of_channels(shift_C, channel, C))
        g = tl.where(z <= 0, 0.0, g)
    return g


@triton.jit
def _merged(mean, m2, n):
    """Mean and sum of squared deviations of several sets of n [R, 1] numbers as one, from the sets' own [R, CHANNELS].

    The first set must not be empty: taken relative to its mean, the means' weighted sum loses no digits to their size.
    """
    total = tl.sum(n, 0)
    first = tl.sum(tl.where(tl.arange(0, mean.shape[0])[:, None] == 0, mean, 0.0), 0)
    shift = tl.sum(n * (mean - first[None, :]), 0) / total
    deviation = (mean - first[None, :]) - shift[None, :]
    return first + shift, tl.sum(m2 + n * deviation * deviation, 0)


@triton.jit(do_not_specialize=["num_rows", "chunk_rows"])
def _statistics_kernel(x, means, m2s, num_rows, C, chunk_rows, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
                       STAGES: tl.constexpr):  # fmt: skip
    """One chunk's mean and sum of squared deviations: Welford's in every row of the tile, then these merged."""
    channel, row, offsets = _column(C, ROWS, CHANNELS)
    chunk = tl.program_id(1)
    first = chunk.to(tl.int64) * chunk_rows
    num = tl.minimum(num_rows - first, chunk_rows).to(tl.int32)
    mean = tl.zeros((ROWS, CHANNELS), tl.float32)
    m2 = tl.zeros((ROWS, CHANNELS), tl.float32)
    for i in tl.range(tl.cdiv(num, ROWS), num_stages=STAGES):
        exists = (i * ROWS + row < num)[:, None]
        value = _load(x, (first + i * ROWS) * C, offsets, exists & (channel < C)[None, :])
        difference = tl.where(exists, value - mean, 0.0)
        mean += difference * (1.0 / (i + 1))
        m2 += difference * (value - mean)
    n = tl.maximum(tl.cdiv(num - row, ROWS), 0).to(tl.float32)
    mean_C, m2_C = _merged(mean, m2, n[:, None])
    tl.store(means + chunk * C + channel, mean_C, channel < C)
    tl.store(m2s + chunk * C + channel, m2_C, channel < C)


@triton.jit(do_not_specialize=["num_rows", "chunk_rows", "num_chunks"])
def _merge_chunks_kernel(means, m2s, mean_C, var_C, num_rows, C, chunk_rows, num_chunks, CHUNKS: tl.constexpr,
                         CHANNELS: tl.constexpr):  # fmt: skip
    channel, chunk, offsets = _column(C, CHUNKS, CHANNELS)
    inside = (chunk < num_chunks)[:, None] & (channel < C)[None, :]
    n = tl.minimum(num_rows - chunk.to(tl.int64) * chunk_rows, chunk_rows)
    n = tl.maximum(n, 0).to(tl.float32)[:, None]
    mean, m2 = _merged(_load(means, 0, offsets, inside), _load(m2s, 0, offsets, inside), n)
    tl.store(mean_C + channel, mean, channel < C)
    tl.store(var_C + channel, m2 / num_rows, channel < C)


@triton.jit(do_not_specialize=["num_rows"])
def _normalise_kernel(x, residual, y, scale_C, shift_C, num_rows, C, RELU: tl.constexpr, ROWS: tl.constexpr,
                      CHANNELS: tl.constexpr):  # fmt: skip
    channel, row, offsets = _column(C, ROWS, CHANNELS)
    first = (tl.program_id(0) // tl.cdiv(C, CHANNELS)).to(tl.int64) * ROWS
    inside = (first + row < num_rows)[:, None] & (channel < C)[None, :]
    z = tl.fma(
        _load(x, first * C, offsets, inside), _of_channels(scale_C, channel, C), _of_channels(shift_C, channel, C)
    )
    if residual is not None:
        z += _load(residual, first * C, offsets, inside)
    if RELU:
        z = tl.where(z <= 0, 0.0, z)  # NaN stays
    tl.store(y + first * C + offsets, z, inside)


@triton.jit(do_not_specialize=["num_rows", "chunk_rows"])
def _gradient_sums_kernel(g, y, x, mean_C, scale_C, shift_C, sums_g, sums_gx, num_rows, C, chunk_rows,
                          ROWS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """One chunk's sum of g and of g * (x - mean)."""
    channel, row, offsets = _column(C, ROWS, CHANNELS)
    chunk = tl.program_id(1)
    first = chunk.to(tl.int64) * chunk_rows
    num = tl.minimum(num_rows - first, chunk_rows).to(tl.int32)
    mean = _of_channels(mean_C, channel, C)
    sum_g = tl.zeros((ROWS, CHANNELS), tl.float32)
    sum_gx = tl.zeros((ROWS, CHANNELS), tl.float32)
    for i in tl.range(tl.cdiv(num, ROWS), num_stages=STAGES):
        start = (first + i * ROWS) * C
        inside = (i * ROWS + row < num)[:, None] & (channel < C)[None, :]
        value = _load(x, start, offsets, inside)
        gradient = _load(g, start, offsets, inside)
        gradient = _passed(gradient, value, y, scale_C, shift_C, start, offsets, inside, channel, C)
        sum_g += gradient
        sum_gx += gradient * (value - mean)
    tl.store(sums_g + chunk * C + channel, tl.sum(sum_g, 0), channel < C)
    tl.store(sums_gx + chunk * C + channel, tl.sum(sum_gx, 0), channel < C)


@triton.jit(do_not_specialize=["num_chunks"])
def _add_chunks_kernel(sums_g, sums_gx, invstd_C, sum_g_C, sum_g_xhat_C, C, num_chunks, CHUNKS: tl.constexpr,
                       CHANNELS: tl.constexpr):  # fmt: skip
    channel, chunk, offsets = _column(C, CHUNKS, CHANNELS)
    inside = (chunk < num_chunks)[:, None] & (channel < C)[None, :]
    tl.store(sum_g_C + channel, tl.sum(_load(sums_g, 0, offsets, inside), 0), channel < C)
    sum_gx = tl.sum(_load(sums_gx, 0, offsets, inside), 0)
    tl.store(sum_g_xhat_C + channel, sum_gx * tl.load(invstd_C + channel, channel < C, 0.0), channel < C)


@triton.jit(do_not_specialize=["num_rows"])
def _input_gradient_kernel(g, y, x, scale_C, shift_C, a_C, b_C, c_C, dx, masked_g, num_rows, C, ROWS: tl.constexpr,
                           CHANNELS: tl.constexpr):  # fmt: skip
    channel, row, offsets = _column(C, ROWS, CHANNELS)
    first = (tl.program_id(0) // tl.cdiv(C, CHANNELS)).to(tl.int64) * ROWS
    start = first * C
    inside = (first + row < num_rows)[:, None] & (channel < C)[None, :]
    value = _load(x, start, offsets, inside)
    gradient = _load(g, start, offsets, inside)
    gradient = _passed(gradient, value, y, scale_C, shift_C, start, offsets, inside, channel, C)
    of_x = tl.fma(value, _of_channels(b_C, channel, C), _of_channels(c_C, channel, C))
    tl.store(dx + start + offsets, tl.fma(gradient, _of_channels(a_C, channel, C), of_x), inside)
    if masked_g is not None:
        tl.store(masked_g + start + offsets, gradient, inside)


# ---- launches


class Blocks(NamedTuple):
    """How [M, C] is cut. `rows` x `channels` are a tile; `chunk_rows` are summed by one program, tile after tile."""

    rows: int
    channels: int
    chunk_rows: int

    def columns(self, num_channels: int) -> int:
        return triton.cdiv(num_channels, self.channels)


# Numbers of a tile: 8 for each of a program's 256 threads, one load of 16 bytes from a half-precision tensor. With 128
# threads, twice as many numbers in registers let a quarter to a third of the warps live at once.
_TILE = 2048
_WARPS = 8
# 128 channels in half precision are 256 bytes: whole cache lines, and rows enough in a tile to hide their latency.
_MAX_TILE_CHANNELS = 128
# Programs of a sum: about eight for each multiprocessor of the largest GPU (132), as many as its registers hold at
# once. Never more chunks than that, so that one tile holds all of a channel's.
_SUM_PROGRAMS = 1024
# Numbers of the tile that adds up chunks: eight channels, one 32-byte sector, at the most chunks.
_CHUNKS_TILE = 8 * _SUM_PROGRAMS


def blocks(num_rows: int, num_channels: int) -> Blocks:
    """A function of the shape alone, as sums must come out the same on every GPU and in a resumed run."""
    channels = min(triton.next_power_of_2(num_channels), _MAX_TILE_CHANNELS)
    rows = _TILE // channels
    num_chunks = max(1, _SUM_PROGRAMS // triton.cdiv(num_channels, channels))
    return Blocks(rows, channels, triton.cdiv(triton.cdiv(num_rows, num_chunks), rows) * rows)


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of x's rows, at least one. As exact where |mean| is many standard deviations."""
    x, num_rows, C = _rows(x)
    cut = blocks(num_rows, C)
    num_chunks = triton.cdiv(num_rows, cut.chunk_rows)
    means, m2s = torch.empty(2, num_chunks, C, device=x.device)
    mean_C, var_C = torch.empty(2, C, device=x.device)
    _statistics_kernel[(cut.columns(C), num_chunks)](
        x, means, m2s, num_rows, C, cut.chunk_rows, ROWS=cut.rows, CHANNELS=cut.channels, STAGES=_stages(x),
        num_warps=_WARPS,
    )  # fmt: skip
    grid, constants = _chunks_launch(num_chunks, C)
    _merge_chunks_kernel[grid](means, m2s, mean_C, var_C, num_rows, C, cut.chunk_rows, num_chunks, **constants)
    return mean_C, var_C


def normalise(x: Tensor, scale_C: Tensor, shift_C: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """x * scale + shift + residual, then ReLU where `relu`; dtype and shape of x, channels-last."""
    x, num_rows, C = _rows(x)
    residual = None if residual is None else _rows(residual).x
    y = torch.empty_like(x)
    cut = blocks(num_rows, C)
    _normalise_kernel[(cut.columns(C) * triton.cdiv(num_rows, cut.rows),)](
        x, residual, y, scale_C, shift_C, num_rows, C, RELU=relu, ROWS=cut.rows, CHANNELS=cut.channels
    )
    return y


def gradient_sums(g: Tensor, mask: Mask, x: Tensor, mean_C: Tensor, invstd_C: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over the rows [C] of the masked g, and of the masked g * (x - mean) * invstd."""
    g, (x, num_rows, C) = _rows(g).x, _rows(x)
    cut = blocks(num_rows, C)
    num_chunks = triton.cdiv(num_rows, cut.chunk_rows)
    sums_g, sums_gx = torch.empty(2, num_chunks, C, device=x.device)
    sum_g_C, sum_g_xhat_C = torch.empty(2, C, device=x.device)
    y, scale_C, shift_C = _mask_arguments(mask)
    _gradient_sums_kernel[(cut.columns(C), num_chunks)](
        g, y, x, mean_C, scale_C, shift_C, sums_g, sums_gx, num_rows, C, cut.chunk_rows, ROWS=cut.rows,
        CHANNELS=cut.channels, STAGES=_stages(x), num_warps=_WARPS, maxnreg=64,
    )  # fmt: skip
    grid, constants = _chunks_launch(num_chunks, C)
    _add_chunks_kernel[grid](sums_g, sums_gx, invstd_C, sum_g_C, sum_g_xhat_C, C, num_chunks, **constants)
    return sum_g_C, sum_g_xhat_C


def input_gradient(
    g: Tensor, mask: Mask, x: Tensor, a_C: Tensor, b_C: Tensor, c_C: Tensor, residual_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """a * masked g + b * x + c in x's dtype; and, where `residual_gradient`, the masked g (g itself without ReLU)."""
    g, (x, num_rows, C) = _rows(g).x, _rows(x)
    dx = torch.empty_like(x)
    masked_g = torch.empty_like(g) if residual_gradient and mask is not None else None
    y, scale_C, shift_C = _mask_arguments(mask)
    cut = blocks(num_rows, C)
    _input_gradient_kernel[(cut.columns(C) * triton.cdiv(num_rows, cut.rows),)](
        g, y, x, scale_C, shift_C, a_C, b_C, c_C, dx, masked_g, num_rows, C, ROWS=cut.rows, CHANNELS=cut.channels,
        num_warps=_WARPS,
    )  # fmt: skip
    return dx, g if residual_gradient and mask is None else masked_g


def _stages(x: Tensor) -> int:
    """Tiles that a sum has on their way at once, as far as shared memory leaves room for half of the warps."""
    return 3 if x.element_size() < 4 else 2


class _Rows(NamedTuple):
    x: Tensor  # dense, the channels of one row side by side
    num_rows: int
    num_channels: int


def _rows(x: Tensor) -> _Rows:
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return _Rows(x.contiguous(memory_format=layout), x.numel() // x.shape[1], x.shape[1])


def _mask_arguments(mask: Mask) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """y, scale_C, shift_C."""
    if isinstance(mask, tuple):
        return None, *mask
    return (None if mask is None else _rows(mask).x), None, None


def _chunks_launch(num_chunks: int, num_channels: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and tile where all chunks of some channels are added up in one program."""
    chunks = triton.next_power_of_2(num_chunks)
    channels = min(_CHUNKS_TILE // chunks, triton.next_power_of_2(num_channels), _MAX_TILE_CHANNELS)
    return (triton.cdiv(num_channels, channels),), {"CHUNKS": chunks, "CHANNELS": channels, "num_warps": 8}
