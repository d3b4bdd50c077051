"""Run directories as another commit makes them: `python -m tools.old_runs FOLDER [COMMIT] [--cifar10 DIR]`.

Small runs, trained, evaluated, embedded and exported with that commit's code, and beside each a half-finished one: what
a kill just before the last checkpoint would have left of it. Today's code is held to them (`tests/end_to_end/
test_old_runs.py`). CIFAR-10's runs need its binary files, of which a few hundred images are laid out as a folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from PIL import Image

from loaders.store.cifar import CLASS_NAMES, open_cifar10
from tools.other_commit import NoSuchCommit, start, tree_of
from tools.same_as import REFERENCE

DRIVER = Path(__file__).with_name("run_commands.py")
NUM_TRAIN, NUM_VALIDATION = 300, 200  # images of CIFAR-10


@dataclass(frozen=True)
class OldRun:
    """One run: what is typed to train it, and the protocols that score it."""

    recipe: str
    changes: tuple[str, ...]
    protocols: tuple[str, ...] = ("knn",)

    @property
    def on_cifar10(self) -> bool:
        return not self.recipe.endswith("digits")


SMALL = ("labels=per-class=10", "length=6steps", "checkpoint_every=3steps", "log_every=1steps", "batch_global=64")
RUNS = {
    run.recipe: run
    for run in (
        OldRun("paws.digits", ("length=2epochs", "checkpoint_every=1epochs"), ("knn", "soft-nn")),
        OldRun("supervised.digits", ("length=8epochs", "checkpoint_every=4epochs"), ("knn", "classifier")),
        OldRun("semppl.cifar10_small", (*SMALL, "encoder.base_width=8", "capacity=128")),
        OldRun("simclrv2.cifar10_small", (*SMALL, "encoder.base_width=8")),
        OldRun("s4l.rotation_cifar10_small", (*SMALL, "encoder.base_width=8"), ("knn", "classifier")),
    )
}


# ------------------------------------------------------------------------------------------------------------ commands


def training(run: OldRun, images: Path, out: Path) -> list[str]:
    """What is typed to train `run`, and to continue it."""
    changes = [word for change in run.changes for word in ("--set", change)]
    data = ["--data", str(images)] if run.on_cifar10 else []
    return ["train", run.recipe, *changes, *data, "--out", str(out)]


def looking(run: OldRun, run_dir: Path, out: Path) -> dict[str, list[str]]:
    """What is typed to look at `run_dir`, by the command's name; files go into `out`."""
    protocols = [word for protocol in run.protocols for word in ("--protocol", protocol)]
    return {
        "evaluate": ["evaluate", str(run_dir), *protocols],
        "embed": ["embed", str(run_dir), "--out", str(out / "embeddings")],
        "export": ["export", str(run_dir), "--out", str(out / "export")],
        "report": ["report", str(run_dir), "--out", str(out / "report.html")],
    }


def told(tree: Path, commands: Mapping[str, list[str]], folder: Path) -> dict[str, dict[str, Any]]:
    """What the code in `tree` says to each of `commands`, done in one process with one thread. `folder` takes files.
    Raises RuntimeError where the process itself fails."""
    folder.mkdir(parents=True, exist_ok=True)
    asked, answers, log = (folder / name for name in ("asked.json", "told.json", "log"))
    asked.write_text(json.dumps(commands))
    cpu = max(os.sched_getaffinity(0))
    if start(tree, str(DRIVER), str(asked), str(answers), cpu=cpu, log=log).wait():
        raise RuntimeError(f"with {tree}: {log.read_text()[-2000:]}")
    return json.loads(answers.read_text())


# --------------------------------------------------------------------------------------------------------------- files


def lay_out(cifar10: Path, images: Path) -> None:
    """The first images of CIFAR-10 as PNG files, `train/CLASS/` and `val/CLASS/`."""
    for split, source, count in zip(("train", "val"), open_cifar10(cifar10), (NUM_TRAIN, NUM_VALIDATION), strict=True):
        for i in range(count):
            path = images / split / CLASS_NAMES[source.labels[i]] / f"{i:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source.images[i]).save(path)


def halve(run_dir: Path, half: Path) -> None:
    """Copy a finished run of one stage without its result and last checkpoint. Metrics stay, as after a kill."""
    shutil.copytree(run_dir, half)
    (half / "result.json").unlink()
    *_, before, last = sorted((half / "checkpoints").glob("step-*"))
    shutil.rmtree(last)
    (half / "checkpoints" / "latest").write_text(before.name + "\n")


def make(commit: str, folder: Path, cifar10: Path | None) -> dict[str, dict[str, Any]]:
    """For every run of RUNS, those on CIFAR-10 only where it is given: FOLDER/NAME/run, its unfinished twin
    FOLDER/NAME/half, and what the commit's code makes of the finished one beside them. Returns what it said, by
    "NAME evaluate" and the like. Raises NoSuchCommit, or RuntimeError where any command fails."""
    tree, images = tree_of(commit), folder / "images"
    if cifar10 is not None:
        lay_out(cifar10, images)
    commands = {}
    for name, run in RUNS.items():
        if cifar10 is not None or not run.on_cifar10:
            commands[f"{name} train"] = training(run, images, folder / name / "run")
            looks = looking(run, folder / name / "run", folder / name)
            commands |= {f"{name} {what}": command for what, command in looks.items()}
    answers = told(tree, commands, folder / "old")
    for what, answer in answers.items():
        if answer["exit_code"]:
            raise RuntimeError(f"{what}: {answer['stderr']}")
        if what.endswith(" train"):
            run_dir = folder / what.removesuffix(" train") / "run"
            halve(run_dir, run_dir.with_name("half"))
    return answers


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("commit", default=REFERENCE)
@click.option("--cifar10", type=click.Path(path_type=Path, exists=True), help="CIFAR-10's binary files.")
def main(folder: Path, commit: str, cifar10: Path | None) -> None:
    """Make run directories in FOLDER with the code of COMMIT [41f6bfd]."""
    folder.mkdir(parents=True)
    try:
        answers = make(commit, folder.absolute(), cifar10)
    except (NoSuchCommit, RuntimeError) as error:
        raise click.ClickException(str(error)) from None
    for what, answer in answers.items():
        click.echo(f"--- {what}\n{answer['stdout']}")


if __name__ == "__main__":
    main()
