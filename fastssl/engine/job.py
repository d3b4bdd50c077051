"""What a run is: the job that every rank is given, and the machine it computes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastssl.engine.step import How
from fastssl.evaluation import load_protocol
from fastssl.methods.base import Stage, Stages
from fastssl.record.trackers import check_trackers


@dataclass(frozen=True)
class Job:
    """Everything that decides what a run computes, the same on every rank."""

    recipe: str
    stages: Stages
    changes: tuple[str, ...]  # what the user set, from which the recipe resolves to `stages`
    data: tuple[str, ...]
    out: Path
    seed: int
    device: Literal["cpu", "cuda"]
    world: int
    how: How | None = None  # a step is done; None: the fastest that the device is known to do well
    loader: str = "auto"
    cache_gib: float = 0.0  # decoded support images kept in memory, a rank
    damaged: Literal["stop", "replace"] = "stop"  # what an image that cannot be decoded does
    resume: Literal["auto", "never"] = "auto"
    allow_change: tuple[str, ...] = ()  # what may differ from the run that is continued
    init_from: Path | None = None
    unsafe_pickle: bool = False  # whether code in files of weights that the user names may run
    held_out: str | None = None  # labelled images (a subset) that stand in for the validation images, left unopened
    stage_to: Path | None = None  # where this host keeps copies of the data; None: read in place
    nonfinite: Literal["stop", "skip-once"] = "stop"  # what a step whose loss is not finite does
    replay: Path | None = None  # do no more than this step again, which was not finite
    log_to: tuple[str, ...] = ()  # trackers that get the metrics too
    watchdog_s: float = 300.0  # how long a rank may hold the others up; 0: for ever
    command: str = ""

    def folder(self, stage: Stage) -> Path:
        """Where `stage` keeps its files."""
        return self.out if len(self.stages) == 1 else self.out / stage.name

    def next_commands(self) -> list[str]:
        """What one would type next."""
        data = "".join(f" --data {spec}" for spec in self.data if spec != "digits")
        return [f"fastssl evaluate {self.out} --protocol knn{data}", f"fastssl embed {self.out}{data}"]

    def missing_inputs(self) -> list[str]:
        """What the user must still say to give the stages their inputs."""
        first, missing = self.stages[0], []
        for stage in self.stages:
            for name, ref in stage.needs.items():
                if ref.stage is None and ref.path is None:
                    if name != "init":
                        missing.append(f"--set {name}=PATH")
                    elif stage is not first or self.init_from is None:
                        missing.append("--init-from PATH")
        return missing

    def __post_init__(self) -> None:
        check_trackers(self.log_to)
        for name in {name for stage in self.stages for name in stage.evaluate}:
            load_protocol(name)  # a name that is unknown must not wait for the end of training
