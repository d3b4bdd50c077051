"""Wide ResNets."""

from __future__ import annotations

from dataclasses import dataclass

from fastssl.nn.encoders.encoder import Encoder, Likeness
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.nn.trunks.stem import Norm
from fastssl.nn.trunks.wide_resnet import WideResNetTrunk, wide_resnet


@dataclass(frozen=True)
class WideResNet(Encoder):
    """`fastssl.nn.trunks.wide_resnet.wide_resnet`."""

    depth: int = 28
    widen: int = 2

    @property
    def name(self) -> str:
        return f"WRN-{self.depth}-{self.widen}"

    def build(self, in_channels: int = 3, norm: Norm = GlobalBatchNorm) -> WideResNetTrunk:
        return wide_resnet(self.depth, self.widen, in_channels, norm)

    def from_torchvision(self, channels: int) -> Likeness:
        return Likeness(("pre-activation blocks in three groups, and convolutions with biases",))
