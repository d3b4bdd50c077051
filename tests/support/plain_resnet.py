"""ResNets in torch alone, with torchvision's layout and names: what users of exported weights have. Our own writing."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace

from torch import Tensor, nn


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (out + (x if self.downsample is None else self.downsample(x))).relu()


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, downsample: nn.Module | None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv3, self.bn3 = nn.Conv2d(channels, 4 * channels, 1, bias=False), nn.BatchNorm2d(4 * channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return (self.bn3(self.conv3(out)) + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet(nn.Module):
    """`width` is the first convolution's; torchvision's is 64."""

    def __init__(self, block: type, layers: list[int], num_classes: int = 1000, width: int = 64):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.maxpool: nn.Module = nn.MaxPool2d(3, 2, 1)
        channels = width
        for group, num_blocks in enumerate(layers):
            blocks = []
            for index in range(num_blocks):
                stride, out = 2 if group and not index else 1, width * 2**group * block.expansion
                downsample = None
                if stride > 1 or channels != out:
                    downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
                blocks.append(block(channels, width * 2**group, stride, downsample))
                channels = out
            self.add_module(f"layer{group + 1}", nn.Sequential(*blocks))
        self.fc: nn.Module = nn.Linear(channels, num_classes)

    def features(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        for group in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = group(x)
        return x.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x))


class PawsAuthorsResNet(ResNet):
    """As PAWS's authors store it: the projection head is `fc`, the prediction head `pred`."""

    def __init__(self, layers: list[int], width: int, out: int):
        super().__init__(BasicBlock, layers, width=width)
        d = self.fc.in_features
        self.fc = nn.Sequential(OrderedDict(
            fc1=nn.Linear(d, d), bn1=nn.BatchNorm1d(d), relu1=nn.ReLU(),
            fc2=nn.Linear(d, d), bn2=nn.BatchNorm1d(d), relu2=nn.ReLU(), fc3=nn.Linear(d, out),
        ))  # fmt: skip
        self.pred = nn.Sequential(OrderedDict(
            bn1=nn.BatchNorm1d(out), fc1=nn.Linear(out, out // 4), bn2=nn.BatchNorm1d(out // 4), relu=nn.ReLU(),
            fc2=nn.Linear(out // 4, out),
        ))  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.pred(self.fc(self.features(x)))


_LAYERS = {
    18: (BasicBlock, [2, 2, 2, 2]),
    34: (BasicBlock, [3, 4, 6, 3]),
    50: (Bottleneck, [3, 4, 6, 3]),
    101: (Bottleneck, [3, 4, 23, 3]),
    152: (Bottleneck, [3, 8, 36, 3]),
}


def resnet(depth: int, **settings: int) -> ResNet:
    block, layers = _LAYERS[depth]
    return ResNet(block, layers, **settings)


# What stands in for the module `torchvision` where code that names it is tested.
TORCHVISION = SimpleNamespace(
    models=SimpleNamespace(
        resnet=SimpleNamespace(ResNet=ResNet, BasicBlock=BasicBlock, Bottleneck=Bottleneck),
        **{f"resnet{depth}": lambda depth=depth: resnet(depth) for depth in _LAYERS},
    )
)
