"""A finished or running run, opened again to look at its networks."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from fastssl import dist
from fastssl.engine.job import Job
from fastssl.engine.join import facts_of
from fastssl.errors import ConfigError
from fastssl.evaluation.subject import Subject
from fastssl.machine import threads_per_rank
from fastssl.methods.base import Facts, Method, Nets, about_of
from fastssl.run_dir.checkpoint import CheckpointError, Checkpoints
from fastssl.run_dir.files import CHECKPOINTS, RESOLVED, read_json
from fastssl.run_dir.written import Written, read_run
from fastssl.weights.read import CONFIG, read_weights
from loaders.errors import LoaderError, StoreError
from loaders.loader import resolved
from loaders.plan.views import parse_subset
from loaders.store.data import LABELLED, NOTHING_HELD_OUT, TRAIN, VALIDATION, DataSets, open_data


def open_run(
    run: Path,
    data: tuple[str, ...],
    sets: Mapping[str, Path] | None = None,
    labels: str | None = None,
    tap: str | None = None,
    held_out: str | None = None,
    device: torch.device | None = None,
) -> tuple[Subject, int]:
    """The networks of `run`'s last stage at its newest checkpoint, beside `data` (default: what the run was trained
    and scored on), and the step they are from. A damaged checkpoint is passed over for the one before, with a line on
    stderr. The data may have other classes than the run's: its networks are built for their own. Raises FastsslError
    where the run cannot be read, LoaderError where the data lacks images of `labels`. `sets`, `labels` and `tap` are
    Subject's, and so is `held_out`, by default the run's own where it is shown the data that it was trained on.
    `device` (default: a GPU where there is one) is where its networks come to."""
    written = read_run(run)
    sources = _data_of(written, data)
    if labels is not None:
        _check_labels(labels, sources)
    state = _newest(written)
    method = written.stages[-1].config.build(_facts(written, state.get("about"), sources, is_own=not data), {})
    nets = _loaded(method, state)
    if held_out is None and not data:
        held_out = written.held_out
    subject = _subject(
        method,
        nets,
        sources,
        held_out=held_out,
        labels=labels,
        sets=sets,
        tap=tap,
        leave_out_damaged=written.damaged == "replace",
        device=device,
    )
    return subject, state["step"]


def open_networks(folder: Path, labelled: tuple[str, ...] = ()) -> Subject:
    """The networks of a run, or of a folder that `fastssl export` wrote, to be shown other images. `labelled` are
    `labelled=PATH` values, whose images, all of them, stand in for those that the run learnt from; an exported folder
    has none of its own. Raises as `open_run` does."""
    labelled = (*labelled, NOTHING_HELD_OUT) if labelled else ()
    if (folder / RESOLVED).exists():
        try:
            return open_run(folder, labelled, labels="all" if labelled else None)[0]
        except LoaderError as error:
            if labelled:
                raise
            return _without_data(folder, error)
    if not (folder / CONFIG).exists():
        raise ConfigError(f"{folder} is neither a run nor an exported folder: it has no {RESOLVED} and no {CONFIG}")
    weights = read_weights(folder)
    about = about_of(weights.about)
    method = about.config.build(about.facts, {})
    if not labelled and "logits" not in method.taps:
        raise ConfigError(
            f"{folder} has no classifier, and no images to find neighbours among: give --data labelled=PATH"
        )
    nets = method.nets()
    weights.load_whole(nets.online, "online")
    return _subject(method, nets, open_data(labelled), labels="all")


def _without_data(run: Path, why: LoaderError) -> Subject:
    """A run's networks where its data is gone: a classifier needs none. Raises ConfigError, which says `why` it is
    needed, where there is no classifier."""
    written = read_run(run)
    state = _newest(written)
    method = None
    if "facts" in state.get("about", {}):
        facts = about_of(state["about"]).facts
        facts = replace(facts, class_names=facts.class_names or written.class_names)
        method = written.stages[-1].config.build(facts, {})
    if method is None or "logits" not in method.taps:
        raise ConfigError(f"{why}: give --data labelled=PATH, images to find neighbours among") from None
    return _subject(method, _loaded(method, state), DataSets({}))


def _newest(written: Written) -> dict[str, Any]:
    """The run's newest checkpoint; a damaged one is passed over with a line on stderr. Raises CheckpointError."""
    checkpoints = Checkpoints(written.folder(written.stages[-1]) / CHECKPOINTS)
    state = checkpoints.load_newest(lambda text: _say(f"warning: {text}"))
    if state is None:
        raise CheckpointError(f"{written.path} has no checkpoint yet")
    return state


