"""Stems, blocks and pooling of SimCLRv2, SemPPL and S4L against slow definitions."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastssl.nn.encoders.resnet import ByolResNet, ResNet, S4lResNet, SimclrResNet
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.nn.trunks import stem
from fastssl.nn.trunks.resnet import ResNetTrunk, resnet
from fastssl.nn.trunks.resnet_v2 import S4L_NORM, PreactivationBlock, PreactivationBottleneck, ResNetV2Trunk
from fastssl.nn.trunks.selective_kernel import SelectiveKernelBottleneck, SKNeXtBottleneck
from tests.support.definitions import (
    assert_same,
    batch_norm,
    normal,
    one_thread,  # noqa: F401  (every test here uses it)
    shaken,
)


@pytest.mark.parametrize("sides", [(6, 6), (7, 7), (6, 9), (1, 4)])
def test_same_max_pool_is_tensorflow_s(sides):
    """Catches padding that is split evenly on even sides, not so on odd ones, or of zeros."""
    x = normal(2, 3, *sides) - 2

    def slow(x):
        starts = []
        for side in sides:
            padding = max((math.ceil(side / 2) - 1) * 2 + 3 - side, 0)
            starts.append([2 * i - padding // 2 for i in range(math.ceil(side / 2))])
        rows = [
            [x[:, :, max(i, 0) : i + 3, max(j, 0) : j + 3].amax((2, 3)) for j in starts[1]] for i in starts[0]
        ]  # fmt: skip
        return torch.stack([torch.stack(row, -1) for row in rows], -2)

    assert_same(stem.same_max_pool, slow, nn.Identity(), [x])
    assert torch.equal(stem.same_max_pool(x), stem.symmetric_max_pool(x)) == (sides == (7, 7))


def test_zero_padded_max_pool_counts_zeros():
    """Catches padding by -inf: S4L pools convolutions' raw, partly negative outputs."""
    x = -normal(2, 3, 6, 7).abs()
    padded = torch.zeros(2, 3, 8, 9, dtype=x.dtype)
    padded[:, :, 1:-1, 1:-1] = x
    slow = torch.stack(
        [padded[:, :, i : i + 3, j : j + 3].amax((2, 3)) for i in (0, 2, 4) for j in (0, 2, 4, 6)], -1
    ).view(2, 3, 3, 4)
    pooled = stem.zero_padded_max_pool(x)
    assert torch.equal(pooled, slow)
    assert (pooled[:, :, 0] == 0).all() and (pooled[:, :, 1:, 1:-1] < 0).all()


def pooled_shortcut(x, downsample, stride):
    """ResNet-D's, pixel by pixel."""
    height, width = x.shape[2:]
    rows = []
    for i in range(0, height, stride):
        row = []
        for j in range(0, width, stride):
            window = x[:, :, i : i + 2, j : j + 2]
            count = 4 if stride == 2 else window.shape[2] * window.shape[3]
            row.append(window.sum((2, 3)) / count)
        rows.append(torch.stack(row, -1))
    pooled = torch.stack(rows, -2)
    conv, norm = downsample.get_submodule("0"), downsample.get_submodule("1")
    return batch_norm(torch.einsum("oi,nihw->nohw", conv.weight[:, :, 0, 0], pooled), norm)


@pytest.mark.parametrize("sides", [(6, 6), (5, 7)])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_pooled_shortcut_equals_its_definition(stride, sides):
    """Catches a missing pool at stride 1, padding that counts there, and padding that does not count at stride 2."""
    net = shaken(resnet(18, selective_kernel=True, base_width=8, every_group_projects=True))
    downsample = (net.layer1 if stride == 1 else net.layer2)[0].downsample
    x = normal(3, 8, *sides)
    assert_same(downsample, lambda x: pooled_shortcut(x, downsample, stride), downsample, [x])


@pytest.mark.parametrize("form", [SelectiveKernelBottleneck, SKNeXtBottleneck])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_selective_kernel_block_equals_its_definition(form, stride):
    """Catches sigmoids for a softmax, a softmax over channels, branches that swap, a pool of one branch, and a norm
    that mixes both branches."""
    trunk = ResNetTrunk(form, (1, 1, 0, 0), 16, "cifar", 3, resnet_d=form is SelectiveKernelBottleneck)
    block = (shaken(trunk).layer1 if stride == 1 else shaken(trunk).layer2)[0]
    inner = block.conv1.out_channels
    assert inner == 16 * stride * (2 if form is SKNeXtBottleneck else 1)

    def part(layer, near):  # half of the norm of both branches
        half = slice(0, inner) if near else slice(inner, None)
        norm = GlobalBatchNorm(inner).double()
        del norm.weight, norm.bias
        norm.weight, norm.bias = layer.weight[half], layer.bias[half]
        return norm

    def branch(x, near):
        if form is SKNeXtBottleneck:
            conv, dilation = (block.conv2.near, 1) if near else (block.conv2.far, 2)
            size = inner // 32
            groups = [
                F.conv2d(x[:, g * size : (g + 1) * size], conv.weight[g * size : (g + 1) * size], stride=stride,
                         padding=dilation, dilation=dilation) for g in range(32)
            ]  # fmt: skip
            return torch.cat(groups, 1)
        weight = block.conv2.weight[:inner] if near else block.conv2.weight[inner:]
        return F.conv2d(x, weight, stride=stride, padding=1)

    def slow(x):
        out = batch_norm(F.conv2d(x, block.conv1.weight), block.bn1).clamp(min=0)
        near, far = (batch_norm(branch(out, which), part(block.bn2, which)).clamp(min=0) for which in (True, False))
        selection = block.selection
        assert len(selection.fc1.weight) == 32
        hidden = batch_norm((near + far).mean((2, 3)) @ selection.fc1.weight.T, selection.bn1).clamp(min=0)
        logits = hidden @ selection.fc2.weight.T
        chosen = torch.zeros_like(near)
        for channel in range(inner):
            a, b = logits[:, channel].exp(), logits[:, inner + channel].exp()
            mixed = near[:, channel] * (a / (a + b))[:, None, None] + far[:, channel] * (b / (a + b))[:, None, None]
            chosen = torch.cat([chosen[:, :channel], mixed[:, None], chosen[:, channel + 1 :]], 1)
        out = batch_norm(F.conv2d(chosen, block.conv3.weight), block.bn3)
        if form is SelectiveKernelBottleneck:
            return (out + pooled_shortcut(x, block.downsample, stride)).clamp(min=0)
        shortcut = F.conv2d(x, block.downsample[0].weight, stride=stride)
        return (out + batch_norm(shortcut, block.downsample[1])).clamp(min=0)

    assert_same(block, slow, block, [normal(4, 16 if stride == 1 else 64, 6, 5)])


