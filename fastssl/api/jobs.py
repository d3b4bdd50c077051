"""A recipe and what a user says of it become a job; the command line and Python say it alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastssl.engine.job import Job
from fastssl.errors import ConfigError
from fastssl.methods.base import Stages
from fastssl.recipes.datasets import KNOWN_SETS
from fastssl.recipes.images import TYPICAL, Choices, Images
from fastssl.recipes.resolve import canonical, follows_images, resolve
from loaders.errors import StoreError
from loaders.loader import resolved
from loaders.plan.views import parse_subset
from loaders.store.data import LABELLED, TRAIN, UNLABELLED, DataSets, open_data


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
    stages, said = stages_of(recipe, changes, data, others.get("device", "cpu"), others.get("init_from") is not None)
    known = KNOWN_SETS[stages[0].config.dataset]
    job = Job(
        recipe=recipe,
        stages=stages,
        changes=changes,
        data=data or ((stages[0].config.dataset,) if known.embedded else ()),
        out=out or Path(),
        seed=seed,
        said=said,
        **others,
    )
    return job if out else replace(job, out=default_out(job, seed))


def stages_of(
    recipe: str, changes: tuple[str, ...], data: tuple[str, ...], device: Literal["cpu", "cuda"], from_weights: bool
) -> tuple[Stages, tuple[str, ...]]:
    """The recipe's stages with `changes`, and lines that say what of them follows from the images in `data`, or from
    typical ones where there are none. Raises ConfigError, LoaderError."""
    if not follows_images(recipe):
        return resolve(recipe, changes), ()
    if data:
        return stages_for(open_data(data), recipe, changes, device, from_weights)
    images = replace(TYPICAL, device=device, from_weights=from_weights)
    stages, said = _resolved_for(images, recipe, changes)
    return stages, ("no --data: what follows is for typical images", *said)


def stages_for(
    data: DataSets, recipe: str, changes: tuple[str, ...], device: Literal["cpu", "cuda"], from_weights: bool
) -> tuple[Stages, tuple[str, ...]]:
    """As `stages_of` for images that are open already; raises StoreError where they have to be converted first."""
    if data.converted_first:
        raise StoreError(data.converted_first)
    if not follows_images(recipe):
        return resolve(recipe, changes), ()
    labels = [change.removeprefix("labels=") for change in changes if change.startswith("labels=")]
    typical = replace(TYPICAL, device=device, from_weights=from_weights)
    images = _look_at(data, labels[-1] if labels else "all", typical)
    return _resolved_for(images, recipe, changes)


def _resolved_for(images: Images, recipe: str, changes: tuple[str, ...]) -> tuple[Stages, tuple[str, ...]]:
    """The stages of a recipe that follows from `images`, and what is said of the choices."""
    stages = resolve(recipe, changes, images)
    said = Choices(images).said()
    if len(stages) > 1:
        lengths = ", ".join(f"{stage.name}.epochs" for stage in stages)
        said.append(f"{len(stages)} stages, one after the other (--set epochs=... is of each; of one: {lengths})")
    return stages, tuple(said)


def restaged(job: Job, changes: tuple[str, ...]) -> Stages:
    """The stages of `job` with these changes instead of its own."""
    return stages_of(job.recipe, changes, job.data, job.device, job.init_from is not None)[0]


def _look_at(data: DataSets, labels: str, images: Images) -> Images:
    """`images` with what `data` holds, of which `labels` show their label."""
    labelled = data.get(LABELLED)
    try:
        ids = resolved(parse_subset(labels), labelled, data).ids
    except ValueError as error:
        raise ConfigError(f"--labels: {error}") from None
    shown = labelled.labels if ids is None else labelled.labels[ids]
    counts = np.bincount(shown[shown >= 0])
    counts = counts[counts > 0]
    learnt = data.get(UNLABELLED) if {UNLABELLED, TRAIN} & data.sources.keys() else labelled
    return replace(
        images,
        num_images=len(learnt),
        num_labelled=int(counts.sum()),
        num_classes=len(counts),
        smallest_class=int(counts.min(initial=len(shown))),
        side=int(np.median(np.min(learnt.sizes, axis=1))),
        channels=learnt.channels,
    )


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
