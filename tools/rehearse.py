"""A rented GPU machine played on this one: every call of `benchmarks.gpu`, killed in the middle, and to its end.

    python -m tools.rehearse [--python PYTHON] [--budget-s 570] [--json FILE]

What git tracks is laid out as it would be carried there, without its history; PYTHON (default: this one; that of
`tools.versions FOLDER --only 2.11.0 --checks` has the versions that such a machine brings) runs the calls at toy size,
without git on its PATH and, where this user may take it away, without a network. As soon as a part has written some of
what it finds, the call and all its processes get SIGKILL and the call is given again, as after a machine was lost; once
a part. Ends with code 1 where a call fails, does not end within its budget, leaves a file that cannot be read or loses
what a killed part had written.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MOST_CARRIED, MOST_BACK = 64 << 20, 16 << 20  # bytes that a call may bring along, and of a file that it brings back
OVER_S = 30.0  # beyond its budget, in which a call may end
MOST_TIMES = 8  # a call is given
GROWS = "first_step_s"  # the longest of several


class Wrong(Exception):
    """What a call did otherwise than it should."""


@dataclass
class Called:
    """A call as it went: how often it was given, the longest time that it took, what all of them took of CPUs, where it
    was killed, its last line."""

    parts: tuple[str, ...]
    times: int = 0
    longest_s: float = 0.0
    cpu_s: float = 0.0
    killed_in: list[str] = field(default_factory=list)
    said: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--budget-s", type=float, default=570.0)
    parser.add_argument("--json", type=Path, help="keep what the calls wrote")
    given = parser.parse_args()
    from benchmarks.gpu.__main__ import CALLS

    with tempfile.TemporaryDirectory(prefix="fastssl-rehearsal-") as name:
        folder = Path(name)
        num_bytes = carry(folder / "tree")
        prefix, environment = offline(), lonely(folder / "bin")
        print(
            f"{num_bytes / 2**20:.1f} MiB carried; {'no network' if prefix else 'the network could not be taken away'}"
        )
        try:
            for parts in CALLS:
                command = [*prefix, given.python, "-m", "benchmarks.gpu", *parts, "--dry-run"]
                called = call(command, parts, folder / "tree", environment, given.budget_s)
                show(called, found_in(folder / "tree"))
            if not called.said.startswith(f"all {len(CALLS)} calls are done"):
                raise Wrong(f"after the last call: {called.said}")
        except Wrong as why:
            raise SystemExit(f"tools.rehearse: {why}") from None
        finally:
            if given.json and (folder / "tree" / "gpu.json").exists():
                shutil.copy(folder / "tree" / "gpu.json", given.json)


def carry(tree: Path) -> int:
    """Lay out what git tracks in `tree`; its bytes, packed. Raises Wrong where they are too many."""
    packed = subprocess.run(["git", "archive", "--format=tar.gz", "HEAD"], cwd=ROOT, capture_output=True, check=True)
    if len(packed.stdout) > MOST_CARRIED:
        raise Wrong(f"{len(packed.stdout):,} bytes to carry, {MOST_CARRIED:,} may be")
    with tarfile.open(fileobj=BytesIO(packed.stdout)) as archive:
        archive.extractall(tree, filter="data")
    return len(packed.stdout)


def offline() -> tuple[str, ...]:
    """What goes before a command so that it has no network but the loopback; nothing where that cannot be had."""
    prefix = ("unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
    with suppress(FileNotFoundError):
        if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
            return prefix
    return ()


def lonely(folder: Path) -> dict[str, str]:
    """The environment with every program of the PATH but git, and nothing that names our data; links go to `folder`."""
    folder.mkdir()
    for place in os.environ["PATH"].split(os.pathsep):
        for program in Path(place).glob("*"):
            if not program.name.startswith("git"):
                with suppress(FileExistsError):
                    (folder / program.name).symlink_to(program)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("FASTSSL_", "PYTHON", "VIRTUAL_"))}
    return kept | {"PATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}


def call(
    command: Sequence[str], parts: tuple[str, ...], tree: Path, environment: dict[str, str], budget_s: float
) -> Called:
    """Give a call until it has nothing left to do, and kill it once in each part that writes while it works. Raises
    Wrong."""
    called, halves = Called(parts), {}
    while any(state(tree, part) != "done" for part in parts):
        called.times += 1
        if called.times > MOST_TIMES + len(called.killed_in):
            raise Wrong(f"{' '.join(parts)}: still not done after {called.times} times: {called.said}")
        begun_s, cpu_before_s = time.monotonic(), _cpu_s()
        with (tree / "said").open("w") as said:
            process = subprocess.Popen(
                [*command, "--budget-s", str(budget_s)],
                cwd=tree,
                env=environment,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            part = _watched(process, parts, tree, called.killed_in, begun_s + budget_s + OVER_S)
        called.cpu_s += _cpu_s() - cpu_before_s
        called.longest_s = max(called.longest_s, time.monotonic() - begun_s)
        lines = (tree / "said").read_text().strip().splitlines()
        called.said = lines[-1] if lines else ""
        if part:
            called.killed_in.append(part)
            halves[part] = found_in(tree)[part]["found"]
        elif process.returncode:
            raise Wrong(f"{' '.join(parts)} ended with {process.returncode}:\n" + "\n".join(lines[-20:]))
    for part, half in halves.items():
        if lost := [
            key for key in half if key != GROWS and not holds(found_in(tree)[part]["found"].get(key), half[key])
        ]:
            raise Wrong(f"{part} was killed, and lost {', '.join(lost)}")
    return called


def _cpu_s() -> float:
    """Of all processes that this one has waited for, and those that they have."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _watched(
    process: subprocess.Popen[bytes], parts: Sequence[str], tree: Path, before: Sequence[str], ends_s: float
) -> str:
    """Wait for the end of a call; or kill it in a part that has just written something, which is named. Raises Wrong
    where it takes too long."""
    there = found_in(tree)
    while process.poll() is None:
        if time.monotonic() > ends_s:
            os.killpg(process.pid, signal.SIGKILL)
            raise Wrong(f"{' '.join(parts)} did not end within its budget")
        for part in set(parts) - set(before):
            now = found_in(tree).get(part, {})
            if now.get("state") == "begun" and now["found"] and now["found"] != there.get(part, {}).get("found"):
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if state(tree, part) == "begun":  # else it was done in that very moment
                    return part
        time.sleep(0.005)
    return ""


