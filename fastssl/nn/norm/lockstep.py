"""Modules that take several resolutions layer by layer together, so that batch norm sends one message for all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm


class Lockstep(nn.Module):
    """A module that takes several resolutions layer by layer together, so that batch norm can send one message for all.

    Subclasses write `lockstep`; `forward` is a list of one.
    """

    def lockstep(self, xs: Sequence[Tensor]) -> list[Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.lockstep([x])[0]


class LockstepSequential(Lockstep, nn.Sequential):
    """Layers in sequence; a batch norm takes the ReLU that follows it along. Without layers, the identity.

    Layers that have no `lockstep` get one resolution after the other.
    """

    def lockstep(self, xs: Sequence[Tensor]) -> list[Tensor]:
        outs, layers = list(xs), list(self)
        while layers:
            layer = layers.pop(0)
            if isinstance(layer, GlobalBatchNorm) and layers and isinstance(layers[0], nn.ReLU):
                layers.pop(0)
                outs = layer.lockstep(outs, relu=True)
            elif isinstance(layer, GlobalBatchNorm | Lockstep):
                outs = layer.lockstep(outs)
            else:
                outs = [layer(x) for x in outs]
        return outs
