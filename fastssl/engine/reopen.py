"""A finished or running run, opened again to look at its networks."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from fastssl.config.plain import differences, to_plain
from fastssl.engine.job import Job
from fastssl.engine.stages import facts_of
from fastssl.errors import ConfigError
from fastssl.evaluation.subject import Subject
from fastssl.methods.base import Method, Stages
from fastssl.recipes.resolve import resolve
from fastssl.run_dir.checkpoint import CheckpointError, Checkpoints
from fastssl.run_dir.files import CHECKPOINTS, RESOLVED, read_json
from loaders.loader import resolved
from loaders.plan.views import parse_subset
from loaders.store.data import LABELLED, DataSets, open_data


def open_run(
    run: Path, data: tuple[str, ...], sets: Mapping[str, Path] | None = None, labels: str | None = None
) -> tuple[Subject, int]:
    """The networks of `run`'s last stage at its newest checkpoint, beside `data` (default: what the run was trained
    and scored on), and the step they are from. A damaged checkpoint is passed over for the one before, with a line on
    stderr. The data may have other classes than the run's: its networks are built for their own. Raises FastsslError
    where the run cannot be read or its recipe has changed, LoaderError where the data lacks images of `labels`. `sets`
    and `labels` are Subject's."""
    method, sources, folder = open_method(run, data)
    if labels is not None:
        _check_labels(labels, sources)
    state = Checkpoints(folder / CHECKPOINTS).load_newest(lambda text: print(f"warning: {text}", file=sys.stderr))
    if state is None:
        raise CheckpointError(f"{run} has no checkpoint yet")
    if (began_with := state.get("about", {}).get("facts")) is not None:  # runs of before it was stored lack it
        if began_with["channels"] != method.facts.channels:
            raise ConfigError(
                f"{run} has learnt from images of {began_with['channels']} channels; these have {method.facts.channels}"
            )
        method = method.config.build(replace(method.facts, num_classes=began_with["num_classes"]), {})
    nets = method.nets()
    for name, module in nets.saved().items():
        module.load_state_dict(state["nets"][name])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for module in nets.modules().values():
        module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    held_out = None if data else read_json(run / RESOLVED).get("held_out")
    threads = len(os.sched_getaffinity(0))
    subject = Subject(
        method, nets, sources, device=device, threads=threads, held_out=held_out, labels=labels, sets=sets
    )
    return subject, state["step"]


def open_method(run: Path, data: tuple[str, ...]) -> tuple[Method, DataSets, Path]:
    """The method of `run`'s last stage beside `data` (default: what the run was trained on), and the stage's folder.
    Needs no checkpoint. Raises as `open_run` does."""
    resolved, stages = _settings(run)
    stage = stages[-1]
    began_with, held_out = tuple(resolved["run"]["data"]), resolved.get("held_out")
    sources = open_data(data) if data else open_data(began_with, validation=held_out is None)
    method = stage.method.build(facts_of(sources, resolved["seed"]), {})
    return method, sources, run if len(stages) == 1 else run / stage.name


def job_to_replay(dump: Path, data: tuple[str, ...], device: Literal["cpu", "cuda"] | None, world: int | None) -> Job:
    """The run that left `dump`, to do no more than the step that it describes; on the device and ranks it had, unless
    others are given. Raises FastsslError where either cannot be read."""
    described = read_json(dump)
    if not isinstance(described, dict) or not {"stage", "step", "ranks", "device"} <= described.keys():
        raise ConfigError(f"{dump} describes no step: such files are called nonfinite-step-*.json, in a run directory")
    run = dump.parent if (dump.parent / RESOLVED).exists() else dump.parent.parent
    resolved, stages = _settings(run)
    began = resolved["run"]
    return Job(
        recipe=resolved["recipe"],
        stages=stages,
        changes=tuple(began["changes"]),
        data=data or tuple(began["data"]),
        out=run,
        seed=resolved["seed"],
        device=device or described["device"],
        world=world or described["ranks"],
        init_from=None if began["init_from"] is None else Path(began["init_from"]),
        held_out=resolved.get("held_out"),
        unsafe_pickle=began.get("unsafe_pickle", False),  # runs begun before there was the flag lack it
        replay=dump,
    )


def _check_labels(labels: str, sources: DataSets) -> None:
    try:
        subset = parse_subset(labels)
    except ValueError as error:
        raise ConfigError(f"--labels: {error}") from None
    resolved(subset, sources.get(LABELLED), sources)


def _settings(run: Path) -> tuple[dict[str, Any], Stages]:
    """What `run` was resolved to, and the stages that its recipe resolves to now."""
    path = run / RESOLVED
    if not path.is_file():
        raise ConfigError(f"{run} is no run directory: it has no {RESOLVED}")
    resolved = read_json(path)
    stages = resolve(resolved["recipe"], tuple(resolved["run"]["changes"]))
    changed = differences(resolved["stages"], json.loads(json.dumps(to_plain(stages))))
    if changed:
        raise ConfigError(f"recipe {resolved['recipe']} has changed since {run} was made ({changed[0]})")
    return resolved, stages