def found_in(tree: Path) -> dict[str, Any]:
    """What the calls have written so far, by part. Raises Wrong where it cannot be read, or not be brought back."""
    file = tree / "gpu.json"
    if not file.exists():
        return {}
    try:
        text = file.read_text()
        if len(text) > MOST_BACK:
            raise Wrong(f"{file.name} has {len(text):,} bytes, {MOST_BACK:,} may come back")
        found: dict[str, Any] = json.loads(text)["parts"]
        return found
    except ValueError as error:
        raise Wrong(f"{file.name} cannot be read: {error}") from None


def state(tree: Path, part: str) -> str:
    return str(found_in(tree).get(part, {}).get("state", "not begun"))


def holds(after: Any, before: Any) -> bool:
    """Whether all of `before` is in `after`, which may have more: keys of dicts, entries of lists."""
    if isinstance(before, dict):
        return isinstance(after, dict) and all(holds(after.get(key), value) for key, value in before.items())
    if isinstance(before, list):
        return isinstance(after, list) and after[: len(before)] == before
    return bool(after == before)


def show(called: Called, found: dict[str, Any]) -> None:
    killed = f", killed in {', '.join(called.killed_in)}" if called.killed_in else ""
    took = f"{called.longest_s:.0f} s at most, {called.cpu_s:.0f} CPU seconds in all"
    print(f"{' '.join(called.parts)}: given {called.times} times, {took}{killed}")
    for part in called.parts:
        entry = found[part]["found"]
        note = entry.get("skipped") or entry.get("left out") or ("passed" if entry.get("passed") else "measured")
        print(f"  {part}: {found[part]['state']}: {note}", flush=True)
    print(f"  {called.said}", flush=True)


if __name__ == "__main__":
    main()
