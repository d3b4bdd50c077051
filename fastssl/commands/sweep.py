"""A sweep: a run for each setting of a grid, scored on training images held out for it, then the best of them for good.

Every run is one like any other in a directory of its own, so the same command continues a sweep that was stopped. None
learns from labels of the held-out images, and none opens the validation images. The setting with the most held-out
images right (of equals the first) goes to `final/`. Where the held-out images had been taken out of the labels, it is
trained there once more, with all of them; where they were no part of the labels to begin with, that would be the same
run again, and its networks are taken as they are. Only then are the validation images opened, and `final/` is scored on
them once.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from fastssl.api.jobs import restaged
from fastssl.config.calls import split
from fastssl.config.plain import differences
from fastssl.engine.job import Job
from fastssl.errors import ConfigError, FastsslError, Hung, Stopped
from fastssl.evaluation import FAILED
from fastssl.evaluation.accuracies import accuracy_cell, mean_and_spread
from fastssl.methods.base import Config, Epochs, Stage
from fastssl.record.trackers import WANDB_RUN_ID
from fastssl.run_dir.files import RESOLVED, RESULT, read_json
from fastssl.run_dir.lock import LOCK
from loaders.files import whole_folder, write_file
from loaders.labels.subsets import Resolved
from loaders.loader import resolved
from loaders.plan.views import parse_subset
from loaders.store.data import LABELLED, VALIDATION, DataSets, open_data

FINAL, RECORD, TABLE = "final", "sweep.json", "sweep.md"
HELD_OUT_PER_CLASS = 12  # as PAWS's published list for ImageNet
# Published for this, by data set, with the labels that share no image with it.
HELD_OUT_LISTS = {"imagenet": ("paws-heldout", {"all", "simclr-1", "simclr-10"})}


@dataclass(frozen=True)
class Sweep:
    """What is to be done, known before any data is opened.

    base      the job as it would be without the sweep; `out` is the directory of the sweep
    settings  directory name -> the changes that are this setting
    runs      directory name -> its job, scored on the held-out images
    score     the number of a run's result that counts
    """

    base: Job
    grid: dict[str, tuple[str, ...]]
    held_out: str
    settings: dict[str, tuple[str, ...]]
    runs: dict[str, Job]
    score: str

    def described(self) -> str:
        """What `--dry-run` prints of it."""
        return (
            f"  sweep        {len(self.runs)} runs: {', '.join(self.runs)}\n"
            f"  held out     {self.held_out}; the best run by {self.score} goes to {self.base.out / FINAL}"
        )


def prepare(job: Job, swept: tuple[str, ...], held_out: str | None) -> Sweep:
    """The sweep of `job` over the values in `swept`, each KEY=V1,V2,... Without `held_out` (a subset as users write it)
    it is a published list where the data set has one, else twelve images of every class whose labels the recipe does
    not use, or, where it uses all labels, twelve of all.

    Raises ConfigError for what can be said without data: keys and values that do not fit, keys or settings twice.
    """
    grid = _grid(swept, job.changes)
    scoring = job.stages[-1]
    if scoring.do != "train" or not scoring.evaluate:
        raise ConfigError(f"--sweep chooses by an accuracy, and {job.recipe} measures none: --set evaluate=knn")
    held_out = held_out or _default_held_out(scoring.config)
    try:
        parse_subset(held_out)
    except ValueError as error:
        raise ConfigError(f"--held-out: {error}") from None
    settings: dict[str, tuple[str, ...]] = {}
    runs: dict[str, Job] = {}
    for values in itertools.product(*grid.values()):
        setting = tuple(f"{key}={value}" for key, value in zip(grid, values, strict=True))
        name = quote(",".join(setting), safe="=,+")
        run = _with(job, (*job.changes, *setting, *_without_labels_of(held_out, job.stages)))
        if twin := next((other for other in runs if runs[other].stages == run.stages), None):
            raise ConfigError(f"--sweep: {twin} and {name} are the same run")
        settings[name] = setting
        runs[name] = replace(run, out=job.out / name, held_out=held_out)
    return Sweep(job, grid, held_out, settings, runs, f"{scoring.evaluate[0].replace('-', '_')}_top1")


def run(sweep: Sweep, start: Callable[[Job], Any]) -> None:
    """Do, or finish, the sweep: `start` does each run. Leaves sweep.json and sweep.md and prints the latter.

    Raises ConfigError where data, labels and held-out images do not fit or the directory holds something else,
    FastsslError where no run came to an end with finite weights, and what `start` raises, but for a run that diverges,
    which only counts as one that was not chosen.
    """
    record = _claimed(sweep, open_data(sweep.base.data, validation=False))
    for name, job in sweep.runs.items():
        row = record["runs"].get(name)
        if row is None or not (row.get("diverged") or (job.out / RESULT).exists()):
            record["runs"][name] = _scored(job, sweep.score, start)
            _write(sweep.base.out, record)
    scores = {name: row["top1"] for name, row in record["runs"].items() if not row.get("diverged")}
    if not scores:
        raise FastsslError(f"every run of the sweep in {sweep.base.out} diverged: sweep lower learning rates")
    record["chosen"] = max(sweep.runs, key=lambda name: scores.get(name, -1.0))  # the first of equals
    _write(sweep.base.out, record)
    if open_data(sweep.base.data).get(VALIDATION) is None:
        raise ConfigError(
            f"{record['chosen']} is the best run, but there are no validation images: give --data validation=PATH"
        )
    record["final"] = _scored(_final(sweep, record["chosen"]), sweep.score, start)
    _write(sweep.base.out, record)
    print((sweep.base.out / TABLE).read_text())


def _grid(swept: tuple[str, ...], changes: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Values by key, as typed."""
    grid: dict[str, tuple[str, ...]] = {}
    taken = {change.partition("=")[0].strip() for change in changes}
    for text in swept:
        key, _, rest = text.partition("=")
        key, values = key.strip(), tuple(split(rest))
        if not key or not values or not all(values):
            raise ConfigError(f"--sweep {text!r}: write KEY=V1,V2,...")
        if key in grid:
            raise ConfigError(f"--sweep {key}: given twice; write all its values in one, separated by commas")
        if key in taken:
            raise ConfigError(f"{key} is both swept and set: leave one out")
        if key.rpartition(".")[2] == "labels":
            raise ConfigError("--sweep labels: runs with other labels are no settings to choose from; sweep each alone")
        grid[key] = values
    return grid


