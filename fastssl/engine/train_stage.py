"""A stage that trains: from where it was left, with its evaluations, its announcement and its result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastssl import dist
from fastssl.engine import replay
from fastssl.engine.join import Joined, weights_file
from fastssl.engine.settings import How
from fastssl.engine.step import default_how
from fastssl.engine.train import Trainer
from fastssl.engine.watchdog import Standing, Watchdog
from fastssl.errors import FastsslError
from fastssl.evaluation import FAILED, load_protocol
from fastssl.evaluation.subject import Subject
from fastssl.machine import versions
from fastssl.record.clock import Clock
from fastssl.record.recorder import Recorder
from fastssl.run_dir.files import read_json
from fastssl.weights.read import Weights, read_weights
from loaders.errors import LoaderError, RenderError
from loaders.loader import Loader

NOTHING_EVALUATED = "no validation images, so nothing is evaluated: give --data validation=PATH"


def train(at: Joined) -> dict[str, Any]:
    """Train what is not trained yet; the stage's result."""
    job = at.here.job
    with at.loader() as loader:
        trainer = _trainer(at, loader, job.how or default_how(at.here.device))
        warnings = _started(at, trainer)
        clock, evaluations = Clock(), []

        def evaluate() -> dict[str, Any]:
            evaluations.append(_scores(at, trainer, recorder.warn))
            return evaluations[-1]

        with Recorder(at.folder, main=dist.is_main(), resume_step=trainer.step, log_to=job.log_to) as recorder:
            for text in warnings:
                recorder.warn(text)
            _announce(recorder, at, trainer)
            if at.stage.evaluate and not at.protocols:
                recorder.warn(NOTHING_EVALUATED)
            with Watchdog(job.out, job.watchdog_s, lambda: Standing(trainer.step, clock.doing)):
                trainer.run(recorder, evaluate if at.protocols else None, clock, at.here.stop)
            scores = evaluations[-1] if evaluations else evaluate() if at.protocols else {}
            result = _result(at, trainer, scores) | {"trained_s": recorder.trained_s()}
            recorder.finish(scores, job.next_commands() if at.stage is job.stages[-1] else ())
    return result


def replayed(at: Joined) -> dict[str, Any]:
    """Do the step that the job's dump describes again, from the last checkpoint before it, or from the start."""
    job = at.here.job
    assert job.replay is not None
    dump = read_json(job.replay)
    with at.loader() as loader:
        trainer = _trainer(at, loader, "eager")
        if not replay.restored(trainer, dump["step"]) and job.init_from is not None:
            at.method.start_from(trainer.nets, _weights(at, job.init_from, print))
        return replay.replay(trainer, dump)


def _trainer(at: Joined, loader: Loader, how: How) -> Trainer:
    skip_once = at.here.job.nonfinite == "skip-once"
    keeps_all = at.stage.name in at.here.job.with_room
    return Trainer(at.stage, at.method, loader, at.checkpoints, at.here.device, how, skip_once, keeps_all)


def _started(at: Joined, trainer: Trainer) -> list[str]:
    """Bring `trainer` to the newest checkpoint, or to the weights that the job starts from; warnings on the way."""
    warnings: list[str] = []
    if (state := trainer.checkpoints.load_newest(warnings.append)) is not None:
        trainer.load_state(state)
    elif at.here.job.init_from is not None and at.stage is at.here.job.stages[0]:
        at.method.start_from(trainer.nets, _weights(at, at.here.job.init_from, warnings.append))
    return warnings


def _weights(at: Joined, source: Path, warn: Callable[[str], None]) -> Weights:
    """What `source` holds, and a line that names its layout."""
    weights = read_weights(weights_file(source, warn), at.here.job.unsafe_pickle)
    if dist.is_main():
        print(weights, flush=True)
    return weights


def _result(at: Joined, trainer: Trainer, scores: dict[str, Any]) -> dict[str, Any]:
    return {
        **scores,
        "recipe": at.here.job.recipe,
        "stage": at.stage.name,
        "seed": at.here.job.seed,
        "steps": trainer.step,
        "command": at.here.job.command,
        "provenance": _subject(at, trainer).provenance() if at.protocols else {},
        "replaced_images": _replaced(trainer.loader, at.here.device),
        "versions": versions(),
    }


def _replaced(loader: Loader, device: torch.device) -> dict[str, dict[str, int]]:
    """{stream: {damaged id: id in its place}} over all ranks."""
    found = {}
    for stream, instead in loader.replaced.items():
        pairs = torch.tensor(list(instead.items()), dtype=torch.int64, device=device).reshape(-1, 2)
        found[stream] = {str(lost): substitute for lost, substitute in sorted(dist.gather_ragged(pairs).tolist())}
    return {stream: instead for stream, instead in found.items() if instead}


def _scores(at: Joined, trainer: Trainer, warn: Callable[[str], None]) -> dict[str, Any]:
    """What the stage's protocols measure; under FAILED the message of each that could not, whose numbers are lost and
    nothing else."""
    subject = _subject(at, trainer)
    scores: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for protocol in at.protocols:
        try:
            scores |= load_protocol(protocol).evaluate(subject)
        except Exception as error:
            said = isinstance(error, FastsslError | LoaderError)
            if dist.world_size() > 1 and (not said or isinstance(error, RenderError)):
                raise  # of this rank alone, it may be: the others' collectives would be answered by later ones
            failed[protocol] = str(error) if said else f"{type(error).__name__}: {error}"
            warn(f"the evaluation {protocol} after step {trainer.step:,} failed: {failed[protocol]}")
    return scores | ({FAILED: failed} if failed else {})


def _subject(at: Joined, trainer: Trainer) -> Subject:
    return Subject(
        at.method,
        trainer.nets,
        at.here.data,
        device=at.here.device,
        threads=at.here.threads,
        renderer=at.here.job.loader,
        held_out=at.here.job.held_out,
        leave_out_damaged=at.here.job.damaged == "replace",
    )


def _announce(recorder: Recorder, at: Joined, trainer: Trainer) -> None:
    job, table = at.here.job, _streams(at)
    num_parameters = sum(p.numel() for p in trainer.nets.online.parameters())
    table["network"] = f"{num_parameters:,} parameters, {at.method.config.precision}"
    table["ranks"] = f"{job.world} x {at.here.threads} threads, {at.here.device.type}"
    table["step"] = trainer.training_step.how
    table["length"] = f"{trainer.horizon.total_steps:,} steps, {trainer.horizon.steps_per_epoch:,} an epoch"
    if trainer.step:
        table["continues"] = f"from step {trainer.step:,}"
    table["directory"] = str(at.folder)
    stage = f", stage {at.stage.name}" if len(job.stages) > 1 else ""
    recorder.announce(f"{job.recipe}{stage}, seed {job.seed}", table, total_steps=trainer.horizon.total_steps)


def _streams(at: Joined) -> dict[str, object]:
    """Of which images each stream is, and how many."""
    world, table = at.here.job.world, {}  # type: int, dict[str, object]
    for stream in at.bound.plan.asked.streams:
        source, subset = at.bound.sources[stream.name], at.bound.subsets[stream.name]
        table[stream.name] = (
            f"{source.name}: {subset.name}, {subset.count:,} images; {stream.batch_global:,} a step"
            + (f", {stream.batch_global // world:,} a rank" if world > 1 else "")
        )
        if repeats := at.bound.plan.repeats(stream.name):
            table[f"{stream.name} classes"] = repeats
        if (masks := at.bound.masks.get(stream.name)) is not None:
            table[f"{stream.name} masks"] = f"{masks.name}: {masks.about}"
    return table
