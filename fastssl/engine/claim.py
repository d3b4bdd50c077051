"""A run directory: whose it is, what is in it, and when it is finished.

A run with one stage keeps everything in the run directory; with several, each stage has a directory of its name there.
"""

from __future__ import annotations

import json
import shutil
from typing import Any

from fastssl import dist
from fastssl.config.modules import file_of, modules_of, types_in
from fastssl.config.plain import Notes, differences, to_plain
from fastssl.engine.job import Job
from fastssl.engine.join import facts_of
from fastssl.errors import ConfigError
from fastssl.machine import threads_per_rank, versions
from fastssl.methods.base import Stage, Stages
from fastssl.record.trackers import WANDB_RUN_ID
from fastssl.run_dir.files import CHECKPOINTS, PRODUCED, RESOLVED, RESULT, read_json
from fastssl.run_dir.written import refuse_newer, stages_of, tell
from loaders.files import write_file
from loaders.finish import ROUNDING, SAME_BITS
from loaders.plan import ops
from loaders.store.data import LABELLED, VALIDATION, DataSets


def finished(job: Job, data: DataSets) -> dict[str, Any] | None:
    """The job's result where it is finished in `job.out`. Only looks; all ranks have looked when it returns.

    Raises ConfigError, on every rank alike, where another run has begun there, or where nothing says whose work lies
    there.
    """
    result = None
    if _continues(job):
        changed = _changes(job, data)
        result = read_json(job.out / RESULT) if (job.out / RESULT).exists() else None
        if changed and result is not None:
            raise ConfigError(f"{job.out} is finished, and nothing in it can change: start another with --init-from")
        if result is None and job.replay is None and _rounding_changed(job) and "rounding" not in job.allow_change:
            raise ConfigError(
                f"{job.out} was begun with a fastssl that rounds images otherwise: it would not end as it had there. "
                "Continue it all the same with --allow-change rounding, or choose another --out"
            )
    return dist.broadcast_object(result)


def continues_without_validation(job: Job) -> bool:
    """Whether the run that the job continues was begun without validation images: it has learnt from all there were."""
    path = job.out / RESOLVED
    if job.held_out is not None or not path.exists() or not _continues(job):
        return False
    there = read_json(path)
    return VALIDATION not in there.get("data", {}) and there.get("held_out") is None


def claim(job: Job, data: DataSets) -> None:
    """Make `job.out` this job's. Only the first rank, which holds the directory, writes.

    `resolved.json` says whose a directory is: what decides the results, and what the run was begun with, which a
    continuation leaves as it is, save for changes that were allowed: these are noted with the command that made them.
    """
    if dist.is_main():
        if _continues(job):
            _note_of_ranks(job)
            if changed := _changes(job, data) + _rounding_changed(job):
                _note_changes(job, data, changed)
        else:
            if job.resume == "never":
                _clear(job)
            run = {**_as_typed(job), "data_said": data.said, "world": job.world, "threads": threads_per_rank()}
            _write(
                job,
                {
                    **_resolved(job, data),
                    "rounding": ROUNDING,
                    "class_names": data.get(LABELLED).class_names,
                    "run": run,
                    "versions": versions(),
                },
            )
    dist.barrier()


def _resolved(job: Job, data: DataSets) -> dict[str, Any]:
    """What decides a run's results."""
    return {
        "recipe": job.recipe,
        "seed": job.seed,
        "stages": to_plain(job.stages),
        "data": data.fingerprints(),
        "held_out": job.held_out,
    }


def _as_typed(job: Job) -> dict[str, Any]:
    """The same in the words of the command."""
    init_from = None if job.init_from is None else str(job.init_from)
    weights = {"init_from": init_from, "unsafe_pickle": job.unsafe_pickle}
    return {
        "command": job.command,
        "changes": job.changes,
        "data": job.data,
        **weights,
        "damaged": job.damaged,
        "modules": modules_of(to_plain(job.stages)),
        "recipe_file": file_of(job.recipe.partition(":")[0]) if ":" in job.recipe else None,
    }


