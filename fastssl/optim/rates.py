"""Learning rates: what a recipe writes down, and the pure functions of the step that they are.

A new one is a file in this folder with a dataclass like those here; `--set rate=...` finds it by its name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fastssl.errors import refuse_negative
from fastssl.optim.horizon import Epochs, Horizon, Span, Warmup

# How a peak follows the batch: as it stands, times the root of the batch, or times the batch over 256.
Scaling = Literal["none", "sqrt", "linear"]


def peak_rate(base: float, batch_global: int, rule: Scaling = "sqrt") -> float:
    """The peak that `rule` makes of `base` for a batch of so many images."""
    return base * {"none": 1.0, "sqrt": math.sqrt(batch_global), "linear": batch_global / 256}[rule]


@dataclass(frozen=True)
class Rate(ABC):
    """A learning rate over a stage. `peak` is what it comes to at most."""

    peak: float

    def __post_init__(self) -> None:
        refuse_negative(self)

    @abstractmethod
    def at(self, step: int, horizon: Horizon) -> float:
        """The rate of step 0, 1, ..."""

    def with_peak(self, peak: float) -> Rate:
        """The same with another peak."""
        return replace(self, peak=peak)

    def scaled(self, batch_global: int, rule: Scaling) -> Rate:
        """The same whose peak is `rule`'s of this one."""
        return self if rule == "none" else self.with_peak(peak_rate(self.peak, batch_global, rule))


@dataclass(frozen=True)
class WarmupCosine(Rate):
    """`warmup_cosine` over the whole stage."""

    warmup: Warmup = Epochs(0)
    start: float = 0.0
    final: float = 0.0

    def at(self, step: int, horizon: Horizon) -> float:
        warmup, total = horizon.steps(self.warmup), horizon.total_steps
        return warmup_cosine(
            step, start=self.start, peak=self.peak, final=self.final, warmup_steps=warmup, total_steps=total
        )


@dataclass(frozen=True)
class WarmupStairs(Rate):
    """`warmup_stairs`, which falls after each of `falls`, counted from the stage's start."""

    falls: tuple[Span, ...]
    factor: float = 0.1
    warmup: Warmup = Epochs(0)

    def at(self, step: int, horizon: Horizon) -> float:
        at_steps = [span.steps(horizon.steps_per_epoch) for span in self.falls]
        warmup = horizon.steps(self.warmup)
        return warmup_stairs(step, peak=self.peak, factor=self.factor, at_steps=at_steps, warmup_steps=warmup)


def warmup_cosine(step: int, *, start: float, peak: float, final: float, warmup_steps: int, total_steps: int) -> float:
    """A straight line from `start` to `peak` over `warmup_steps`, then half a cosine down to `final`.

    Step 0 gives `start` (`peak` when there is no warm-up), `total_steps` and everything after it `final`.
    Source: PAWS's released schedule; SimCLR's and BYOL's are this with ``start=0, final=0``.

    Raises ValueError if the warm-up is longer than the run or a count is negative.
    """
    if step < 0 or not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"need 0 <= step and 0 <= warm-up <= total, got {step=}, {warmup_steps=}, {total_steps=}")
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    if step >= total_steps:
        return final
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_stairs(step: int, *, peak: float, factor: float, at_steps: Sequence[int], warmup_steps: int) -> float:
    """A straight line from 0 to `peak` over `warmup_steps`, then `peak` times `factor` for each of `at_steps` that has
    been reached."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * factor ** sum(step >= at for at in at_steps)
