"""A small real job, two ranks on gloo, that faults are done to: started, watched to a random moment, and compared."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

from tests.end_to_end import command
from tests.support.interrupted import assert_same_run

RANKS = 2
STEPS, CHECKPOINT_EVERY = 48, 4
LATEST = STEPS - 12  # the latest step to aim at: what is done must arrive before the end
WATCHDOG_S = 10.0  # where the watchdog is meant to bite
MOST_AGAIN = 3 * CHECKPOINT_EVERY  # steps lost: to the newest checkpoint, one more in flight, one more damaged
GONE_S = 10.0  # within which no process may be left of a job that has ended
TRAIN = (
    "train", "--out", "run", "--cpu-ranks", str(RANKS), *command.CHANGES, "--set", f"length={STEPS}steps",
    "--set", f"checkpoint_every={CHECKPOINT_EVERY}steps", "--set", f"evaluate_every={STEPS}steps",
)  # fmt: skip
WATCHED = (*TRAIN, "--watchdog", f"{WATCHDOG_S:g}")


class TooLate(Exception):
    """The run had finished before anything was done to it."""


@dataclass
class Scene:
    """One run: `folder` holds `run`, the run directory, and `log`; `whole` is the run that nothing was done to.

    `num_faults` are done to it one after the other before it may finish.
    """

    folder: Path
    whole: Path
    random: random.Random
    num_faults: int = 1
    struck_s: float = 0.0  # when the last fault was about to be done, by the monotonic clock

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @contextmanager
    def training(self, first: int = 0, train: tuple[str, ...] = TRAIN) -> Iterator[tuple[Popen, list[int]]]:
        """The job, at a random moment after a random step, at least `first`, and its ranks' processes in order. Step 0
        stands for the time in which they start.

        At the end of the context it must have ended, and all its processes with it.
        """
        done = command.steps_logged(self.run_dir)
        at = max(first, done + self.random.randint(0, LATEST // self.num_faults))
        with command.running(self.folder, *train) as process:
            command.wait_until(
                lambda: (
                    process.poll() is not None
                    or (len(ranks_of(process)) == RANKS and command.steps_logged(self.run_dir) >= at)
                )
            )
            time.sleep(self.random.uniform(0, 0.1))  # more than a step
            everyone = command.children(process.pid)
            self.struck_s = time.monotonic()
            yield process, ranks_of(process)
            process.wait(timeout=120)
            command.wait_until(lambda: not any(map(command.alive, everyone)), timeout_s=GONE_S)
        if self.finished():
            raise TooLate

    def log(self) -> str:
        return (self.folder / "log").read_text()

    def expect(self, process: Popen, code: int, says: str) -> None:
        """How the launcher ended: its exit code, and in its last line what it said."""
        last_line = self.log().rstrip().rpartition("\n")[2]
        assert process.returncode == code and says in last_line and "Traceback" not in self.log(), (
            f"exit code {process.returncode}, not {code} with {says!r}:\n{self.log()}"
        )

    def checkpoints(self) -> list[Path]:
        """Whole ones, the oldest first."""
        return sorted((self.run_dir / "checkpoints").glob("step-*"))

    def finished(self) -> bool:
        return (self.run_dir / "result.json").exists()

    def finish(self) -> str:
        """The same command, which must go on to the end without much done again; from where to where, and how long
        after the fault the first step was done again, in words."""
        done = command.steps_logged(self.run_dir)
        with command.running(self.folder, *TRAIN) as process:
            lost = self.goes_on(done, self.log, lambda: process.poll() is not None)
            code = process.wait(timeout=250)
        assert code == 0, self.log()
        return lost

    def goes_on(self, done: int, log: Callable[[], str], ended: Callable[[], bool]) -> str:
        """Wait for the first new step of the command that goes on after `done` steps, and has written `log` since; from
        where to where, and how long after the fault, in words. AssertionError where much is done again."""
        command.wait_until(lambda: "\n  directory " in log() or ended())
        found = re.search(r"^  continues +from step (\d+)$", log(), re.MULTILINE)
        resumed = int(found[1]) if found else 0
        command.wait_until(lambda: command.steps_logged(self.run_dir) > resumed or ended())
        lost_s = time.monotonic() - self.struck_s
        assert done - resumed <= MOST_AGAIN, f"{done} steps were done, and it went on from {resumed}:\n{log()}"
        return f"{done} steps done, went on from {resumed}, {lost_s:.1f} s after the fault"

    def compare(self) -> None:
        """AssertionError unless last checkpoint and metrics are, bit for bit, those of the whole run."""
        assert_same_run(self.run_dir, self.whole)
        steps = [record["step"] for record in command.metrics(self.run_dir) if "loss" in record]
        assert steps == list(range(1, STEPS + 1))


def ranks_of(process: Popen) -> list[int]:
    """The ranks that `process` has started, in order; not multiprocessing's resource tracker beside them."""
    servers = [pid for pid in command.children(process.pid) if "multiprocessing.forkserver" in _command_line(pid)]
    return sorted(servers)[1:]  # each rank has the command line of the server that it was forked from


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def threads(pid: int) -> list[str]:
    """The state of each of a process's threads, as one letter; none of one that is gone."""
    try:
        stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [stat.rpartition(")")[2].split()[0] for stat in stats]


def cpus() -> list[int]:
    return sorted(os.sched_getaffinity(0))
