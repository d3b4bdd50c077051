"""How a run is done, beside what it computes; each setting stands here with its option on the command line.

No torch: a command's help needs these, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

How = Literal["eager", "eager-recompute", "compiled", "graphed"]


@dataclass(frozen=True)
class Option:
    """A field on the command line: its kind and choices follow from its type. `least` is the least number it takes."""

    flag: str
    help: str
    metavar: str | None = None
    least: float | None = None


def option(default: Any, flag: str, help: str, *, metavar: str | None = None, least: float | None = None) -> Any:
    """A field with a default and an option."""
    return field(default=default, metadata={"option": Option(flag, help, metavar, least)})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What users may say of how a run is done."""

    how: How | None = option(None, "--step", "How a step is done [compiled on a GPU, eager on a CPU].")
    loader: str = option("auto", "--loader", "auto, turbo, ffcv, dali, pil or memory.")
    cache_gib: float = option(0.0, "--cache-gib", "Memory for decoded support images, a rank.", least=0)
    damaged: Literal["stop", "replace"] = option("stop", "--damaged", "At images that cannot be used.")
    resume: Literal["auto", "never"] = option("auto", "--resume", "never: begin anew, and drop what is there.")
    allow_change: tuple[str, ...] = option((), "--allow-change", "Continue a run although it differs.", metavar="KEY")
    init_from: Path | None = option(None, "--init-from", "Start from the weights of this run or file.")
    unsafe_pickle: bool = option(False, "--unsafe-pickle", "Read weights from pickles that run code: if trusted.")
    stage_to: Path | None = option(None, "--stage-to", "Copy .beton data to this local folder first.")
    log_to: tuple[str, ...] = option((), "--log-to", "Besides metrics.jsonl: tensorboard, wandb.", metavar="TRACKER")
    nonfinite: Literal["stop", "skip-once"] = option(
        "stop", "--nonfinite", "At a loss that is not finite; skip-once leaves the first such step out."
    )
    watchdog_s: float = option(
        300.0,
        "--watchdog",
        "A rank that hangs for so long is named, and the run ends; 0: never.",
        metavar="SECONDS",
        least=0,
    )
