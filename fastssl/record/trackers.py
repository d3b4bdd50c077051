"""Curves elsewhere than in metrics.jsonl: TensorBoard and Weights & Biases, where a run asks for them (`--log-to`).

metrics.jsonl stays canonical, and has everything; these get its numbers as they are logged, from the main rank.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from fastssl.config.names import suggest
from fastssl.errors import ConfigError
from loaders.files import write_file

_LISTENERS: list[Callable[[dict[str, Any]], object]] = []
_FOLDER, WANDB_RUN_ID = "tensorboard", "wandb_run_id"


class Tracker(Protocol):
    """Where numbers go."""

    def log(self, record: Mapping[str, Any]) -> None:
        """One record of metrics.jsonl."""

    def close(self) -> None:
        """Hand over what is still held back."""


def check_trackers(names: tuple[str, ...]) -> None:
    """Raise ConfigError where one of `names` is unknown or its package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"--log-to {name!r}{suggest(name, TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"--log-to {name} needs the package of that name: install the extra {name}")


def open_tracker(name: str, run_dir: Path, resume_step: int) -> Tracker:
    """The tracker `name` of the run in `run_dir`, which goes on after `resume_step` steps; of later ones, which will be
    done again, it keeps nothing."""
    return TRACKERS[name](run_dir, resume_step)


class _Listener:
    """A function of this process that hears of every logged step."""

    def __init__(self, heard: Callable[[dict[str, Any]], object]):
        self._heard = heard

    def log(self, record: Mapping[str, Any]) -> None:
        if "loss" in record:  # no evaluation
            self._heard(dict(record))

    def close(self) -> None:
        pass


@contextmanager
def listening(heard: Callable[[dict[str, Any]], object]) -> Iterator[None]:
    """Within: `heard` gets every step that a run in this process logs, on the thread that trains; what it raises ends
    the run as an error of its own would."""
    _LISTENERS.append(heard)
    try:
        yield
    finally:
        _LISTENERS.remove(heard)


def listeners() -> list[Tracker]:
    """Those that listen in this process."""
    return [_Listener(heard) for heard in _LISTENERS]


class TensorBoard:
    """Event files in RUN/tensorboard: `tensorboard --logdir RUN`."""

    def __init__(self, run_dir: Path, resume_step: int):
        from torch.utils.tensorboard import SummaryWriter

        if not resume_step:
            shutil.rmtree(run_dir / _FOLDER, ignore_errors=True)
        self._writer = SummaryWriter(run_dir / _FOLDER, purge_step=resume_step + 1 if resume_step else None)

    def log(self, record: Mapping[str, Any]) -> None:
        for name, value in numbers(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One run at W&B for one run directory, however often it is continued: its id is kept there. W&B's own environment
    variables say where (WANDB_PROJECT, WANDB_MODE=offline, ...).

    A curve's x is `step`, not W&B's count of calls: steps that are done again after a stop fall on themselves.
    """

    def __init__(self, run_dir: Path, resume_step: int):
        import wandb

        kept = run_dir / WANDB_RUN_ID
        if not kept.exists():
            write_file(kept, uuid.uuid4().hex[:8] + "\n")
        resolved = run_dir / "resolved.json"
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fastssl"),
            id=kept.read_text().strip(),
            resume="allow",
            name=run_dir.name,
            dir=str(run_dir),
            config=json.loads(resolved.read_text()) if resolved.exists() else None,
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, record: Mapping[str, Any]) -> None:
        self._run.log({"step": record["step"], **numbers(record)})

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[Path, int], Tracker]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def numbers(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """A record's numbers by name, those of a part as `part/name`; without the step, lists and words."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and prefix + name != "step":
            found[prefix + name] = value
    return found
