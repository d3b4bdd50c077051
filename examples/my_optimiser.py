"""An optimiser of one's own: Lion (Chen et al., NeurIPS 2023, arXiv 2302.06675). In `fastssl/optim/` it would be one of
ours, found by its name, and every method could train with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastssl.optim.optimiser import Optimiser
from fastssl.optim.param_groups import decayed_groups


@dataclass(frozen=True)
class Lion(Optimiser):
    """`--set 'optimizer=lion(weight_decay=0.1)'`."""

    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0

    def build(self, parts: Sequence[Sequence[nn.Module]]) -> LionOptimizer:
        return LionOptimizer(decayed_groups(parts, self.weight_decay), {"lr": 0.0, "betas": self.betas})


class LionOptimizer(torch.optim.Optimizer):
    """Steps of one size, in the direction of the sign of an average of gradients."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].setdefault("average", torch.zeros_like(p))
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(torch.sign(average.lerp(p.grad, 1 - first)) * group["lr"])
                    average.lerp_(p.grad, 1 - second)
