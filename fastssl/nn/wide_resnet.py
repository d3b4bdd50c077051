"""Wide ResNet (Zagoruyko and Komodakis 2016) as PAWS trains it on CIFAR-10: pre-activation, convolutions with bias."""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from fastssl.nn.global_batch_norm import GlobalBatchNorm


def wide_resnet(
    depth: int = 28,
    widen: int = 2,
    in_channels: int = 3,
    norm: Callable[..., nn.Module] = GlobalBatchNorm,
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


class PreactivationBlock(nn.Module):
    """BN, ReLU, conv, BN, ReLU, conv (which strides); shortcut of the raw x, by a 1x1 where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.bn1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.bn2 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1)
        same_shape = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if same_shape else nn.Conv2d(in_channels, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x), inplace=True))
        out = self.conv2(F.relu(self.bn2(out), inplace=True))
        return out + self.shortcut(x)


class WideResNetTrunk(nn.Module):
    """3x3 stem of 16 channels, three groups of blocks, BN, ReLU, average pool; torch's default initialisation."""

    def __init__(
        self, blocks: int, widen: int, in_channels: int, norm: Callable[..., nn.Module], final_momentum: float
    ) -> None:
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
            groups.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3 = groups
        self.bn1 = norm(channels, momentum=final_momentum)
        self.num_features = channels

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return F.relu(self.bn1(x), inplace=True).mean((2, 3))
