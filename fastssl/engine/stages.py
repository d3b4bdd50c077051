"""A run: a recipe's stages one after the other on this rank, each continued from wherever it was left.

A stage is done when its `result.json` is written; what later stages need of it is its last checkpoint, or what it
produced, named with its hash.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import Any

import torch

from fastssl import dist
from fastssl.engine.apart import warnings_of
from fastssl.engine.claim import claim, continues_without_validation, finished
from fastssl.engine.job import Job
from fastssl.engine.join import Here, fitted, join, made_by
from fastssl.engine.produce_stage import produce
from fastssl.engine.same_everywhere import check_same_everywhere
from fastssl.engine.signals import StopRequest
from fastssl.engine.train_stage import replayed, train
from fastssl.engine.unusable import refuse_or_list
from fastssl.machine import compile_threads, forget_compiled, keep_freed_memory, own_cpus, share_cpus, threads_per_rank
from fastssl.methods.base import Artefact, Stage
from fastssl.record.recorder import result_lines
from fastssl.run_dir.files import CHECKPOINTS, RESULT, read_json
from fastssl.run_dir.lock import held
from loaders.files import write_file
from loaders.store import staging
from loaders.store.data import NOTHING_HELD_OUT, DataSets, open_data, search_folders


def run(job: Job) -> dict[str, Any]:
    """Do, or finish, every stage of `job` on this rank; returns what `result.json` holds."""
    share_cpus(dist.gather_objects(own_cpus()))
    threads = threads_per_rank()
    torch.set_num_threads(threads)
    compile_threads(threads)
    forget_compiled()
    device = torch.device("cuda", dist.local_gpu()) if job.device == "cuda" else torch.device("cpu")
    if device.type == "cpu":
        keep_freed_memory()
    data = _opened(job)
    job = _told(job, data)
    check_same_everywhere(job, data)
    result = finished(job, data)
    if job.replay is not None:
        return _replayed(Here(job, data, device, threads))
    if result is not None:
        _show(job, result)
        return result
    with held(job.out), StopRequest() as stop:
        refuse_or_list(job, data)  # of every stage: what does not fit must not wait for the end of those before
        claim(job, data)
        for line in job.said if dist.is_main() else ():
            print(line, flush=True)
        return _done(Here(job, data, device, threads, stop))


def _show(job: Job, result: dict[str, Any]) -> None:
    if dist.is_main():
        print(f"finished: {job.recipe}, seed {job.seed}, in {job.out}")
        for line in result_lines(result, job.next_commands()):
            print(line.plain)


def _done(here: Here) -> dict[str, Any]:
    """The job's result, each of its stages trained or produced where it is not done yet."""
    job, artefacts, results = here.job, {}, {}  # type: Job, dict[str, Artefact], dict[str, dict[str, Any]]
    for stage in job.stages:
        results[stage.name] = _result_of(stage, artefacts, here)
        if any(ref.stage == stage.name for later in job.stages for ref in later.needs.values()):
            artefacts[stage.name] = made_by(stage, job.folder(stage))
    if len(job.stages) == 1:
        return results[job.stages[0].name]
    result = {**results[job.stages[-1].name], "stages": results}
    if dist.is_main():
        write_file(job.out / RESULT, json.dumps(result, indent=2) + "\n")
    return result


def _result_of(stage: Stage, artefacts: dict[str, Artefact], here: Here) -> dict[str, Any]:
    """What `stage` said when it was done, or says now."""
    path = here.job.folder(stage) / RESULT
    # One rank looks, so that none misses the barrier below because another was faster.
    result: dict[str, Any] | None = dist.broadcast_object(read_json(path) if path.exists() else None)
    if result is not None:
        return result
    at = join(here, stage, artefacts)
    result = produce(at) if stage.do == "produce" else train(at)
    if dist.is_main():
        write_file(path, json.dumps(result, indent=2) + "\n")
        if stage.do == "produce":
            shutil.rmtree(at.folder / CHECKPOINTS, ignore_errors=True)  # the rows that were kept on the way
    dist.barrier()
    return result


def _replayed(here: Here) -> dict[str, Any]:
    """What became of the step that the job's dump describes. Nothing in the run directory changes."""
    job = here.job
    assert job.replay is not None
    name = read_json(job.replay)["stage"]
    (stage,) = (stage for stage in job.stages if stage.name == name)
    earlier = {ref.stage for ref in stage.needs.values() if ref.stage is not None}
    artefacts = {each.name: made_by(each, job.folder(each)) for each in job.stages if each.name in earlier}
    return replayed(join(here, stage, artefacts))


def _told(job: Job, data: DataSets) -> Job:
    """The job as it fits the data, after the first rank has said what that is. Raises StoreError, on every rank, where
    too many validation images are labelled ones."""
    job, lowered = fitted(job, data)
    warnings = warnings_of(data)
    if dist.is_main():
        for line in (*data.said, *lowered, *(f"warning: {text}" for text in warnings)):
            print(line, flush=True)
    return job


def _opened(job: Job) -> DataSets:
    """The job's data, from copies on this host where it asks for them; label lists stay beside the originals."""
    validation = job.held_out is None
    specs = (*job.data, NOTHING_HELD_OUT) if continues_without_validation(job) else job.data
    if job.stage_to is None:
        return open_data(specs, validation=validation)
    copies = staging.stage(specs, job.stage_to, _show_staging)
    return replace(open_data(copies, validation=validation), search=search_folders(job.data))


def _show_staging(file: str, done: int, total: int) -> None:
    """One line each tenth of a file: copies of hundreds of gigabytes take a while."""
    if dist.is_main() and done * 10 // total != max(0, done - (1 << 24)) * 10 // total:
        print(f"copying {file}: {100 * done // total} % of {total / 1e9:.1f} GB", flush=True)