def _write(job: Job, resolved: dict[str, Any]) -> None:
    try:
        write_file(job.out / RESOLVED, json.dumps(resolved, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"--out {job.out} cannot be written: {error.strerror}") from error


def _changes(job: Job, data: DataSets) -> list[str]:
    """What differs from the run in the directory, all of it allowed. Raises ConfigError where something is not."""
    path = job.out / RESOLVED
    if not path.exists():
        raise ConfigError(f"{job.out} holds a run, but not its {RESOLVED}: choose another --out, or --resume never")
    there, resolved = read_json(path), _resolved(job, data)
    stages_begun = _stages_begun(job, there)
    began = {key: there.get(key) for key in resolved} | {"stages": json.loads(json.dumps(to_plain(stages_begun)))}
    changed = differences(began, json.loads(json.dumps(resolved)))
    if changed and there.get("recipe") == job.recipe:
        for before, stage in zip(stages_begun, job.stages, strict=False):
            _refuse_other_batch(job, data, before, stage)
    refused = [change for change in changed if not any(_names(key, change) for key in job.allow_change)]
    if refused:
        more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        key = refused[0].partition(": ")[0].rpartition(".")[2]
        raise ConfigError(
            f"{job.out} holds another run ({'; '.join(refused[:3])}{more}): choose another --out, run the command it "
            f"was made with, or let it change with --allow-change {key}"
        )
    return changed


def _refuse_other_batch(job: Job, data: DataSets, before: Stage, stage: Stage) -> None:
    """Raise ConfigError, whatever may change, where a step of `stage` takes another number of images than it did
    `before`: an epoch would have another number of steps, and how far a run has come is kept in steps."""

    def images_per_step(stage: Stage) -> int:
        plan = stage.config.build(facts_of(data, job.seed), {}).plan()
        return plan.stream(plan.epoch_of).batch_global

    was, now = images_per_step(before), images_per_step(stage)
    if was != now:
        raise ConfigError(
            f"{job.out} was begun with {was} images a step, and this is {now}: how far a run has come is kept in "
            f"steps, of which an epoch would have another number; keep {was}, or start another --out with --init-from "
            f"{job.out}"
        )


def _rounding_changed(job: Job) -> list[str]:
    """Where an op of the job has other bits than when the run in the directory was begun: that, as a change."""
    began = read_json(job.out / RESOLVED).get("rounding", 1)
    kinds = (kind.partition(":") for kind in types_in(to_plain(job.stages)))
    used = {name for module, _, name in kinds if module == ops.__name__}
    same = began == ROUNDING or used <= SAME_BITS.get(began, frozenset())
    return [] if same else [f"rounding: {began} -> {ROUNDING}"]


def _stages_begun(job: Job, there: dict[str, Any]) -> Stages:
    """The stages that the directory holds; what an earlier fastssl did not say of them
    is told. Raises ConfigError where they cannot be."""
    refuse_newer(there, job.out)
    notes = Notes()
    stages = stages_of(there, job.out, notes)
    if dist.is_main():
        tell(notes, job.out)
    return stages


def _names(key: str, change: str) -> bool:
    """Whether `key` is the field that changed, or one that holds it: `peak`, `rate.peak`, `data`."""
    return f".{key}." in f".{change.partition(': ')[0]}."


def _note_of_ranks(job: Job) -> None:
    before = read_json(job.out / RESOLVED)["run"]
    if (before["world"], before["threads"]) != (job.world, threads_per_rank()):
        print(
            f"note: begun on {before['world']} ranks of {before['threads']} threads, continued on {job.world} of "
            f"{threads_per_rank()}: the same images, other rounding",
            flush=True,
        )


def _note_changes(job: Job, data: DataSets, changed: list[str]) -> None:
    there = read_json(job.out / RESOLVED)
    allowed = [*there.get("allowed", ()), {"command": job.command, "changed": changed}]
    _write(
        job,
        {
            **there,
            **_resolved(job, data),
            "rounding": ROUNDING,
            "run": there["run"] | _as_typed(job),
            "allowed": allowed,
        },
    )
    print(f"note: continued with other settings: {'; '.join(changed)}", flush=True)


def _continues(job: Job) -> bool:
    return job.resume == "auto" and _has_work(job)


def _has_work(job: Job) -> bool:
    """Whether a run in the directory has come far enough to be worth keeping."""
    patterns = (f"**/{CHECKPOINTS}/step-*", f"**/{RESULT}", f"**/{PRODUCED}")
    return any(True for pattern in patterns for _ in job.out.glob(pattern))


def _clear(job: Job) -> None:
    """Remove what a run would continue from."""
    for folder in {job.out, *(job.folder(stage) for stage in job.stages)}:
        for path in (folder / RESULT, folder / PRODUCED, folder / WANDB_RUN_ID, *folder.glob("nonfinite-step-*.json")):
            path.unlink(missing_ok=True)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
