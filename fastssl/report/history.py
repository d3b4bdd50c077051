"""What a run directory says of its training: settings, logged steps, evaluations, restarts and stalls.

Files only: no network and no image is opened here, so a run that is still going can be read as well.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from fastssl.config.plain import short_name, to_plain
from fastssl.errors import ConfigError, FastsslError
from fastssl.run_dir.files import RESOLVED, RESULT, read_json
from fastssl.run_dir.written import read_run

STALL_WAIT_SHARE = 0.25  # of a window spent waiting for data
STALL_PACE = 0.5  # of the median pace
_NOT_PARTS = ("step", "epoch", "time")


@dataclass(frozen=True)
class Stall:
    """A logging window, `minutes` of training from its begin to its end, in which training was held up."""

    step: int
    minutes: tuple[float, float]
    images_per_s: float
    wait_share: float


@dataclass(frozen=True)
class StageHistory:
    """One stage: its settings in plain form, the records of metrics.jsonl in order, and what it ended with."""

    settings: dict[str, Any]
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    num_unreadable: int  # lines
    result: dict[str, Any] | None
    written_s: float | None  # when metrics.jsonl last changed, since 1970

    @property
    def name(self) -> str:
        return str(self.settings["name"])

    @cached_property
    def minutes(self) -> list[float]:
        """Of training until the end of each logged window: without start-up, evaluation and checkpoints, over all
        starts, without the steps that were lost and done again."""
        total, found = 0.0, []
        for record in self.steps:
            total += record["time"]["elapsed_s"] / 60
            found.append(total)
        return found

    @cached_property
    def first_windows(self) -> list[int]:
        """Index of the first logged window of each start. The clock foresees no end yet there, only there: `eta_s` is
        null. A start that logged nothing left no trace, nor did one before the first checkpoint."""
        return [i for i, r in enumerate(self.steps) if i == 0 or r["time"].get("eta_s", 0) is None]

    @cached_property
    def stalls(self) -> list[Stall]:
        """Windows that waited for data, or went at less than half the run's median pace. The first ones after a start,
        in which code is compiled and caches fill, do not count."""
        pace = median([r["time"]["images_per_s"] for r in self.steps] or [0.0])
        return [
            Stall(r["step"], (self.minutes[i - 1], self.minutes[i]), r["time"]["images_per_s"], r["time"]["wait_share"])
            for i, r in enumerate(self.steps)
            if i not in self.first_windows
            and (r["time"]["wait_share"] > STALL_WAIT_SHARE or r["time"]["images_per_s"] < STALL_PACE * pace)
        ]

    @property
    def rates(self) -> list[str]:
        """`lr`, or `lr`, `lr_1`, ...: one a parameter group."""
        return [name for name in _names(self.steps) if name == "lr" or name.startswith("lr_")]

    @property
    def parts(self) -> list[str]:
        """The loss, its parts and whatever else the method looks at, the loss first."""
        others = [n for n in _names(self.steps) if n not in (*_NOT_PARTS, *self.rates)]
        return [n for n in others if any(self.series(n)) or not n.endswith("_steps")]

    @property
    def accuracies(self) -> list[str]:
        """The headlines of its evaluations."""
        return [name for name in _names([e["evaluation"] for e in self.evaluations]) if name.endswith("top1")]

    @property
    def scores(self) -> list[str]:
        """What else its evaluations measured, and an accuracy is not."""
        names = _names([e["evaluation"] for e in self.evaluations])
        return [name for name in names if "_top1" not in name]

    def series(self, name: str) -> list[float]:
        """One value a logged step; NaN where there is none."""
        return [_float(record.get(name)) for record in self.steps]

    def evaluated(self, name: str) -> list[float]:
        """One value an evaluation; NaN where there is none."""
        return [_float(e["evaluation"].get(name)) for e in self.evaluations]

    @property
    def step(self) -> int:
        """The last one that is written down."""
        return max((r["step"] for r in (*self.steps, *self.evaluations)), default=0)

    @property
    def total_steps(self) -> int | None:
        """How many there will be; None while that is not known."""
        length = self.settings["length"]
        if short_name(length["type"]) == "Steps":
            return int(length["count"])
        last = self.steps[-1] if self.steps else None
        return None if last is None else length["count"] * round(last["step"] / last["epoch"])


@dataclass(frozen=True)
class History:
    """A run directory."""

    path: Path
    resolved: dict[str, Any]
    stages: list[StageHistory]

    @property
    def result(self) -> dict[str, Any] | None:
        """What the run ended with; None while it has not."""
        return self.stages[-1].result

    @property
    def last(self) -> StageHistory:
        """The last stage that has begun to write, else the first."""
        return next((stage for stage in reversed(self.stages) if stage.steps), self.stages[0])

    @property
    def scores(self) -> dict[str, Any]:
        """The final evaluation, or the newest there is."""
        if self.result is not None:
            return self.result
        return self.last.evaluations[-1]["evaluation"] if self.last.evaluations else {}


def read_history(run: Path) -> History:
    """What `run` has written so far. Raises ConfigError where it is no run directory."""
    if not (run / RESOLVED).is_file():
        raise ConfigError(f"{run} is no run directory: it has no {RESOLVED}")
    resolved = read_json(run / RESOLVED)
    try:
        resolved["stages"] = _as_today(run, resolved["stages"])
        alone = len(resolved["stages"]) == 1
        stages = [_stage(settings, run if alone else run / settings["name"]) for settings in resolved["stages"]]
        resolved["recipe"], resolved["seed"], resolved["run"]["command"], resolved["versions"]["torch"]
        return History(run, resolved, stages)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{run / RESOLVED} is not what fastssl train writes: {error!r}") from None


def _as_today(run: Path, stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The stages as a run of today would write them, so that runs can be compared; as they stand where they need what
    is not there any more."""
    try:
        today: list[dict[str, Any]] = to_plain(read_run(run).stages)
        return today
    except FastsslError:
        return stages


def _stage(settings: dict[str, Any], folder: Path) -> StageHistory:
    path = folder / "metrics.jsonl"
    there = path.is_file()
    steps: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    lines = path.read_bytes().splitlines(keepends=True) if there else []
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()  # it is being written
    num_unreadable = 0
    for line in lines:
        try:
            record = json.loads(line)
            (evaluations if "evaluation" in record else steps).append(_checked(record))
        except (ValueError, KeyError, TypeError):
            num_unreadable += 1
    result = read_json(folder / RESULT) if (folder / RESULT).is_file() else None
    return StageHistory(settings, steps, evaluations, num_unreadable, result, path.stat().st_mtime if there else None)


def _checked(record: dict[str, Any]) -> dict[str, Any]:
    """The record, which has what every page needs of it. Raises KeyError or TypeError where it has not."""
    needed = [record["step"] + 0, record["epoch"] + 0]
    if "evaluation" in record:
        record["evaluation"].items()
    else:
        needed += [record["time"][name] + 0 for name in ("images_per_s", "wait_share", "elapsed_s")]
    return record


def _names(records: list[dict[str, Any]]) -> list[str]:
    """The keys of numbers, in order of appearance, `loss` first."""
    found = dict.fromkeys(name for record in records for name, value in record.items() if _is_value(value))
    return sorted(found, key=lambda name: name != "loss")


def _is_value(value: Any) -> bool:
    """A number, or the string that stands for one that JSON does not have."""
    return value in ("inf", "-inf", "nan") or (isinstance(value, int | float) and not isinstance(value, bool))


def _float(value: Any) -> float:
    return float(value) if _is_value(value) else float("nan")
