"""ResNet trunks: torchvision's layout and key names, pooled features out, no classifier.

He et al. 2016, with the stride in the 3x3 convolution, as PAWS, SimCLRv2 and SemPPL have it. `width` multiplies every
channel count including the stem's, which is not what torchvision's wide ResNets do. What a paper's code does its own
way is an argument of `ResNetTrunk`; by default it is PAWS's way. `fastssl.nn.encoders` has the papers by name.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from fastssl.nn.initialisers import Init, initialise, kaiming_fan_out
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.nn.norm.lockstep import Lockstep, LockstepSequential
from fastssl.nn.recompute import Blocks
from fastssl.nn.trunks.resnet_v2 import PreactivationBlock, PreactivationBottleneck, ResNetV2Trunk
from fastssl.nn.trunks.selective_kernel import SelectiveKernelBottleneck, SKNeXtBottleneck
from fastssl.nn.trunks.stem import MaxPool, Norm, Stem, deep_stem, no_pool, stem_convolution, symmetric_max_pool
from fastssl.nn.trunks.trunk import Trunk

Depth = Literal[10, 18, 34, 50, 101, 152, 200]


def resnet(
    depth: int,
    width: int = 1,
    selective_kernel: bool = False,
    preactivation: bool = False,
    stem: Stem = "imagenet",
    *,
    in_channels: int = 3,
    base_width: int = 64,
    **conventions: Any,
) -> "ResNetTrunk | ResNetV2Trunk":
    """A trunk of depth 10, 18, 34, 50, 101, 152 or 200: [N, in_channels, H, W] -> [N, num_features].

    selective_kernel  SimCLRv2's, with ResNet-D's stem and shortcuts; blocks without bottleneck (depth below 50) have
                      the latter only, as in SimCLRv2's code for TensorFlow 2 (that for TensorFlow 1 crashes)
    preactivation     S4L's ResNet v2, without selective kernels
    stem              "imagenet" is a 7x7 convolution of stride 2 and a max-pool, "cifar" a 3x3 of stride 1 (images up
                      to 32)
    base_width        the stem's channel count at width 1; below 64 it makes networks for tests and for one CPU core
    conventions       further arguments of `ResNetTrunk` or, with preactivation, `ResNetV2Trunk`: norm, init, max_pool…
    """
    block, blocks = _layout(depth)
    channels = base_width * width
    if preactivation:
        if selective_kernel:
            raise ValueError("pre-activation networks have no selective kernels")
        v2_block = PreactivationBottleneck if block is Bottleneck else PreactivationBlock
        return ResNetV2Trunk(v2_block, blocks, channels, stem, in_channels, **conventions)
    if selective_kernel and block is Bottleneck:
        block = SelectiveKernelBottleneck
    return ResNetTrunk(block, blocks, channels, stem, in_channels, resnet_d=selective_kernel, **conventions)


def sknext(
    depth: int,
    width: int = 1,
    stem: Stem = "imagenet",
    *,
    in_channels: int = 3,
    base_width: int = 64,
    **conventions: Any,
) -> "ResNetTrunk":
    """As `resnet`, from depth 50, with SKNet's own selective kernels in 32 groups, without ResNet-D: SemPPL's.

    `base_width` times `width` must be a multiple of 16, so that 32 groups divide all channels.
    """
    block, blocks = _layout(depth)
    if block is not Bottleneck:
        raise ValueError(f"SKNeXt has bottlenecks, depth 50 or more, not {depth}")
    if base_width * width % 16:
        raise ValueError(f"SKNeXt's 32 groups need a base width times width of 16, 32, ..., not {base_width * width}")
    return ResNetTrunk(SKNeXtBottleneck, blocks, base_width * width, stem, in_channels, **conventions)


class BasicBlock(Lockstep):
    """Two 3x3 convolutions around a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm, downsample: Lockstep) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm(channels)
        self.downsample = downsample

    @property
    def last_norm(self) -> GlobalBatchNorm:
        return self.bn2

    def lockstep(self, xs: Sequence[Tensor]) -> list[Tensor]:
        outs = self.bn1.lockstep([self.conv1(x) for x in xs], relu=True)
        return self.bn2.lockstep([self.conv2(out) for out in outs], self.downsample.lockstep(xs), relu=True)


