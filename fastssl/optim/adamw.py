"""AdamW (Loshchilov and Hutter, ICLR 2019, arXiv 1711.05101), as torch has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.optim import Optimizer

from fastssl.errors import ConfigError
from fastssl.optim.horizon import Horizon
from fastssl.optim.optimiser import Optimiser
from fastssl.optim.param_groups import decayed_groups
from fastssl.optim.rates import warmup_cosine


@dataclass(frozen=True)
class AdamW(Optimiser):
    """Weight decay is on kernels only: `fastssl.optim.param_groups.kernel_names`. With `final_decay` it goes there over
    the stage, from `weight_decay` along half a cosine, as DINO's does (Caron et al. 2021)."""

    num_moments: ClassVar[int] = 2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.05
    final_decay: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas are {self.betas}, but each must be 0 at least and below 1")

    def build(self, parts: Sequence[Sequence[nn.Module]]) -> Optimizer:
        return torch.optim.AdamW(decayed_groups(parts, self.weight_decay), lr=0.0, betas=self.betas, eps=self.eps)

    def decay_at(self, step: int, horizon: Horizon) -> float | None:
        if self.final_decay is None:
            return None
        ends = {"peak": self.weight_decay, "final": self.final_decay}
        return warmup_cosine(step, start=self.weight_decay, **ends, warmup_steps=0, total_steps=horizon.total_steps)
