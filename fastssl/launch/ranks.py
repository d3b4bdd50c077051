"""What is launched: a piece of work, on so many ranks of one kind of device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Work = Callable[[], Any]  # what every rank does, once all have met; it pickles


@dataclass(frozen=True)
class Ranks:
    """`world` processes on all hosts together, each with a GPU of its own or on CPUs."""

    world: int
    device: Literal["cpu", "cuda"]

    @property
    def option(self) -> str:
        """The command's word for their number."""
        return "--gpus" if self.device == "cuda" else "--cpu-ranks"
