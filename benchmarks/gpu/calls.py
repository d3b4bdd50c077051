"""Parts, the calls they are done in, their seconds, and the one file that holds what was found.

A call may be cut off at any moment: what is found is written as soon as it is there, and a part that was begun goes on
from what it had. The clock is given, so that a test can be one.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Found = dict[str, Any]

MOST_BYTES = 16 << 20  # of a file that comes back from a rented machine
ROUNDS, WINDOW_S = 3, 20.0


class Skipped(Exception):
    """Why a part did not run."""


class OutOfTime(Exception):
    """A part must go on in another call."""


@dataclass(frozen=True)
class Part:
    """What a part does, and the seconds without which it need not begin. If it `must_pass`, nothing is timed before."""

    do: Callable[[Run], Found]
    needs_s: float
    must_pass: bool = False


class Record:
    """The file: by part its state (begun, done, failed), what was found, where and how long it took."""

    def __init__(self, path: Path | None):
        self.path = path
        there = path is not None and path.exists()
        self.parts: dict[str, Found] = json.loads(path.read_text())["parts"] if there else {}  # type: ignore[union-attr]

    def state(self, name: str) -> str:
        return self.parts.get(name, {}).get("state", "not begun")

    def put(self, name: str, state: str, **what: Any) -> None:
        self.parts[name] = self.parts.get(name, {}) | {"state": state} | what
        if self.path is None:
            return
        text = json.dumps({"parts": self.parts}, indent=1) + "\n"
        assert len(text) < MOST_BYTES
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".writing")
        beside.write_text(text)
        os.replace(beside, self.path)


@dataclass
class Run:
    """Where this runs, at full or at toy size, until when, and what was found of the part at hand so far."""

    device: torch.device
    toy: bool
    record: Record
    ends_s: float = float("inf")
    clock: Callable[[], float] = time.perf_counter
    rounds: int = ROUNDS
    window_s: float = WINDOW_S
    part: str = ""
    found: Found = field(default_factory=dict)
    longest_s: float = 0.0  # of what `once` measured

    def left_s(self) -> float:
        return self.ends_s - self.clock()

    def need(self, seconds: float) -> None:
        """Raise OutOfTime where less than that is left."""
        if self.left_s() < seconds:
            raise OutOfTime

    def once(self, key: str, measure: Callable[[], Any]) -> None:
        """Have `found[key]` be `measure()`, unless an earlier call has found it. Raises OutOfTime where what took
        longest so far would not end in time."""
        if key in self.found:
            return
        self.need(self.longest_s)
        begun = self.clock()
        self.found[key] = measure()
        self.longest_s = max(self.longest_s, self.clock() - begun)
        self.keep()

    def keep(self) -> None:
        """Write what `found` holds by now."""
        self.record.put(self.part, "begun", found=self.found)


def do(run: Run, parts: dict[str, Part], names: list[str], settings: Found, show: Callable[[str, Found], None]) -> None:
    """Do the named parts that are not done yet, as far as time lasts. All that must pass run, whatever fails before."""
    for name in names:
        part = parts[name]
        state = run.record.state(name)
        if state == "done":
            print(f"{name}: was done before", flush=True)
            continue
        if run.left_s() < part.needs_s:
            print(f"{name}: left for another call: {part.needs_s:.0f} s, {run.left_s():.0f} s are left", flush=True)
            continue
        if why := must_wait(parts, run.record) if not part.must_pass else "":
            print(f"{name}: left out: {why}", flush=True)
            continue
        # what a failed part found may be mended by now; what a timed one had measured when it was cut off is good
        run.part, run.found = name, run.record.parts.get(name, {}).get("found", {}) if state == "begun" else {}
        run.longest_s, begun = 0.0, run.clock()
        run.record.put(name, "begun", found=run.found, settings=settings)
        try:
            run.found = part.do(run)
            state = "done" if run.found.get("passed", True) else "failed"
        except Skipped as why:
            run.found, state = {"skipped": str(why)}, "done"
        except OutOfTime:
            state = "begun"
        except Exception as error:  # the parts after it may still show something, and this one's file is not lost
            run.found, state = (
                {**run.found, "passed": False, "error": f"{type(error).__name__}: {error}"[:2000]},
                "failed",
            )
        took_s = run.record.parts[name].get("took_s", 0.0) + run.clock() - begun
        run.record.put(name, state, found=run.found, took_s=round(took_s, 1))
        show(name, run.found)
        print(f"{name}: {'goes on in another call' if state == 'begun' else state}", flush=True)


def must_wait(parts: dict[str, Part], record: Record) -> str:
    """What stands between a part that times something and its clock."""
    states = {name: record.state(name) for name, part in parts.items() if part.must_pass}
    if failed := [name for name, state in states.items() if state == "failed"]:
        return f"{', '.join(failed)} failed"
    if missing := [name for name, state in states.items() if state != "done"]:
        return f"{', '.join(missing)} must pass first"
    return ""


def next_lines(parts: dict[str, Part], calls: tuple[tuple[str, ...], ...], record: Record, command: str) -> list[str]:
    """What to do after this call: to read, and to type."""
    for number, names in enumerate(calls, 1):
        left = [name for name in names if record.state(name) not in ("done", "failed")]
        failed = [name for name in names if record.state(name) == "failed"]
        if left and not (number > 1 and must_wait(parts, record)):
            return [f"next, call {number} of {len(calls)}: {command} {' '.join(left)}"]
        if failed:
            lines = [f"failed, see above and {record.path}: {', '.join(failed)}"]
            return [*lines, f"mended, next: {command} {' '.join(failed)}"]
    return [f"all {len(calls)} calls are done; keep {record.path}"]
