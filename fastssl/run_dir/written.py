"""What a run directory says of its run: everything that reads one starts here, whatever has become of its recipe."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastssl.config.modules import load_modules
from fastssl.config.plain import Notes, from_plain
from fastssl.errors import ConfigError
from fastssl.machine import version
from fastssl.methods.base import Stage, Stages
from fastssl.run_dir.files import RESOLVED, read_json


@dataclass(frozen=True)
class Written:
    """A run as it was begun. `resolved` is all that its `resolved.json` holds, as it stands there."""

    path: Path
    recipe: str
    seed: int
    stages: Stages
    held_out: str | None
    class_names: tuple[str, ...]  # of the labelled images, in the order of their numbers; empty where it is not said
    data: tuple[str, ...]
    changes: tuple[str, ...]
    init_from: Path | None
    unsafe_pickle: bool
    damaged: str  # "stop" or "replace", as it was begun or last continued
    resolved: dict[str, Any]

    def folder(self, stage: Stage) -> Path:
        """Where `stage` keeps its files."""
        return self.path if len(self.stages) == 1 else self.path / stage.name


def read_run(run: Path) -> Written:
    """What `run` says of itself. Modules that it needs are loaded; what it says otherwise than a run of today would is
    told on stderr, once in a process. Raises FastsslError where it is no run directory, is damaged, is of a newer
    fastssl, or needs what is gone."""
    if not (run / RESOLVED).is_file():
        raise ConfigError(f"{run} is no run directory: it has no {RESOLVED}")
    resolved = read_json(run / RESOLVED)
    try:
        began, notes = resolved["run"], Notes()
        refuse_newer(resolved, run)
        load_modules(began.get("modules", {}), run)
        written = Written(
            path=run,
            recipe=resolved["recipe"],
            seed=resolved["seed"],
            stages=stages_of(resolved, run, notes),
            held_out=resolved.get("held_out"),
            class_names=tuple(resolved.get("class_names", ())),
            data=tuple(began["data"]),
            changes=tuple(began["changes"]),
            init_from=None if began["init_from"] is None else Path(began["init_from"]),
            unsafe_pickle=began.get("unsafe_pickle", False),  # runs begun before there were these flags lack them
            damaged=began.get("damaged", "stop"),
            resolved=resolved,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{run / RESOLVED} is not what fastssl train writes: {error!r}") from None
    tell(notes, run)
    return written


def stages_of(resolved: dict[str, Any], run: Path, notes: Notes) -> Stages:
    """The stages in what `run`'s `resolved.json` holds. Raises ConfigError where today's fastssl has no such."""
    try:
        stages: Stages = from_plain(Stages, resolved["stages"], notes, "stages")
    except ConfigError as error:
        raise ConfigError(f"{run / RESOLVED}: {error}") from None
    if not stages:
        raise ConfigError(f"{run / RESOLVED} has no stages")
    return stages


def refuse_newer(resolved: dict[str, Any], run: Path) -> None:
    """Raise ConfigError where a newer fastssl has written `resolved`: it may mean what today's cannot know."""
    theirs, ours = resolved.get("versions", {}).get("fastssl", ""), version()
    if _numbers(theirs) > _numbers(ours) > ():
        raise ConfigError(f"{run} was made by fastssl {theirs}, and this is fastssl {ours}: install {theirs} or later")


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


def tell(notes: Notes, run: Path) -> None:
    """Say on stderr what was read otherwise than it stands there, each line once in a process."""
    for line in notes.lines(run):
        _say(f"note: {line}")


@cache
def _say(line: str) -> None:
    print(line, file=sys.stderr)