def _default_held_out(method: Config) -> str:
    published, apart = HELD_OUT_LISTS.get(method.dataset, ("", set()))
    if method.labels in apart:
        return published
    return f"per-class={HELD_OUT_PER_CLASS}" + ("" if method.labels == "all" else f" of not:{method.labels}")


def _without_labels_of(held_out: str, stages: tuple[Stage, ...]) -> tuple[str, ...]:
    """The changes by which stages that use all labels leave those of the held-out images alone."""
    return tuple(f"{stage.name}.labels=not:{held_out}" for stage in stages if stage.config.labels == "all")


def _with(job: Job, changes: tuple[str, ...]) -> Job:
    return replace(job, changes=changes, stages=restaged(job, changes))


def _checked(sweep: Sweep, data: DataSets) -> Resolved:
    """The held-out images, found fit to choose by: of every class, labelled, and none of them learnt from."""
    source = data.get(LABELLED)
    held_out = resolved(parse_subset(sweep.held_out), source, data)
    ids = _ids(held_out)
    option = f"--held-out {sweep.held_out!r}"
    for stage in next(iter(sweep.runs.values())).stages:
        learnt = resolved(parse_subset(stage.config.labels), source, data)
        if shared := len(np.intersect1d(ids, _ids(learnt))):
            raise ConfigError(
                f"{option}: {shared} of its {len(ids)} images are among the training labels ({stage.config.labels}); "
                f"others are --held-out 'per-class={HELD_OUT_PER_CLASS} of not:{stage.config.labels}'"
            )
    if unlabelled := int((source.labels[ids] < 0).sum()):
        raise ConfigError(f"{option}: {unlabelled} of its {len(ids)} images carry no label")
    empty = np.flatnonzero(np.bincount(source.labels[ids], minlength=source.num_classes) == 0)
    if len(empty):
        others = f" and of {len(empty) - 1} more classes" if len(empty) > 1 else ""
        raise ConfigError(f"{option}: it has no image of class {source.class_names[empty[0]]!r}{others}")
    return held_out


def _ids(images: Resolved) -> np.ndarray:
    return np.arange(images.count) if images.ids is None else images.ids


def _claimed(sweep: Sweep, data: DataSets) -> dict[str, Any]:
    """The record of the sweep so far. Raises ConfigError where the directory holds another, or a run, and where the
    held-out images are not fit to choose by."""
    job, path, held_out = sweep.base, sweep.base.out / RECORD, _checked(sweep, data)
    what = {
        "recipe": job.recipe,
        "seed": job.seed,
        "changes": list(job.changes),
        "grid": {key: list(values) for key, values in sweep.grid.items()},
        "data": data.fingerprints(),
        "held_out": {
            "subset": sweep.held_out,
            "split": held_out.name,
            "sha256": held_out.sha256,
            "count": held_out.count,
        },
        "score": sweep.score,
    }
    if not path.exists():
        if (job.out / RESOLVED).exists():
            raise ConfigError(f"{job.out} holds a run, not a sweep: choose another --out")
        return {**what, "command": job.command, "runs": {}}
    there: dict[str, Any] = read_json(path)
    if changed := differences({key: there.get(key) for key in what}, what):
        raise ConfigError(f"{job.out} holds another sweep ({'; '.join(changed[:3])}): choose another --out")
    return there


