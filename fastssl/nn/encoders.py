"""Trunks as configuration: what a recipe writes down, and how it becomes a module.

Each has the conventions of the code that it is named after: where that pads, what its norms start at, how it draws its
weights. All that have `base_width` become small ones below 64: `ResNet(10, stem="cifar", base_width=16)` suits small
images on one CPU core.
"""

from dataclasses import dataclass

from fastssl.nn.initialisers import haiku_default, variance_scaling
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.nn.trunks.resnet import BottleneckDepth, Depth, ResNetTrunk, ResNetV2Trunk, resnet, sknext
from fastssl.nn.trunks.resnet_v2 import S4L_NORM
from fastssl.nn.trunks.stem import Norm, Stem, same_max_pool
from fastssl.nn.trunks.wide_resnet import WideResNetTrunk, wide_resnet

Trunk = ResNetTrunk | ResNetV2Trunk | WideResNetTrunk


@dataclass(frozen=True)
class ResNet:
    """PAWS's, and torchvision's where `width` is 1."""

    depth: Depth = 50
    width: int = 1
    stem: Stem = "imagenet"
    base_width: int = 64

    def build(self, in_channels: int = 3, norm: Norm = GlobalBatchNorm) -> Trunk:
        """[N, in_channels, H, W] -> [N, num_features], an attribute of the module."""
        return resnet(
            self.depth, self.width, stem=self.stem, in_channels=in_channels, base_width=self.base_width, norm=norm
        )


@dataclass(frozen=True)
class SimclrResNet:
    """SimCLRv2's. Its batch norms keep the biased running variance; ours, like torch's, the unbiased one."""

    depth: Depth = 50
    width: int = 1
    selective_kernel: bool = False
    stem: Stem = "imagenet"
    base_width: int = 64

    def build(self, in_channels: int = 3, norm: Norm = GlobalBatchNorm) -> Trunk:
        """[N, in_channels, H, W] -> [N, num_features], an attribute of the module."""
        return resnet(
            self.depth, self.width, self.selective_kernel, stem=self.stem, in_channels=in_channels,
            base_width=self.base_width, max_pool=same_max_pool, every_group_projects=True, zero_gamma=True,
            init=variance_scaling, norm=norm,
        )  # fmt: skip


@dataclass(frozen=True)
class ByolResNet:
    """BYOL's and SemPPL's, but for what convolutions of stride 2 pad: here both ends alike, there the far end more."""

    depth: Depth = 50
    width: int = 1
    selective_kernel: bool = False  # SKNet's own, from depth 50: SemPPL's SK encoder
    stem: Stem = "imagenet"
    base_width: int = 64

    def build(self, in_channels: int = 3, norm: Norm = GlobalBatchNorm) -> Trunk:
        """[N, in_channels, H, W] -> [N, num_features], an attribute of the module."""
        network = sknext if self.selective_kernel else resnet
        return network(
            self.depth, self.width, stem=self.stem, in_channels=in_channels, base_width=self.base_width,
            max_pool=same_max_pool, every_group_projects=True,
            zero_gamma=self.depth >= 50,  # not in Haiku's blocks without bottleneck
            init=haiku_default, norm=norm,
        )  # fmt: skip


@dataclass(frozen=True)
class S4lResNet:
    """S4L's ResNet v2; MOAM's has width 4."""

    depth: BottleneckDepth = 50
    width: int = 1
    stem: Stem = "imagenet"
    base_width: int = 64

    def build(self, in_channels: int = 3, norm: Norm = S4L_NORM) -> Trunk:
        """[N, in_channels, H, W] -> [N, num_features], an attribute of the module."""
        return resnet(
            self.depth, self.width, preactivation=True, stem=self.stem, in_channels=in_channels,
            base_width=self.base_width, norm=norm,
        )  # fmt: skip


@dataclass(frozen=True)
class WideResNet:
    """`fastssl.nn.trunks.wide_resnet.wide_resnet`."""

    depth: int = 28
    widen: int = 2

    def build(self, in_channels: int = 3, norm: Norm = GlobalBatchNorm) -> Trunk:
        """[N, in_channels, H, W] -> [N, num_features], an attribute of the module."""
        return wide_resnet(self.depth, self.widen, in_channels, norm)


Encoder = ResNet | SimclrResNet | ByolResNet | S4lResNet | WideResNet
