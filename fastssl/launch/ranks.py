"""What is launched: a piece of work, on so many ranks of one kind of device; and whether that has been done already."""

from __future__ import annotations

import os
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


def launcher() -> tuple[str, int] | None:
    """Who started this process as one of several ranks, and how many; None where it stands alone.

    A job step of one task is no launcher: it may be the shell that the command was typed into.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return ("torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "the launcher"), int(os.environ["WORLD_SIZE"])
    if "SLURM_STEP_ID" in os.environ and (tasks := int(os.environ.get("SLURM_NTASKS", "1"))) > 1:
        return "srun", tasks
    return None
