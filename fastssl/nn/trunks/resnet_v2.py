"""Pre-activation ResNets (He et al. 2016b, "v2") as S4L trains them: batch norm and ReLU before each convolution."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from fastssl.nn.initialisers import Init, glorot_uniform, initialise
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.nn.norm.lockstep import Lockstep
from fastssl.nn.recompute import Blocks
from fastssl.nn.trunks.stem import MaxPool, Norm, Stem, no_pool, stem_convolution, zero_padded_max_pool
from fastssl.nn.trunks.trunk import Trunk

S4L_NORM = partial(GlobalBatchNorm, eps=1e-3, momentum=0.01)  # the defaults of TensorFlow 1


class PreactivationBottleneck(Lockstep):
    """Norm, ReLU, 1x1 down; norm, ReLU, 3x3 (which strides); norm, ReLU, 1x1 up to four times the channels.

    The shortcut is x itself or, where the shape changes, a 1x1 convolution of the first ReLU's output.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.bn1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn2 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn3 = norm(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        changes = stride > 1 or in_channels != out_channels
        self.downsample = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False) if changes else None

    def lockstep(self, xs: Sequence[Tensor]) -> list[Tensor]:
        active = self.bn1.lockstep(xs, relu=True)
        shortcuts = xs if self.downsample is None else [self.downsample(x) for x in active]
        outs = self.bn2.lockstep([self.conv1(x) for x in active], relu=True)
        outs = self.bn3.lockstep([self.conv2(out) for out in outs], relu=True)
        return [self.conv3(out) + shortcut for out, shortcut in zip(outs, shortcuts, strict=True)]


class PreactivationBlock(Lockstep):
    """Norm, ReLU, 3x3 (which strides); norm, ReLU, 3x3. The shortcut as in `PreactivationBottleneck`."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.bn1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        changes = stride > 1 or in_channels != channels
        self.downsample = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if changes else None

    def lockstep(self, xs: Sequence[Tensor]) -> list[Tensor]:
        active = self.bn1.lockstep(xs, relu=True)
        shortcuts = xs if self.downsample is None else [self.downsample(x) for x in active]
        outs = self.bn2.lockstep([self.conv1(x) for x in active], relu=True)
        return [self.conv2(out) + shortcut for out, shortcut in zip(outs, shortcuts, strict=True)]


class ResNetV2Trunk(Trunk):
    """Convolution and max-pool without norm, four groups of blocks, norm, ReLU, global average pool.

    `lockstep` takes images of several resolutions, in the order in which running statistics shall see them.
    """

    def __init__(
        self,
        block: type[PreactivationBlock] | type[PreactivationBottleneck],
        blocks: tuple[int, int, int, int],
        stem_channels: int,
        stem: Stem,
        in_channels: int,
        norm: Norm = S4L_NORM,
        *,
        max_pool: MaxPool = zero_padded_max_pool,
        init: Init = glorot_uniform,
    ) -> None:
        super().__init__()
        self.conv1 = stem_convolution(stem, in_channels, stem_channels)
        self.maxpool = max_pool if stem == "imagenet" else no_pool
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
        self.bn1 = norm(channels)
        self.num_features = channels
        initialise(self, init)

    def lockstep(self, xs: Sequence[Tensor]) -> list[Tensor]:
        xs = [self.maxpool(self.conv1(x)) for x in xs]
        for group in (self.layer1, self.layer2, self.layer3, self.layer4):
            xs = group.lockstep(xs)
        return [x.mean((2, 3)) for x in self.bn1.lockstep(xs, relu=True)]
