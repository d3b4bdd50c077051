"""Runs in this process that are stopped and continued, and whether two runs are the same."""

from pathlib import Path
from typing import Any

import torch

from fastssl.engine import stages
from fastssl.engine.job import Job
from fastssl.methods.base import Stages
from fastssl.record.recorder import Recorder
from tests.end_to_end.command import metrics


class Stopped(Exception):
    """Stands for a kill."""


def run_in_pieces(job: Job, every: int) -> int:
    """Run `job`, stopped after every `every` logged steps, between their metrics line and their checkpoint, and
    started again until it is done; how often it was stopped."""
    log, stops = Recorder.log, 0
    while True:
        left = every

        def stopping(recorder, record):
            nonlocal left
            log(recorder, record)
            left -= 1
            if left == 0:
                raise Stopped

        Recorder.log = stopping  # type: ignore[method-assign]
        try:
            stages.run(job)
            return stops
        except Stopped:
            stops += 1
        finally:
            Recorder.log = log  # type: ignore[method-assign]


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimiser, averages and queues of the last checkpoint, and every line of metrics, bit for bit."""
    ours, theirs = _last_state(one), _last_state(other)
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if not _same(value, theirs[name])] == []
    assert metrics(one) == metrics(other)


def assert_same_stages(one: Path, other: Path, job_stages: Stages) -> None:
    """`assert_same_run` of every stage, and the same made by those that produce."""
    for stage in job_stages:
        name = stage.name if len(job_stages) > 1 else ""
        if stage.do == "train":
            assert_same_run(one / name, other / name)
        else:
            ours, theirs = (torch.load(folder / name / "produced.pt", weights_only=True) for folder in (one, other))
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def _last_state(run_dir: Path) -> dict[str, Any]:
    newest = max(run_dir.glob("checkpoints/step-*"))
    return _flat(torch.load(newest / "state.pt", weights_only=True))


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested dicts and lists as one dict from path to tensor or plain value."""
    if isinstance(value, list | tuple):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        return {path: leaf for key, part in value.items() for path, leaf in _flat(part, f"{name}.{key}").items()}
    return {name: value}


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if torch.is_tensor(one) else one == other
