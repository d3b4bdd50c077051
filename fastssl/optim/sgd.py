"""SGD with momentum, as torch has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from fastssl.optim.optimiser import Optimiser
from fastssl.optim.param_groups import decayed_groups


@dataclass(frozen=True)
class Sgd(Optimiser):
    """Weight decay is on kernels only: `fastssl.optim.param_groups.kernel_names`."""

    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0

    def build(self, parts: Sequence[Sequence[nn.Module]]) -> Optimizer:
        groups = decayed_groups(parts, self.weight_decay)
        return torch.optim.SGD(groups, lr=0.0, momentum=self.momentum, nesterov=self.nesterov)
