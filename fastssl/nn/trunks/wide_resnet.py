"""Wide ResNet (Zagoruyko and Komodakis 2016) as PAWS trains it on CIFAR-10: pre-activation, convolutions with bias."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.nn.norm.lockstep import Lockstep
from fastssl.nn.recompute import Blocks
from fastssl.nn.trunks.trunk import Trunk

Norm = Callable[..., GlobalBatchNorm]


def wide_resnet(
    depth: int = 28,
    widen: int = 2,
    in_channels: int = 3,
    norm: Norm = GlobalBatchNorm,
    *,
    final_momentum: float = 0.99,
) -> "WideResNetTrunk":
    """WRN-depth-widen without classifier: [N, in_channels, H, W] -> [N, 64 * widen].

    `final_momentum` is the last batch norm's, in torch's convention: at 0.99 its running statistics are all but those
    of the latest pass, in PAWS the smallest crops'. PAWS's code has this value, most likely meant in TensorFlow's
    convention (0.01 here); the published numbers come from it.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"a Wide ResNet has depth 6k + 4, such as 10, 16, 22 or 28, not {depth}")
    return WideResNetTrunk((depth - 4) // 6, widen, in_channels, norm, final_momentum)


class PreactivationBlock(Lockstep):
    """BN, ReLU, conv, BN, ReLU, conv (which strides); shortcut of the raw x, by a 1x1 where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.bn1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.bn2 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1)
        same_shape = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if same_shape else nn.Conv2d(in_channels, channels, 1, stride)

    def lockstep(self, xs: Sequence[Tensor]) -> list[Tensor]:
        outs = [self.conv1(x) for x in self.bn1.lockstep(xs, relu=True)]
        outs = [self.conv2(out) for out in self.bn2.lockstep(outs, relu=True)]
        return [out + self.shortcut(x) for out, x in zip(outs, xs, strict=True)]


class WideResNetTrunk(Trunk):
    """3x3 stem of 16 channels, three groups of blocks, BN, ReLU, average pool; torch's default initialisation.

    `lockstep` takes images of several resolutions, in the order in which running statistics shall see them.
    """

    def __init__(self, blocks: int, widen: int, in_channels: int, norm: Norm, final_momentum: float) -> None:
        super().__init__()
        channels = 16
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        groups = []
        for group in range(3):
            layers = []
            for index in range(blocks):
                stride = 2 if group > 0 and index == 0 else 1
                layers.append(PreactivationBlock(channels, 16 * widen * 2**group, stride, norm))
                channels = 16 * widen * 2**group
            groups.append(Blocks(*layers))
        self.layer1, self.layer2, self.layer3 = groups
        self.bn1 = norm(channels, momentum=final_momentum)
        self.num_features = channels

    def lockstep(self, xs: Sequence[Tensor]) -> list[Tensor]:
        xs = [self.conv1(x) for x in xs]
        for group in (self.layer1, self.layer2, self.layer3):
            xs = group.lockstep(xs)
        return [x.mean((2, 3)) for x in self.bn1.lockstep(xs, relu=True)]
