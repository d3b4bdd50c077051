"""A recipe and what a user says of it become a job; the command line and Python say it alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fastssl.engine.job import Job
from fastssl.errors import ConfigError
from fastssl.recipes.datasets import KNOWN_SETS
from fastssl.recipes.resolve import canonical, resolve


def job_of(
    recipe: str,
    *,
    data: tuple[str, ...] = (),
    changes: tuple[str, ...] = (),
    labels: str | None = None,
    out: Path | None = None,
    seed: int = 0,
    **others: Any,
) -> Job:
    """The job that trains `recipe`. `data`: `[KEY=]PATH` values, by default the set that comes with the program where
    the recipe is for that; `changes`: `KEY=VALUE` settings; `labels` is another way to write the setting of that name;
    `out`: by default `runs/RECIPE-seedK`; `others`: fields of Job. Raises ConfigError."""
    if labels is not None:
        changes = (*changes, f"labels={labels}")
    recipe = canonical(recipe)
    stages = resolve(recipe, changes)
    known = KNOWN_SETS[stages[0].config.dataset]
    job = Job(
        recipe=recipe,
        stages=stages,
        changes=changes,
        data=data or ((stages[0].config.dataset,) if known.embedded else ()),
        out=out or Path(),
        seed=seed,
        **others,
    )
    return job if out else replace(job, out=default_out(job, seed))


def default_out(job: Job, seed: int, kind: str = "") -> Path:
    """Where a run of `job` with `seed` lies unless somebody says otherwise."""
    return Path("runs") / f"{job.recipe.replace(':', '.')}{kind}-seed{seed}"


def refuse_without_data(job: Job) -> None:
    """Raise ConfigError where `job` has no images."""
    if not job.data:
        raise ConfigError(f"{job.recipe} needs images: --data {KNOWN_SETS[job.stages[0].config.dataset].how}")


def refuse_without_inputs(job: Job) -> None:
    """Raise ConfigError where `job` builds on another run that nobody named."""
    if missing := job.missing_inputs():
        raise ConfigError(f"{job.recipe} builds on another run: give {' and '.join(missing)}")
