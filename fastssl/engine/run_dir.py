"""A run directory: whose it is, what is in it, and when it is finished.

A run with one stage keeps everything in the run directory; with several, each stage has a directory of its name there.
"""

from __future__ import annotations

import json
import shutil
from typing import Any

from fastssl import dist
from fastssl.config import ConfigError, differences, to_plain
from fastssl.engine.checkpoint import read_json, write_atomically
from fastssl.engine.job import Job, threads_per_rank, versions
from loaders.store.data import DataSets

RESOLVED, RESULT, PRODUCED, CHECKPOINTS = "resolved.json", "result.json", "produced.pt", "checkpoints"


def claim(job: Job, data: DataSets) -> dict[str, Any] | None:
    """Make `job.out` this job's, or see that it already is; the job's result where it is finished.

    `resolved.json` says whose a directory is: what decides the results, and what the run was begun with, which a
    continuation leaves as it is. Raises ConfigError, on every rank alike, where another run has begun there, or where
    nothing says whose work lies there.
    """
    resolved = {
        "recipe": job.recipe,
        "seed": job.seed,
        "stages": to_plain(job.stages),
        "data": {key: source.fingerprint() for key, source in sorted(data.sources.items())},
    }
    continues = job.resume == "auto" and _has_work(job)
    if continues:
        _check_same(job, resolved)
    result = read_json(job.out / RESULT) if continues and (job.out / RESULT).exists() else None
    result = dist.broadcast_object(result)  # also: every rank has looked before anything is written
    if dist.is_main() and not continues:
        run = {
            "command": job.command,
            "changes": job.changes,
            "data": job.data,
            "init_from": None if job.init_from is None else str(job.init_from),
            "world": job.world,
            "threads": threads_per_rank(),
        }
        text = json.dumps({**resolved, "run": run, "versions": versions()}, indent=2)
        try:
            job.out.mkdir(parents=True, exist_ok=True)
            if job.resume == "never":
                _clear(job)
            write_atomically(job.out / RESOLVED, text + "\n")
        except OSError as error:
            raise ConfigError(f"--out {job.out} cannot be written: {error.strerror}") from error
    dist.barrier()
    return result


def _check_same(job: Job, resolved: dict[str, Any]) -> None:
    path = job.out / RESOLVED
    if not path.exists():
        raise ConfigError(f"{job.out} holds a run, but not its {RESOLVED}: choose another --out, or --resume never")
    there = read_json(path)
    changed = differences({key: there.get(key) for key in resolved}, json.loads(json.dumps(resolved)))
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ConfigError(
            f"{job.out} holds another run ({'; '.join(changed[:3])}{more}): choose another --out, or run the "
            "command it was made with"
        )
    before = there["run"]["world"], there["run"]["threads"]
    if before != (job.world, threads_per_rank()) and dist.is_main() and not (job.out / RESULT).exists():
        print(
            f"note: begun on {before[0]} ranks of {before[1]} threads, continued on {job.world} of "
            f"{threads_per_rank()}: the same images, other rounding",
            flush=True,
        )


def _has_work(job: Job) -> bool:
    """Whether a run in the directory has come far enough to be worth keeping."""
    patterns = (f"**/{CHECKPOINTS}/step-*", f"**/{RESULT}", f"**/{PRODUCED}")
    return any(True for pattern in patterns for _ in job.out.glob(pattern))


def _clear(job: Job) -> None:
    """Remove what a run would continue from."""
    for folder in {job.out, *(job.folder(stage) for stage in job.stages)}:
        for name in (RESULT, PRODUCED):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
