"""ResNet trunks: torchvision's layout and key names, pooled features out, no classifier.

He et al. 2016, with the stride in the 3x3 convolution, as PAWS and SimCLRv2 have it. `width` multiplies every channel
count including the stem's, which is not what torchvision's wide ResNets do. Every batch norm starts at weight 1, those
that end a block too (PAWS's code; many others start these at 0).
"""

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn

from fastssl.nn.global_batch_norm import GlobalBatchNorm, Lockstep, LockstepSequential
from fastssl.nn.recompute import Blocks

Norm = Callable[[int], GlobalBatchNorm]
Depth = Literal[10, 18, 34, 50, 101, 152, 200]
Stem = Literal["imagenet", "cifar"]


def resnet(
    depth: int,
    width: int = 1,
    stem: Stem = "imagenet",
    in_channels: int = 3,
    norm: Norm = GlobalBatchNorm,
    *,
    base_width: int = 64,
) -> "ResNetTrunk":
    """A trunk of depth 10, 18, 34, 50, 101, 152 or 200: [N, in_channels, H, W] -> [N, num_features].

    `stem` "imagenet" is a 7x7 convolution of stride 2 and a max-pool, "cifar" a 3x3 of stride 1 (images up to 32).
    `base_width` is the stem's channel count at width 1; below 64 it makes networks for tests and for one CPU core.
    """
    if depth not in _LAYOUTS:
        raise ValueError(f"no ResNet of depth {depth}; there are {sorted(_LAYOUTS)}")
    block, blocks = _LAYOUTS[depth]
    return ResNetTrunk(block, blocks, base_width * width, stem, in_channels, norm)


class BasicBlock(Lockstep):
    """Two 3x3 convolutions around a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm(channels)
        self.downsample = _projection(in_channels, channels, stride, norm)

    def lockstep(self, xs: Sequence[Tensor]) -> list[Tensor]:
        outs = self.bn1.lockstep([self.conv1(x) for x in xs], relu=True)
        return self.bn2.lockstep([self.conv2(out) for out in outs], self.downsample.lockstep(xs), relu=True)


class Bottleneck(Lockstep):
    """1x1 down, 3x3 (which strides), 1x1 up to four times the channels, around a shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = norm(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)
        self.downsample = _projection(in_channels, out_channels, stride, norm)

    def lockstep(self, xs: Sequence[Tensor]) -> list[Tensor]:
        outs = self.bn1.lockstep([self.conv1(x) for x in xs], relu=True)
        outs = self.bn2.lockstep([self.conv2(out) for out in outs], relu=True)
        return self.bn3.lockstep([self.conv3(out) for out in outs], self.downsample.lockstep(xs), relu=True)


_LAYOUTS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    10: (BasicBlock, (1, 1, 1, 1)),
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
    200: (Bottleneck, (3, 24, 36, 3)),
}


class ResNetTrunk(Lockstep):
    """Stem, four groups of blocks, global average pool. The features have the dtype of the last block's output.

    `lockstep` takes images of several resolutions, in the order in which running statistics shall see them.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: tuple[int, int, int, int],
        stem_channels: int,
        stem: Stem,
        in_channels: int,
        norm: Norm,
    ) -> None:
        super().__init__()
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, stem_channels, 7, 2, padding=3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(3, 2, padding=1)
        elif stem == "cifar":
            self.conv1 = nn.Conv2d(in_channels, stem_channels, 3, 1, padding=1, bias=False)
            self.maxpool = nn.Identity()
        else:
            raise ValueError(f'no stem "{stem}"; there are "imagenet" and "cifar"')
        self.bn1 = norm(stem_channels)
        groups = []
        channels = stem_channels
        for group, num_blocks in enumerate(blocks):
            layers = []
            for index in range(num_blocks):
                stride = 2 if group > 0 and index == 0 else 1
                layers.append(block(channels, stem_channels * 2**group, stride, norm))
                channels = stem_channels * 2**group * block.expansion
            groups.append(Blocks(*layers))
        self.layer1, self.layer2, self.layer3, self.layer4 = groups
        self.num_features = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def lockstep(self, xs: Sequence[Tensor]) -> list[Tensor]:
        xs = self.bn1.lockstep([self.conv1(x) for x in xs], relu=True)
        xs = [self.maxpool(x) for x in xs]
        for group in (self.layer1, self.layer2, self.layer3, self.layer4):
            xs = group.lockstep(xs)
        return [x.mean((2, 3)) for x in xs]


def _projection(in_channels: int, out_channels: int, stride: int, norm: Norm) -> LockstepSequential:
    """The shortcut: a 1x1 convolution and norm where the shape changes, else x itself."""
    if stride == 1 and in_channels == out_channels:
        return LockstepSequential()
    return LockstepSequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels))
