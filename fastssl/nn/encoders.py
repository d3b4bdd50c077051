"""Trunks as configuration: what a recipe writes down, and how it becomes a module."""

from dataclasses import dataclass

from fastssl.nn.resnet import Depth, ResNetTrunk, Stem, resnet
from fastssl.nn.wide_resnet import WideResNetTrunk, wide_resnet


@dataclass(frozen=True)
class ResNet:
    """`fastssl.nn.resnet.resnet`. `ResNet(10, stem="cifar", base_width=16)` suits small images on one CPU core."""

    depth: Depth = 50
    width: int = 1
    stem: Stem = "imagenet"
    base_width: int = 64

    def build(self, in_channels: int = 3) -> ResNetTrunk:
        """[N, in_channels, H, W] -> [N, num_features], an attribute of the module."""
        return resnet(self.depth, self.width, self.stem, in_channels, base_width=self.base_width)


@dataclass(frozen=True)
class WideResNet:
    """`fastssl.nn.wide_resnet.wide_resnet`."""

    depth: int = 28
    widen: int = 2

    def build(self, in_channels: int = 3) -> WideResNetTrunk:
        """[N, in_channels, H, W] -> [N, num_features], an attribute of the module."""
        return wide_resnet(self.depth, self.widen, in_channels)


Encoder = ResNet | WideResNet
