"""Modules held to slow definitions of what they compute, in float64 and one thread, from one seed."""

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def assert_same(ours, slow, module, xs):
    """`ours(*xs)` equals `slow(*xs)`, and so do the gradients with respect to the xs and the module's parameters."""
    results = []
    for function in (ours, slow):
        own = [x.clone().requires_grad_() for x in xs]
        y = function(*own)
        weights = torch.arange(y.numel(), dtype=y.dtype).sin().view_as(y)
        operands = [*own, *module.parameters()]
        results.append([y, *torch.autograd.grad((y * weights).sum(), operands, allow_unused=True)])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).abs().max() < 1e-10 * max(b.abs().max().item(), 1), (a - b).abs().max()


def batch_norm(x, layer):
    """By its definition, over all axes but the second."""
    axes = [d for d in range(x.dim()) if d != 1]
    mean, var = x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)
    shape = [1, -1] + [1] * (x.dim() - 2)
    return (x - mean) / (var + layer.eps).sqrt() * layer.weight.view(shape) + layer.bias.view(shape)


def shaken(module):
    """In float64, with norms that are neither 1 nor 0."""
    for layer in module.double().modules():
        if isinstance(layer, GlobalBatchNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            if layer.bias.requires_grad:
                nn.init.normal_(layer.bias)
    return module


@torch.no_grad()
def with_moved_norms(module):
    """In its own dtype, with batch norms, ours or others', whose weights and running statistics are neither 1 nor 0."""
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            for tensor in (layer.weight, layer.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (layer.bias, layer.running_mean):
                tensor.normal_(std=0.1)
    return module