def _loaded(method: Method[Any, Any], state: Mapping[str, Any]) -> Nets[Any]:
    """The method's networks with what a checkpoint holds."""
    nets = method.nets()
    for name, module in nets.saved().items():
        module.load_state_dict(state["nets"][name])
    return nets


def _subject(
    method: Method[Any, Any], nets: Nets[Any], sources: DataSets, device: torch.device | None = None, **settings: Any
) -> Subject:
    """Both on `device`, by default on whatever this process computes on."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for module in nets.modules().values():
        module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Subject(method, nets, sources, device=device, threads=threads_per_rank(), **settings)


def open_method(run: Path, data: tuple[str, ...]) -> tuple[Method[Any, Any], DataSets]:
    """The method of `run`'s last stage beside `data` (default: what the run was trained on). Needs no checkpoint.
    Raises as `open_run` does."""
    written = read_run(run)
    sources = _data_of(written, data)
    return written.stages[-1].config.build(facts_of(sources, written.seed), {}), sources


def _data_of(written: Written, data: tuple[str, ...]) -> DataSets:
    """The data given, else the run's, with what it is said to be on stderr. A run that was begun without validation
    images has none today either: what would be held out, it has learnt from."""
    given = bool(data)
    if not given:
        had_some = written.held_out is not None or VALIDATION in written.resolved["data"]
        data = written.data if had_some else (*written.data, NOTHING_HELD_OUT)
    try:
        sources = open_data(data, validation=written.held_out is None or data is not written.data)
    except LoaderError as error:
        if given:
            raise
        raise StoreError(f"{error}; it is what the run was trained on: give --data with where it lies now") from error
    for line in sources.said:
        _say(line)
    return sources


def _say(text: str) -> None:
    """Once, however many ranks open the run."""
    if dist.is_main():
        print(text, file=sys.stderr)


def _facts(written: Written, about: Mapping[str, Any] | None, sources: DataSets, is_own: bool) -> Facts:
    """The data's facts, but the classes that the run's networks know; `is_own` says that the data is the run's."""
    if about is None or "facts" not in about:  # runs of before it was stored
        return facts_of(sources, written.seed)
    began_with = about_of(about).facts
    shown = sources.sources.get(VALIDATION)
    if shown is not None and not {LABELLED, TRAIN} & sources.sources.keys():  # a classifier needs no others
        sources = DataSets({LABELLED: shown})
    facts = facts_of(sources, written.seed)
    if began_with.channels != facts.channels:
        raise ConfigError(
            f"{written.path} has learnt from images of {began_with.channels} channels; these have {facts.channels}"
        )
    names = began_with.class_names or written.class_names  # runs of before they were stored lack them
    if not names and is_own and facts.num_classes == began_with.num_classes:
        names = facts.class_names
    return replace(facts, num_classes=began_with.num_classes, class_names=names)


def job_to_replay(dump: Path, data: tuple[str, ...], device: Literal["cpu", "cuda"] | None, world: int | None) -> Job:
    """The run that left `dump`, to do no more than the step that it describes; on the device and ranks it had, unless
    others are given. Raises FastsslError where either cannot be read."""
    described = read_json(dump)
    if not isinstance(described, dict) or not {"stage", "step", "ranks", "device"} <= described.keys():
        raise ConfigError(f"{dump} describes no step: such files are called nonfinite-step-*.json, in a run directory")
    run = read_run(dump.parent if (dump.parent / RESOLVED).exists() else dump.parent.parent)
    return Job(
        recipe=run.recipe,
        stages=run.stages,
        changes=run.changes,
        data=data or run.data,
        out=run.path,
        seed=run.seed,
        device=device or described["device"],
        world=world or described["ranks"],
        init_from=run.init_from,
        held_out=run.held_out,
        unsafe_pickle=run.unsafe_pickle,
        replay=dump,
    )


def _check_labels(labels: str, sources: DataSets) -> None:
    try:
        subset = parse_subset(labels)
    except ValueError as error:
        raise ConfigError(f"--labels: {error}") from None
    resolved(subset, sources.get(LABELLED), sources)
