"""What an optimiser is to a method: settings that it names in its config, and how they become torch's optimiser.

A new one is a file in this folder: a frozen dataclass beside its implementation. `--set optimizer=...` finds it by its
name, and every method trains with it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.optim import Optimizer

from fastssl.errors import refuse_negative
from fastssl.optim.horizon import Horizon


@dataclass(frozen=True)
class Optimiser(ABC):
    """Settings of an optimiser; the rate is not among them, for it is set at every step."""

    num_moments: ClassVar[int] = 1  # numbers that it keeps for each parameter

    def __post_init__(self) -> None:
        refuse_negative(self)

    @abstractmethod
    def build(self, parts: Sequence[Sequence[nn.Module]]) -> Optimizer:
        """torch's optimiser of the trainable parameters of `parts`, each some modules that share a rate: first the
        encoder, then what stands above it as a classifier. A part makes two groups: what is decayed (and adapted), and
        the rest; either may be empty."""

    def decay_at(self, step: int, horizon: Horizon) -> float | None:
        """The weight decay of step 0, 1, ... of what is decayed; None where it stays what `build` made it."""
        return None
