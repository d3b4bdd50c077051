"""Global batch norm on its kernels (under Triton's interpreter where there is no GPU) against torch's batch norm."""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastssl import dist
from fastssl.nn.norm import passes, triton_kernels
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.nn.norm.triton_kernels import gradient_sums, input_gradient, normalise, statistics
from tests.parity.test_batch_norm_triton import DEVICE, ROUNDING, largest, random
from tests.ranks.pool import run_ranks

BATCH, C = 7, 6
SIZES = (5, 3)  # of images, in lockstep
CASES = tuple(itertools.product((torch.float32, torch.bfloat16), (False, True), (False, True)))


@pytest.mark.parametrize("world", (1, 2))
def test_the_layer_on_kernels_is_torchs_batch_norm(world):
    """Catches kernels that are not called, or called with another's mask, coefficients or statistics: outputs,
    gradients and running statistics of two resolutions, with and without residual and ReLU, as torch on all rows."""
    if DEVICE == "cuda" and world > 1:
        pytest.skip("the ranks here talk over gloo, on CPU")
    ranks = run_ranks(world, _layer_results) if world > 1 else [_layer_results()]
    for case, (dtype, with_residual, relu) in enumerate(CASES):
        expected = _layer_result(nn.BatchNorm2d(C).double(), dtype, with_residual, relu, slice(None))
        for name, of_torch in expected.items():
            of_ranks = [rank[case][name].double() for rank in ranks]
            if name in ("weight", "bias"):
                ours = sum(of_ranks)
            else:
                ours = of_ranks[0] if name.startswith("running") else torch.cat(of_ranks)
            tolerance = 2e-6 if name.startswith("running") else max(4 * ROUNDING[dtype], 1e-5)
            assert largest(ours - of_torch) <= tolerance * largest(of_torch), (name, dtype, with_residual, relu)


def _layer_results() -> list[dict[str, Tensor]]:
    """Of this rank, each case; with the kernels, whatever the device."""
    shard = slice(dist.rank() * 4, None if dist.rank() + 1 == dist.world_size() else 4)  # uneven: 4 and 3
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(passes, "runs_triton", return_value=True))
        calls = [
            stack.enter_context(mock.patch.object(triton_kernels, f.__name__, wraps=f))
            for f in (statistics, normalise, gradient_sums, input_gradient)
        ]
        results = [_layer_result(GlobalBatchNorm(C), *case, shard) for case in CASES]
        assert [call.call_count for call in calls] == [len(SIZES) * len(CASES)] * 4
    return results


def _layer_result(layer, dtype: torch.dtype, with_residual: bool, relu: bool, shard: slice) -> dict[str, Tensor]:
    """Inputs are rounded to `dtype`; torch's layer takes them in float64, one resolution after the other."""
    shapes = [(BATCH, C, size, size) for size in SIZES]
    double = not isinstance(layer, GlobalBatchNorm)
    xs, residuals, gs = (
        [random(*shape, seed=seed + i, dtype=dtype, mean=1.0)[shard] for i, shape in enumerate(shapes)]
        for seed in (30, 40, 50)
    )
    if double:
        xs, residuals, gs = ([t.double() for t in ts] for ts in (xs, residuals, gs))
    leaves = [t.requires_grad_() for t in (xs + residuals if with_residual else xs)]
    with torch.no_grad():
        layer.to(DEVICE).weight.copy_(torch.linspace(-1, 2, C))
        layer.bias.copy_(torch.linspace(1, -1, C))
    if double:
        ys = [layer(x) + (r if with_residual else 0) for x, r in zip(xs, residuals, strict=True)]
        ys = [y.relu() if relu else y for y in ys]
    else:
        ys = layer.lockstep(xs, residuals if with_residual else None, relu=relu)
    torch.autograd.backward(ys, gs)
    return {
        **{f"y{i}": y.detach() for i, y in enumerate(ys)},
        **{f"gradient{i}": leaf.grad for i, leaf in enumerate(leaves)},
        **{name: parameter.grad for name, parameter in layer.named_parameters()},
        **{name: buffer for name, buffer in layer.named_buffers() if name.startswith("running")},
    }


def test_the_layers_tangent_on_kernels_is_torchs(monkeypatch):
    """Catches a forward-mode derivative that the kernels' masks or coefficients break."""
    x, dx = random(BATCH, C, 5, 5, seed=60), random(BATCH, C, 5, 5, seed=61)

    def tangent(layer, x, dx):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, dx)).relu()).tangent

    expected = tangent(GlobalBatchNorm(C).to(DEVICE).double(), x.double(), dx.double())
    monkeypatch.setattr(passes, "runs_triton", lambda device: True)
    layer = GlobalBatchNorm(C).to(DEVICE)
    with forward_ad.dual_level():
        [y] = layer.lockstep([forward_ad.make_dual(x, dx)], relu=True)
        ours = forward_ad.unpack_dual(y).tangent
    assert largest(ours - expected) < 1e-5 * largest(expected)


def test_what_the_kernels_do_not_take_goes_to_torch(monkeypatch):
    """Catches float64 that is rounded, NCHW that comes back channels-last, and kernels within a compiled graph."""
    monkeypatch.setattr(passes, "runs_triton", lambda device: True)
    x = random(BATCH, C, 5, 5, seed=62)
    assert passes.on_kernels(x) and passes.on_kernels(x[:, :, 0, 0].contiguous())
    assert not passes.on_kernels(x, x.double())
    assert not passes.on_kernels(x.contiguous())
    with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
        assert not passes.on_kernels(x)
