"""AdamW (Loshchilov and Hutter, ICLR 2019, arXiv 1711.05101), as torch has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from fastssl.errors import ConfigError
from fastssl.optim.optimiser import Optimiser
from fastssl.optim.param_groups import decayed_groups


@dataclass(frozen=True)
class AdamW(Optimiser):
    """Weight decay is on kernels only: on tensors of two axes or more."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas are {self.betas}, but each must be 0 at least and below 1")

    def build(self, parts: Sequence[Sequence[nn.Module]]) -> Optimizer:
        return torch.optim.AdamW(decayed_groups(parts, self.weight_decay), lr=0.0, betas=self.betas, eps=self.eps)
