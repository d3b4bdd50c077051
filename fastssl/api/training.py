"""`fastssl.train`: a recipe trained from Python, with the command's results to the bit."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastssl.api.arrays import specs_of
from fastssl.api.following import following
from fastssl.api.jobs import job_of, refuse_without_data, refuse_without_inputs
from fastssl.api.on_ranks import on_ranks
from fastssl.api.run import Run, open_run
from fastssl.engine.job import Job
from fastssl.engine.stages import run as run_stages
from fastssl.errors import ConfigError
from fastssl.recipes.resolve import recipes
from fastssl.record.trackers import listening

Progress = bool | Callable[[dict[str, Any]], object]


def train(
    recipe: str = "paws.digits",
    *,
    data: Any = None,
    labels: Any = None,
    out: str | Path | None = None,
    set: Mapping[str, Any] | None = None,
    seed: int = 0,
    gpus: int | None = None,
    cpu_ranks: int | None = None,
    progress: Progress = False,
    **settings: Any,
) -> Run:
    """Train `recipe`, or continue the run that is in `out`, and return the run.

    recipe    a name of `list_recipes()`, or `my_recipes.py:mine`
    data      a path; uint8 images [N, H, W, 1 or 3] (`labels` [N] are theirs), or a pair of images and labels; or a
              mapping from "labelled", "unlabelled", "validation" to any of these
    labels    which labelled images show their label: "all", "per-class=10", a list's name or path; or, where `data` is
              an array, its labels: whole numbers or names, -1 or "" for none
    out       the run's folder, by default runs/RECIPE-seedK
    set       settings of the recipe: {"epochs": 10, "rate.peak": 0.8}
    gpus, cpu_ranks   ranks; where more than one is started here, a script needs `if __name__ == "__main__":`
    progress  True: print what the command prints; or a callable that gets the dict of every logged step
    settings  the command's other options under their names: init_from, resume, loader, how, damaged, ...

    Raises FastsslError or LoaderError with the command's one line. Prints nothing unless `progress` is True.
    """
    subset = labels if isinstance(labels, str) else None
    changes = tuple(f"{key}={_written(value)}" for key, value in (set or {}).items())
    unknown = sorted(settings.keys() - Job.__dataclass_fields__.keys())
    if unknown:
        raise ConfigError(
            f"train() has no setting {unknown[0]!r}; settings of the recipe are set={{{unknown[0]!r}: ...}}"
        )
    if gpus and cpu_ranks:
        raise ConfigError("gpus and cpu_ranks: give one of them")
    settings |= {"device": "cuda" if gpus else "cpu", "world": gpus or cpu_ranks or 1}
    if (init_from := settings.get("init_from")) is not None:
        settings["init_from"] = init_from.path if isinstance(init_from, Run) else Path(init_from)
    where = None if out is None else Path(out)
    job = job_of(recipe, changes=changes, labels=subset, out=where, seed=seed, command="fastssl.train", **settings)
    refuse_without_inputs(job)
    specs = specs_of(data, None if subset is not None else labels, job.out)
    job = job_of(
        recipe, data=specs, changes=changes, labels=subset, out=job.out, seed=seed, command="fastssl.train", **settings
    )
    refuse_without_data(job)
    _train(job, progress)
    return open_run(job.out)


def list_recipes() -> dict[str, str]:
    """Every recipe's name, and what it trains."""
    return {name: " ".join((recipe.__doc__ or "").split()) for name, recipe in recipes().items()}


def _train(job: Job, progress: Progress) -> None:
    """All ranks' work. What is the caller's in this process, torch's draws and threads, is afterwards as it was."""
    heard = progress if callable(progress) else None
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        if heard is not None:
            stack.enter_context(listening(heard) if job.world == 1 else following(job, heard))
        on_ranks(job, run_stages if progress is True else partial(quietly, run_stages))


def quietly(work: Callable[[Job], Any], job: Job) -> Any:
    """`work` on this rank with nothing printed."""
    silent: tuple[AbstractContextManager[Any], ...] = redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO())
    with silent[0], silent[1]:
        return work(job)


def _written(value: Any) -> str:
    """A setting as `--set` has it."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