class Bottleneck(Lockstep):
    """1x1 down, 3x3 (which strides), 1x1 up to four times the channels, around a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm, downsample: Lockstep) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = norm(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)
        self.downsample = downsample

    @property
    def last_norm(self) -> GlobalBatchNorm:
        return self.bn3

    def lockstep(self, xs: Sequence[Tensor]) -> list[Tensor]:
        outs = self.bn1.lockstep([self.conv1(x) for x in xs], relu=True)
        outs = self.bn2.lockstep([self.conv2(out) for out in outs], relu=True)
        return self.bn3.lockstep([self.conv3(out) for out in outs], self.downsample.lockstep(xs), relu=True)


Block = type[BasicBlock] | type[Bottleneck] | type[SelectiveKernelBottleneck]

_LAYOUTS: dict[int, tuple[Block, tuple[int, int, int, int]]] = {
    10: (BasicBlock, (1, 1, 1, 1)),
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
    200: (Bottleneck, (3, 24, 36, 3)),
}


def _layout(depth: int) -> tuple[Block, tuple[int, int, int, int]]:
    if depth not in _LAYOUTS:
        raise ValueError(f"no ResNet of depth {depth}; there are {sorted(_LAYOUTS)}")
    return _LAYOUTS[depth]


class ResNetTrunk(Trunk):
    """Stem, four groups of blocks, global average pool. The features have the dtype of the last block's output.

    resnet_d              three 3x3 convolutions for the stem's 7x7, and shortcuts that pool before they project
    max_pool              the "imagenet" stem's
    every_group_projects  the first block of the first group has a projection where its shape would need none, too
    zero_gamma            the norm that ends a block starts at weight 0, so that a block starts as its shortcut
    init                  draws the weights

    `lockstep` takes images of several resolutions, in the order in which running statistics shall see them.
    """

    def __init__(
        self,
        block: Block,
        blocks: tuple[int, int, int, int],
        stem_channels: int,
        stem: Stem,
        in_channels: int,
        norm: Norm = GlobalBatchNorm,
        *,
        resnet_d: bool = False,
        max_pool: MaxPool = symmetric_max_pool,
        every_group_projects: bool = False,
        zero_gamma: bool = False,
        init: Init = kaiming_fan_out,
    ) -> None:
        super().__init__()
        projection = _pooled_projection if resnet_d else _projection
        self.conv1: nn.Module = (
            deep_stem(in_channels, stem_channels, norm)
            if resnet_d and stem == "imagenet"
            else stem_convolution(stem, in_channels, stem_channels)
        )
        self.bn1 = norm(stem_channels)
        self.maxpool = max_pool if stem == "imagenet" else no_pool
        groups = []
        channels = stem_channels
        for group, num_blocks in enumerate(blocks):
            layers = []
            for index in range(num_blocks):
                stride = 2 if group > 0 and index == 0 else 1
                out_channels = stem_channels * 2**group * block.expansion
                projects = stride > 1 or channels != out_channels or (every_group_projects and index == 0)
                downsample = projection(channels, out_channels, stride, norm) if projects else LockstepSequential()
                layers.append(block(channels, stem_channels * 2**group, stride, norm, downsample))
                channels = out_channels
            groups.append(Blocks(*layers))
        self.layer1, self.layer2, self.layer3, self.layer4 = groups
        self.num_features = channels
        initialise(self, init)
        for layer in self.modules():
            if zero_gamma and isinstance(layer, BasicBlock | Bottleneck | SelectiveKernelBottleneck):
                nn.init.zeros_(layer.last_norm.weight)

    def lockstep(self, xs: Sequence[Tensor]) -> list[Tensor]:
        xs = self.conv1.lockstep(xs) if isinstance(self.conv1, Lockstep) else [self.conv1(x) for x in xs]
        xs = self.bn1.lockstep(xs, relu=True)
        xs = [self.maxpool(x) for x in xs]
        for group in (self.layer1, self.layer2, self.layer3, self.layer4):
            xs = group.lockstep(xs)
        return [x.mean((2, 3)) for x in xs]


def _projection(in_channels: int, out_channels: int, stride: int, norm: Norm) -> LockstepSequential:
    """The shortcut where the shape changes: a 1x1 convolution and norm."""
    return LockstepSequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels))


def _pooled_projection(in_channels: int, out_channels: int, stride: int, norm: Norm) -> LockstepSequential:
    """ResNet-D's: a 2x2 average pool takes the stride. Convolution and norm keep their names, 0 and 1."""
    pool = _SameAveragePool() if stride == 1 else _StridedAveragePool()
    conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    return LockstepSequential(OrderedDict([("pool", pool), ("0", conv), ("1", norm(out_channels))]))


class _SameAveragePool(nn.Module):
    """2x2 of stride 1; at the bottom and right edges the mean of what there is."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2, 1, padding=1, count_include_pad=False)[:, :, 1:, 1:]


class _StridedAveragePool(nn.Module):
    """2x2 of stride 2; an odd side has a zero at the bottom or right, which counts."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2, 2, ceil_mode=True, divisor_override=4)
