"""An encoder of one's own: three convolutions. In `fastssl/nn/encoders/` it would be one of ours, found by its name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fastssl.nn.encoders.encoder import Encoder
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.nn.norm.lockstep import LockstepSequential
from fastssl.nn.trunks.stem import Norm
from fastssl.nn.trunks.trunk import Trunk


@dataclass(frozen=True)
class ThreeConvs(Encoder):
    """`--set 'encoder=three_convs(width=8)'`."""

    width: int = 16

    @property
    def name(self) -> str:
        return f"ThreeConvs-{self.width}"

    def build(self, in_channels: int = 3, norm: Norm = GlobalBatchNorm) -> Trunk:
        return ThreeConvsTrunk(in_channels, self.width, norm)


class ThreeConvsTrunk(Trunk):
    """[N, in_channels, H, W] -> [N, 4 * width]."""

    def __init__(self, in_channels: int, width: int, norm: Norm):
        super().__init__()
        channels = (in_channels, width, 2 * width, 4 * width)
        layers: list[nn.Module] = []
        for inputs, outputs in zip(channels, channels[1:], strict=False):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), norm(outputs), nn.ReLU(inplace=True)]
        self.layers = LockstepSequential(*layers)
        self.num_features = channels[-1]

    def lockstep(self, xs: Sequence[Tensor]) -> list[Tensor]:
        return [x.mean(dim=(2, 3)) for x in self.layers.lockstep(xs)]
