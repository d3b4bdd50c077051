"""torch's batch norms with the interface of ours, and a network that takes either."""

import torch
from torch import nn

from fastssl.nn.heads import prediction_head, projection_head
from fastssl.nn.trunks.resnet import resnet


class TorchNorm2d(nn.BatchNorm2d):
    """torch's batch norm, one resolution after the other."""

    def lockstep(self, xs, residuals=None, *, relu=False):
        ys = [self(x) for x in xs]
        if residuals is not None:
            ys = [y + residual for y, residual in zip(ys, residuals, strict=True)]
        return [y.clamp(min=0) if relu else y for y in ys]


class TorchNorm1d(nn.BatchNorm1d):
    lockstep = TorchNorm2d.lockstep


class Encoder(nn.Module):
    """(x of one resolution, x of another) -> z of all rows, as PAWS has it."""

    def __init__(self, trunk_norm, head_norm):
        super().__init__()
        self.trunk = resnet(50, norm=trunk_norm, base_width=8)
        self.projection = projection_head(self.trunk.num_features, 32, norm=head_norm)
        self.prediction = prediction_head(32, norm=head_norm)

    def forward(self, x_large, x_small):
        h = self.projection.lockstep(self.trunk.lockstep([x_large, x_small]))
        return torch.cat(self.prediction.lockstep(h))
