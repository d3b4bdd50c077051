"""Spans of training, in epochs, in steps or as a share, and how far a stage goes: what rates are functions of."""

from __future__ import annotations

from dataclasses import dataclass

from fastssl.errors import ConfigError


@dataclass(frozen=True)
class Epochs:
    """A span counted in passes over the stream that makes an epoch."""

    count: int

    def steps(self, steps_per_epoch: int) -> int:
        return self.count * steps_per_epoch

    def __str__(self) -> str:
        return f"{self.count:,} epochs"


@dataclass(frozen=True)
class Steps:
    """A span counted in optimiser steps."""

    count: int

    def steps(self, steps_per_epoch: int) -> int:
        return self.count

    def __str__(self) -> str:
        return f"{self.count:,} steps"


Span = Epochs | Steps


@dataclass(frozen=True)
class Share:
    """A share of the whole stage, 0 to 1, that follows its length."""

    of_all: float

    def __post_init__(self) -> None:
        if not 0 <= self.of_all <= 1:
            raise ConfigError(f"{self.of_all:g} is no share of a stage: between 0 and 100 %")

    def __str__(self) -> str:
        return f"{self.of_all:.3g} of all steps"


Warmup = Span | Share


def parse_span(text: str) -> Span:
    """`20` or `20epochs` -> Epochs(20); `300steps` -> Steps(300)."""
    number, unit = text.strip(), Epochs  # type: tuple[str, type[Span]]
    for suffix, kind in (("epochs", Epochs), ("epoch", Epochs), ("steps", Steps), ("step", Steps)):
        if number.endswith(suffix):
            number, unit = number.removesuffix(suffix).strip(), kind
            break
    if not number.isdecimal():
        raise ConfigError(f"{text!r} is no span: write 20epochs or 300steps")
    return unit(int(number))


def parse_warmup(text: str) -> Warmup:
    """A span as `parse_span` reads it, or `5%` of the stage -> Share(0.05)."""
    number = text.strip()
    if not number.endswith("%"):
        return parse_span(text)
    try:
        return Share(float(number[:-1]) / 100)
    except ValueError:
        raise ConfigError(f"{text!r} is no share: write 5%") from None


@dataclass(frozen=True)
class Horizon:
    """How far a stage goes; rates are functions of (step, horizon)."""

    steps_per_epoch: int
    total_steps: int

    def steps(self, span: Warmup) -> int:
        """Steps of `span`, or of the whole stage where that is shorter (a warm-up longer than a short trial run)."""
        if isinstance(span, Share):
            return round(span.of_all * self.total_steps)
        return min(span.steps(self.steps_per_epoch), self.total_steps)
