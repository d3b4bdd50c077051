"""What a run is: the job that every rank is given."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from fastssl.config.modules import load_modules, modules_of
from fastssl.config.plain import to_plain
from fastssl.engine.settings import Settings
from fastssl.evaluation import load_protocol
from fastssl.methods.base import Stage, Stages
from fastssl.record.trackers import check_trackers


@dataclass(frozen=True)
class Job(Settings):
    """Everything that decides what a run computes, the same on every rank."""

    recipe: str
    stages: Stages
    changes: tuple[str, ...]  # what the user set, from which the recipe resolves to `stages`
    data: tuple[str, ...]
    out: Path
    seed: int
    device: Literal["cpu", "cuda"]
    world: int
    with_room: tuple[str, ...] = ()  # stages that fit the card with nothing computed again for backward
    held_out: str | None = None  # labelled images (a subset) that stand in for the validation images, left unopened
    replay: Path | None = None  # do no more than this step again, which was not finite
    command: str = ""
    said: tuple[str, ...] = ()  # what of the stages follows from the data, a line a choice

    def __reduce__(self) -> tuple[Any, ...]:
        """What it holds of modules of the user's is loaded from their files in whatever process it comes to."""
        state = {each.name: getattr(self, each.name) for each in fields(self)}
        return _job_of, (modules_of(to_plain(self.stages)), pickle.dumps(state))

    def folder(self, stage: Stage) -> Path:
        """Where `stage` keeps its files."""
        return self.out if len(self.stages) == 1 else self.out / stage.name

    def next_commands(self) -> list[str]:
        """What one would type next."""
        data = "".join(f" --data {spec}" for spec in self.data if spec != "digits")
        commands = [f"report {self.out}", f"evaluate {self.out} --protocol knn{data}", f"embed {self.out}{data}"]
        return [f"fastssl {command}" for command in commands]

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


def _job_of(modules: dict[str, str], state: bytes) -> Job:
    load_modules(modules, "this rank")
    return Job(**pickle.loads(state))
