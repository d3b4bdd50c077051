"""Batch norm's kernels against float64: on a GPU where there is one, else under Triton's interpreter (conftest.py)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl.nn.norm import triton_kernels
from fastssl.nn.norm.triton_kernels import gradient_sums, input_gradient, normalise, statistics

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative rounding of a stored result. (The interpreter cuts bfloat16 off.)
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-7}
DTYPES = tuple(ROUNDING)
# rows and channels short of whole tiles; more than one tile of rows, of channels; one row; one channel; one number
SHAPES = ((6, 3, 5, 7), (9, 130), (5, 17, 9, 9), (1, 5), (2100, 1), (1, 1, 1, 1))


@pytest.fixture(params=("short chunks", "long chunks"), autouse=True)
def chunks(request, monkeypatch):
    """As large batches do, sum several tiles in one chunk, the last one not full."""
    if request.param == "long chunks":
        monkeypatch.setattr(triton_kernels, "_SUM_PROGRAMS", 2)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> Tensor:
    """Channels-last, each channel with a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x = x * (1 + torch.arange(shape[1]) % 3).view(-1, *(1,) * (x.dim() - 2)) + mean
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return x.to(DEVICE, dtype).contiguous(memory_format=layout)


def per_channel(C: int, seed: int) -> Tensor:
    return torch.randn(C, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def rows(x: Tensor) -> Tensor:
    """float64 [M, C]."""
    return x.double().movedim(1, -1).reshape(-1, x.shape[1])


def largest(error: Tensor) -> float:
    """NaN counts as infinite."""
    return error.abs().nan_to_num(math.inf).max().item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_statistics(shape, dtype):
    """Catches rows or channels that are left out or counted twice, and an unbiased variance."""
    x = random(*shape, seed=0, dtype=dtype, mean=0.5)
    mean_C, var_C = statistics(x)
    assert mean_C.dtype == var_C.dtype == torch.float32
    assert largest(mean_C - rows(x).mean(0)) < 2e-6
    assert largest(var_C - rows(x).var(0, correction=0)) < 2e-5  # variances are 1, 4 and 9


@pytest.mark.parametrize(("mean", "relative"), ((700.0, 1e-5), (-3e4, 1e-4)))
def test_statistics_survive_a_mean_of_many_deviations(mean, relative):
    """Catches sums of squares, which in float32 lose digits of the variance at mean 700 and all of them at 3e4, and a
    mean that collects rounding errors: it is within a unit in the last place."""
    x = random(40, 3, 9, 9, seed=1, mean=mean)
    mean_C, var_C = statistics(x)
    assert largest(mean_C - rows(x).mean(0)) <= 2 ** (math.floor(math.log2(abs(mean))) - 23)
    assert largest(var_C / rows(x).var(0, correction=0) - 1) < relative


def test_a_first_row_far_away_is_one_row_among_many():
    """Catches a shift by the first row: its square would hide the variance of the others."""
    x = random(300, 2, seed=2)
    x[0] = 1e4
    assert largest(statistics(x)[1] / rows(x).var(0, correction=0) - 1) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_normalise(shape):
    """Catches a swapped scale and shift, ReLU before the residual, arithmetic in half precision, a wrong dtype."""
    C = shape[1]
    scale_C, shift_C = per_channel(C, 3), per_channel(C, 4)
    for dtype, other, relu in itertools.product(DTYPES, (None, *DTYPES), (False, True)):
        x = random(*shape, seed=5, dtype=dtype)
        residual = None if other is None else random(*shape, seed=6, dtype=other)
        y = normalise(x, scale_C, shift_C, residual, relu)
        expected = rows(x) * scale_C.double() + shift_C.double() + (0 if residual is None else rows(residual))
        expected = expected.relu() if relu else expected
        assert y.dtype == dtype and y.shape == x.shape and y.stride() == x.stride()
        assert largest((rows(y) - expected) / (1 + expected.abs())) < ROUNDING[dtype]


def masks(x: Tensor) -> dict[str, tuple[triton_kernels.Mask, Tensor]]:
    """The three ways of saying what ReLU let through, and that as a factor [M, C]."""
    scale_C, shift_C = per_channel(x.shape[1], 7), per_channel(x.shape[1], 8)
    y = random(*x.shape, seed=9, dtype=x.dtype).relu()
    from_x = rows(x) * scale_C.double() + shift_C.double() > 0
    return {"all": (None, torch.ones_like(rows(x))), "y": (y, rows(y) > 0), "x": ((scale_C, shift_C), from_x)}


@pytest.mark.parametrize("mask", ("all", "y", "x"))
@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_sums(shape, mask):
    """Catches g that is not masked, x that is not centred, and rows that are left out or counted twice."""
    for dtype in DTYPES:
        x, g = random(*shape, seed=10, dtype=dtype, mean=3.0), random(*shape, seed=11, dtype=dtype)
        mean_C, invstd_C = rows(x).mean(0).float(), per_channel(shape[1], 12).exp()
        told, factor = masks(x)[mask]
        sum_g_C, sum_g_xhat_C = gradient_sums(g, told, x, mean_C, invstd_C)
        masked = rows(g) * factor
        xhat = (rows(x) - mean_C.double()) * invstd_C.double()
        assert largest((sum_g_C - masked.sum(0)) / (1 + masked.abs().sum(0))) < 1e-6
        assert largest((sum_g_xhat_C - (masked * xhat).sum(0)) / (1 + (masked * xhat).abs().sum(0))) < 2e-6


@pytest.mark.parametrize("mask", ("all", "y", "x"))
@pytest.mark.parametrize("shape", SHAPES)
def test_input_gradient(shape, mask):
    """Catches swapped coefficients, a residual that gets the gradient ReLU cut, and one written that nobody needs."""
    a_C, b_C, c_C = (per_channel(shape[1], seed) for seed in (13, 14, 15))
    for dtype, residual_gradient in itertools.product(DTYPES, (False, True)):
        x, g = random(*shape, seed=16, dtype=dtype), random(*shape, seed=17, dtype=dtype)
        told, factor = masks(x)[mask]
        dx, masked_g = input_gradient(g, told, x, a_C, b_C, c_C, residual_gradient)
        expected = a_C.double() * rows(g) * factor + b_C.double() * rows(x) + c_C.double()
        assert dx.dtype == dtype and dx.stride() == x.stride()
        assert largest((rows(dx) - expected) / (1 + expected.abs())) < ROUNDING[dtype]
        if residual_gradient:
            assert masked_g is not None and torch.equal(rows(masked_g), rows(g) * factor)
        else:
            assert masked_g is None


@pytest.mark.parametrize("with_residual", (False, True))
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_chain_is_torchs_batch_norm(dtype, with_residual):
    """Catches a mistake between the passes: forward, and every gradient of ReLU(batch_norm(x) + residual), where ReLU
    is told by y with a residual and rebuilt from x without. Gradients are held to 1 % in half precision, where y's
    rounding is its inputs'."""
    eps, shape = 1e-5, (5, 12, 6, 6)
    x, g = random(*shape, seed=18, dtype=dtype, mean=2.0), random(*shape, seed=19, dtype=dtype)
    residual = random(*shape, seed=20, dtype=dtype) if with_residual else None
    weight_C, bias_C = per_channel(12, 21), per_channel(12, 22)

    mean_C, var_C = statistics(x)
    invstd_C = (var_C + eps).rsqrt()
    scale_C = weight_C * invstd_C
    shift_C = bias_C - mean_C * scale_C
    y = normalise(x, scale_C, shift_C, residual, relu=True)
    mask = y if with_residual else (scale_C, shift_C)
    sum_g_C, sum_g_xhat_C = gradient_sums(g, mask, x, mean_C, invstd_C)
    n = x.numel() // 12
    b_C = -scale_C * invstd_C * sum_g_xhat_C / n
    c_C = -scale_C * sum_g_C / n - b_C * mean_C
    dx, dresidual = input_gradient(g, mask, x, scale_C, b_C, c_C, residual_gradient=with_residual)

    leaves = [t.double().requires_grad_() for t in (x, weight_C, bias_C, *([residual] if with_residual else []))]
    normed = F.batch_norm(leaves[0], None, None, *leaves[1:3], training=True, eps=eps)
    expected_y = (normed + leaves[3] if with_residual else normed).relu()
    expected = [expected_y, *torch.autograd.grad(expected_y, leaves, g.double())]
    found = [y, dx, sum_g_xhat_C, sum_g_C, *([dresidual] if with_residual else [])]
    for ours, theirs in zip(found, expected, strict=True):
        assert largest(ours - theirs) <= max(4 * ROUNDING[dtype], 1e-5) * largest(theirs)


def test_nan_goes_where_torchs_goes():
    """Catches a ReLU that turns NaN into 0 and so hides it, a NaN that is masked, and one that reaches a neighbour."""
    x = random(50, 5, seed=23)
    x[31, 2] = math.nan
    ok = torch.tensor([True, True, False, True, True], device=DEVICE)
    for of_C in statistics(x):
        assert torch.equal(of_C.isfinite(), ok)
    mean_C, var_C = statistics(x)
    y = normalise(x, var_C.rsqrt(), -mean_C * var_C.rsqrt(), None, relu=True)
    assert y[:, 2].isnan().all() and y[:, ok].isfinite().all()

    ones_C, zeros_C = torch.ones(5, device=DEVICE), torch.zeros(5, device=DEVICE)
    x, g = random(50, 5, seed=23), torch.ones(50, 5, device=DEVICE)
    y = x.relu()
    y[7, 0] = math.nan  # torch's ReLU passes g there
    g[3, 4] = math.nan
    for blocked in (False, True):
        y[3, 4] = 0.0 if blocked else 1.0
        sums = gradient_sums(g, y, x, zeros_C, ones_C)
        dx, masked_g = input_gradient(g, y, x, ones_C, zeros_C, zeros_C, residual_gradient=True)
        expected = torch.ops.aten.threshold_backward(g, y, 0)
        for found in (dx, masked_g):
            assert torch.equal(found.nan_to_num(9.0), expected.nan_to_num(9.0))
        assert all(bool(of_C[4].isfinite()) == blocked and of_C[:4].isfinite().all() for of_C in sums)


def test_any_layout_gives_the_channels_last_result():
    """Catches strides that are taken for granted: NCHW, a slice, and the broadcast gradient of a mean over pixels."""
    x, g = random(4, 6, 5, 5, seed=24), random(4, 6, 5, 5, seed=25)[:, :, :1, :1].expand(4, 6, 5, 5)
    scale_C, shift_C = per_channel(6, 26), per_channel(6, 27)
    wide = torch.cat([x, x], 1)[:, :6]
    last, y = torch.channels_last, x.relu()
    for other in (x.contiguous(), wide):
        assert not other.is_contiguous(memory_format=last)
        assert torch.equal(statistics(other)[1], statistics(x)[1])
        assert torch.equal(normalise(other, scale_C, shift_C, other, True), normalise(x, scale_C, shift_C, x, True))
        for args in ((g, None), (g, y.contiguous()), (g, (scale_C, shift_C))):
            dense = [a.contiguous(memory_format=last) if isinstance(a, Tensor) else a for a in args]
            ours = gradient_sums(*args, other, shift_C, scale_C)
            assert torch.equal(torch.stack(ours), torch.stack(gradient_sums(*dense, x, shift_C, scale_C)))
            ours, theirs = (
                input_gradient(*of, scale_C, scale_C, shift_C, True) for of in ((*args, other), (*dense, x))
            )
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_many_channels():
    """Catches columns of tiles that overlap or are left out."""
    x = random(2, 8192, seed=28)
    scale_C, shift_C = per_channel(8192, 29), per_channel(8192, 30)
    assert largest(statistics(x)[0] - rows(x).mean(0)) < 1e-6
    expected = rows(x) * scale_C.double() + shift_C.double()
    assert largest(normalise(x, scale_C, shift_C, None, False) - expected) < 1e-5


def test_every_cut_covers_its_rows_within_limits(monkeypatch):
    """Catches rows beyond the last chunk, chunks that their adding up cannot hold, and offsets within a tile, or rows
    within a chunk, that pass int32."""
    monkeypatch.undo()
    for num_rows, C in itertools.product((1, 2, 63, 2049, 10**6 + 1, 2**31, 2**33), (1, 3, 64, 100, 2048, 8192)):
        cut = triton_kernels.blocks(num_rows, C)
        num_chunks = -(-num_rows // cut.chunk_rows)
        assert cut.rows * cut.channels == 2048 and cut.chunk_rows % cut.rows == 0
        assert (num_chunks - 1) * cut.chunk_rows < num_rows <= num_chunks * cut.chunk_rows
        assert num_chunks * cut.columns(C) <= 1024 and cut.rows * C < 2**31 and cut.chunk_rows < 2**31
