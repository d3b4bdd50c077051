"""ResNets.

Each has the conventions of the code that it is named after: where that pads, what its norms start at, how it draws its
weights. All become small ones below a `base_width` of 64: `ResNet(10, stem="cifar", base_width=16)` suits small images
on one CPU core.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastssl.nn.encoders.encoder import Encoder, Likeness
from fastssl.nn.initialisers import haiku_default, variance_scaling
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.nn.trunks.resnet import Depth, resnet, sknext
from fastssl.nn.trunks.resnet_v2 import S4L_NORM
from fastssl.nn.trunks.stem import Norm, Stem, same_max_pool
from fastssl.nn.trunks.trunk import Trunk

_UNNAMED = {10: ("BasicBlock", [1, 1, 1, 1]), 200: ("Bottleneck", [3, 24, 36, 3])}  # torchvision has no such functions


class _ResNets(Encoder):
    """What the four have in common. Each says of itself in what else it differs from torchvision's, and whether that
    can be had by changing one of these."""

    kind = "ResNet"
    depth: int
    width: int
    stem: Stem
    base_width: int

    @property
    def kernels(self) -> str | None:
        """Which selective kernels it has; None: none."""
        return None

    @property
    def name(self) -> str:
        """`ResNet-50`, `ResNet-152 3x with selective kernels`, `ResNet-10 with 16 channels for 64`."""
        wide = f" {self.width}x" if self.width > 1 else ""
        kernels = " with selective kernels" if self.kernels else ""
        narrow = f" with {self.base_width} channels for 64" if self.base_width != 64 else ""
        return f"{self.kind}-{self.depth}{wide}{kernels}{narrow}"

    def from_torchvision(self, channels: int) -> Likeness:
        depth, width, cifar = self.depth, self.base_width * self.width, self.stem == "cifar"
        differs, lines = [], [f"model = torchvision.models.resnet{depth}()"]
        if depth in _UNNAMED:
            block, blocks = _UNNAMED[depth]
            differs.append(f"depth {depth}, {blocks} blocks")
            lines = [f"model = torchvision.models.resnet.ResNet(torchvision.models.resnet.{block}, {blocks})"]
        if width != 64:
            differs.append(f"{width} channels after the first convolution instead of 64, all others in proportion")
        if channels != 3:
            differs.append(f"images of {channels} channel{'s' * (channels > 1)} instead of 3")
        if cifar:
            differs.append("a first convolution of 3x3 and stride 1, and no max-pool")
            lines.append("model.maxpool = torch.nn.Identity()")
        if cifar or channels != 3:
            shape = "3, 1, 1" if cifar else "7, 2, 3"
            lines.append(f"model.conv1 = torch.nn.Conv2d({channels}, 64, {shape}, bias=False)")
        own = self._differs_besides()
        differs, lines = [*differs, *own.differs], [*lines, *own.lines]
        if self.kernels:
            differs.append(f"selective kernels: {self.kernels}")
        if width != 64 or self.kernels or (own.differs and not own.lines):
            return Likeness(tuple(differs))
        timm = None if differs else f"resnet{depth}"
        return Likeness(tuple(differs), (*lines, "model.fc = torch.nn.Identity()"), timm)

    def _differs_besides(self) -> Likeness:
        """In what else it differs, and the lines for that."""
        return Likeness(())


class _TensorflowResNets(_ResNets):
    """With what SimCLR's and BYOL's code share."""

    def _differs_besides(self) -> Likeness:
        differs, lines = [], []
        if self.stem == "imagenet":
            differs.append("a max-pool that pads even sides at the bottom and right only, as TensorFlow's does")
            lines.append(
                "model.maxpool = torch.nn.MaxPool2d(3, 2, ceil_mode=True)  # for sizes that are multiples of 4"
            )
        if self.depth < 50:  # else it needs one anyway
            differs.append("a projection on the first block's shortcut")
            layers = "torch.nn.Conv2d(64, 64, 1, bias=False), torch.nn.BatchNorm2d(64)"
            lines.append(f"model.layer1[0].downsample = torch.nn.Sequential({layers})")
        return Likeness(tuple(differs), tuple(lines))


@dataclass(frozen=True)
class ResNet(_ResNets):
    """PAWS's, and torchvision's where `width` is 1."""

    depth: Depth = 50
    width: int = 1
    stem: Stem = "imagenet"
    base_width: int = 64

    def build(self, in_channels: int = 3, norm: Norm = GlobalBatchNorm) -> Trunk:
        return resnet(
            self.depth, self.width, stem=self.stem, in_channels=in_channels, base_width=self.base_width, norm=norm
        )


@dataclass(frozen=True)
class SimclrResNet(_TensorflowResNets):
    """SimCLRv2's. Its batch norms keep the biased running variance; ours, like torch's, the unbiased one."""

    depth: Depth = 50
    width: int = 1
    selective_kernel: bool = False
    stem: Stem = "imagenet"
    base_width: int = 64

    @property
    def kernels(self) -> str | None:
        return "SimCLRv2's, with ResNet-D's shortcuts" if self.selective_kernel else None

    def build(self, in_channels: int = 3, norm: Norm = GlobalBatchNorm) -> Trunk:
        return resnet(
            self.depth, self.width, self.selective_kernel, stem=self.stem, in_channels=in_channels,
            base_width=self.base_width, max_pool=same_max_pool, every_group_projects=True, zero_gamma=True,
            init=variance_scaling, norm=norm,
        )  # fmt: skip


@dataclass(frozen=True)
class ByolResNet(_TensorflowResNets):
    """BYOL's and SemPPL's, but for what convolutions of stride 2 pad: here both ends alike, there the far end more."""

    depth: Depth = 50
    width: int = 1
    selective_kernel: bool = False  # SKNet's own, from depth 50: SemPPL's SK encoder
    stem: Stem = "imagenet"
    base_width: int = 64

    @property
    def kernels(self) -> str | None:
        return "SKNet's, in 32 groups" if self.selective_kernel else None

    def build(self, in_channels: int = 3, norm: Norm = GlobalBatchNorm) -> Trunk:
        network = sknext if self.selective_kernel else resnet
        return network(
            self.depth, self.width, stem=self.stem, in_channels=in_channels, base_width=self.base_width,
            max_pool=same_max_pool, every_group_projects=True,
            zero_gamma=self.depth >= 50,  # not in Haiku's blocks without bottleneck
            init=haiku_default, norm=norm,
        )  # fmt: skip


@dataclass(frozen=True)
class S4lResNet(_ResNets):
    """S4L's ResNet v2; MOAM's has width 4. Half as wide: `base_width=32`."""

    kind = "ResNet-v2"
    depth: Depth = 50
    width: int = 1
    stem: Stem = "imagenet"
    base_width: int = 64

    def build(self, in_channels: int = 3, norm: Norm = S4L_NORM) -> Trunk:
        return resnet(
            self.depth, self.width, preactivation=True, stem=self.stem, in_channels=in_channels,
            base_width=self.base_width, norm=norm,
        )  # fmt: skip

    def _differs_besides(self) -> Likeness:
        return Likeness(("pre-activation blocks (ResNet v2), and a max-pool padded by zeros, which count as values",))