@pytest.mark.parametrize("which", [("layer1", 0), ("layer1", 1), ("layer2", 0)])
def test_a_preactivation_block_equals_its_definition(which):
    """Catches a shortcut of the raw x, a norm in the shortcut, the stride in a 1x1, an in-place ReLU on x."""
    net = shaken(ResNetV2Trunk(PreactivationBottleneck, (2, 1, 0, 0), 4, "cifar", 3))
    group, index = which
    block = getattr(net, group)[index]
    stride = 2 if group == "layer2" else 1
    x = normal(3, block.conv1.in_channels, 6, 5)
    before = x.clone()

    def slow(x):
        active = batch_norm(x, block.bn1).clamp(min=0)
        shortcut = x if index == 1 else F.conv2d(active, block.downsample.weight, stride=stride)
        out = batch_norm(F.conv2d(active, block.conv1.weight), block.bn2).clamp(min=0)
        out = batch_norm(F.conv2d(out, block.conv2.weight, stride=stride, padding=1), block.bn3).clamp(min=0)
        return F.conv2d(out, block.conv3.weight) + shortcut

    assert_same(block, slow, block, [x])
    assert torch.equal(x, before)


@pytest.mark.parametrize("which", [("layer1", 0), ("layer1", 1), ("layer2", 0)])
def test_a_preactivation_block_without_bottleneck_equals_its_definition(which):
    """Catches the stride in the second convolution, a shortcut of the raw x where the shape changes, or one with a
    convolution where it does not, as in the first group."""
    net = shaken(ResNetV2Trunk(PreactivationBlock, (2, 1, 0, 0), 4, "cifar", 3))
    group, index = which
    block, stride = getattr(net, group)[index], 2 if group == "layer2" else 1

    def slow(x):
        active = batch_norm(x, block.bn1).clamp(min=0)
        shortcut = x if group == "layer1" else F.conv2d(active, block.downsample.weight, stride=stride)
        out = batch_norm(F.conv2d(active, block.conv1.weight, stride=stride, padding=1), block.bn2).clamp(min=0)
        return F.conv2d(out, block.conv2.weight, padding=1) + shortcut

    assert_same(block, slow, block, [normal(3, block.conv1.in_channels, 6, 5)])


def test_s4l_s_stem_and_end():
    """Catches a norm or ReLU before the first block, and pooled features without the last norm and ReLU."""
    net = shaken(ResNetV2Trunk(PreactivationBottleneck, (1, 0, 0, 0), 4, "imagenet", 3))

    def slow(x):
        x = F.conv2d(x, net.conv1.weight, stride=2, padding=3)
        x = net.layer1[0](stem.zero_padded_max_pool(x))
        return batch_norm(x, net.bn1).clamp(min=0).mean((2, 3))

    assert_same(net, slow, net, [normal(3, 3, 20, 17)])
    norms = [layer for layer in S4lResNet(50, base_width=4).build().modules() if isinstance(layer, GlobalBatchNorm)]
    assert len(norms) == 49 and {(layer.eps, layer.momentum) for layer in norms} == {(1e-3, 0.01)}
    assert S4L_NORM(3).num_features == 3


def test_the_deep_stem_equals_its_definition():
    """Catches the stride in another convolution than the first, and one norm or ReLU too few or too many."""
    net = shaken(ResNetTrunk(SelectiveKernelBottleneck, (0, 0, 0, 0), 8, "imagenet", 3, resnet_d=True))

    def slow(x):
        for conv, norm, stride in (("conv1", "bn1", 2), ("conv2", "bn2", 1)):
            weight = getattr(net.conv1, conv).weight
            x = batch_norm(F.conv2d(x, weight, stride=stride, padding=1), getattr(net.conv1, norm)).clamp(min=0)
        x = F.conv2d(x, net.conv1.conv3.weight, padding=1)
        return stem.symmetric_max_pool(batch_norm(x, net.bn1).clamp(min=0)).mean((2, 3))

    assert_same(net, slow, net, [normal(3, 3, 12, 13)])
    cifar = SimclrResNet(50, selective_kernel=True, stem="cifar", base_width=8).build()
    assert cifar.conv1.kernel_size == (3, 3) and cifar.conv1.stride == (1, 1)
    assert cifar.maxpool is stem.no_pool


def test_the_first_group_projects_where_its_paper_does():
    """Catches SimCLRv2's additional projection lost, or given to PAWS's networks."""
    for encoder, projections in ((ResNet(18), 3), (SimclrResNet(18), 4), (ByolResNet(18), 4), (ResNet(50), 4)):
        with torch.device("meta"):
            names = encoder.build().state_dict()
        assert sum(name.endswith("downsample.0.weight") for name in names) == projections