def _scored(job: Job, score: str, start: Callable[[Job], Any]) -> dict[str, Any]:
    """The run's accuracy with its interval, and its steps; or that it diverged."""
    try:
        result = start(job)
    except (Stopped, Hung):
        raise
    except FastsslError as error:
        if not any(job.out.glob("**/nonfinite-step-*.json")):
            raise
        print(f"{job.out.name} diverged: {error}", flush=True)
        return {"diverged": True}
    if why := result.get(FAILED, {}).get(job.stages[-1].evaluate[0]):
        raise FastsslError(f"{job.out} could not be scored: {why}; remove its {RESULT}, and the same command scores it")
    if score not in result:
        raise ConfigError(f"--sweep chooses by {score}, which is not measured: --set evaluate=knn")
    interval = result[score.removesuffix("_top1")]["top1_ci95"]
    row = {"top1": result[score], "top1_ci95": interval, "steps": result["steps"]}
    top5 = score.replace("_top1", "_top5")
    return row | ({"top5": result[top5]} if top5 in result else {})


def _final(sweep: Sweep, chosen: str) -> Job:
    """The run in `final/`: the chosen setting with all labels, scored on the validation images at its end alone."""
    base, run, out = sweep.base, sweep.runs[chosen], sweep.base.out / FINAL
    if not _without_labels_of(sweep.held_out, base.stages):
        _copy(run.out, out)
        return replace(run, out=out, held_out=None, allow_change=(*run.allow_change, "held_out", "data.validation"))
    changes = (*base.changes, *sweep.settings[chosen])
    stages = restaged(base, changes)
    return replace(_with(base, (*changes, *map(_evaluated_once, stages))), out=out)


def _evaluated_once(stage: Stage) -> str:
    unit = "epochs" if isinstance(stage.length, Epochs) else "steps"
    return f"{stage.name}.evaluate_every={stage.length.count}{unit}"


def _copy(run: Path, out: Path) -> None:
    """The finished run's files but for what says that it is finished; whole or not at all."""
    if not out.exists():
        with whole_folder(out) as folder:
            ignored = shutil.ignore_patterns(RESULT, LOCK, WANDB_RUN_ID)
            shutil.copytree(run, folder, ignore=ignored, dirs_exist_ok=True)


def _write(out: Path, record: dict[str, Any]) -> None:
    write_file(out / RECORD, json.dumps(record, indent=2) + "\n")
    write_file(out / TABLE, _table(record))


def _table(record: dict[str, Any]) -> str:
    """The record for people, as Markdown; accuracies in %."""
    held_out, keys = record["held_out"], list(record["grid"])
    with_top5 = any("top5" in row for row in record["runs"].values())
    header = [*keys, "steps", f"held out, {record['score']}", *(["top-5"] if with_top5 else [])]
    header.append(f"validation, {record['score']}")
    lines = [
        f"# {record['recipe']}, swept",
        "",
        f"`{record['command']}`",
        "",
        f"Each run is scored on {held_out['count']:,} training images ({held_out['subset']}; sha256 "
        f"{held_out['sha256'][:12]}) whose labels it does not learn from. The best, in bold, goes to `{FINAL}/`, which "
        "is scored once on the validation images. Accuracies in %.",
        "",
        f"| {' | '.join(header)} |",
        f"|{'---|' * len(header)}",
    ]
    settings = itertools.product(*record["grid"].values())
    for (name, row), values in zip(record["runs"].items(), settings, strict=False):  # there may be more to come
        steps, top1, last = "–", "diverged", ""
        if not row.get("diverged"):
            steps, top1 = f"{row['steps']:,}", _percent(row).removesuffix(" (single seed)")
        cells = [*values, steps, top1]
        if with_top5:
            cells.append(f"{100 * row['top5']:.1f}" if "top5" in row else "–")
        if name == record.get("chosen"):
            cells = [f"**{cell}**" for cell in cells]
            final = record.get("final", {})
            last = "diverged" if final.get("diverged") else _percent(final) if final else ""
            if "top5" in final:
                last += f"; top-5 {100 * final['top5']:.1f}"
        lines.append(f"| {' | '.join([*cells, last])} |")
    return "\n".join(lines) + "\n"


def _percent(row: dict[str, Any]) -> str:
    return accuracy_cell(mean_and_spread([row["top1"]]), row["top1_ci95"])
