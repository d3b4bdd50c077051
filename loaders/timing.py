"""Where a loader's threads spend their time, phase by phase: wall seconds and CPU seconds.

Always on. Each thread adds to an array of its own, so nothing locks and nothing waits; a reader sums over threads. A
stamp costs about a microsecond and there are a few an image, which takes milliseconds: `fastssl profile` reports
`stamp_s` times their number as its overhead.

Wall seconds of a phase hold all that its threads waited for (a disk, a core that was busy); CPU seconds do not, and so
say what the phase costs on a machine whose cores are free.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

PHASES = ("plan", "fetch", "decode", "crop", "finish")
PLAN, FETCH, DECODE, CROP, FINISH = range(len(PHASES))

_task = threading.local()  # `shares`: whether this thread is in a task that shares the time

Stamp = tuple[int, int]  # wall and this thread's CPU, nanoseconds


def now() -> Stamp:
    return time.perf_counter_ns(), time.thread_time_ns()


class PhaseTimes:
    """Seconds by phase that any number of threads spent for one stream."""

    def __init__(self) -> None:
        self._own = threading.local()
        self._all: list[np.ndarray] = []  # append is atomic

    def add(self, phase: int, since: Stamp) -> Stamp:
        """Count what this thread did since the stamp as `phase`; the stamp of the end, where the next phase begins."""
        wall_ns, cpu_ns = until = now()
        row = self.row()[phase]
        row[0] += wall_ns - since[0]
        row[1] += cpu_ns - since[1]
        row[2] += 1
        if not getattr(_task, "shares", False):
            row[3] += wall_ns - since[0]
        return until

    def add_ns(self, phase: int, spent_ns: np.ndarray, num_stamps: int) -> None:
        """Count what compiled code has measured in this thread by itself: wall and CPU."""
        self.row()[phase] += (*spent_ns, num_stamps, 0)

    def totals(self) -> np.ndarray:
        """float64 [phases, 4], so far: wall seconds, CPU seconds (both of all threads), stamps, and wall seconds as
        `Shares` divide them."""
        total = np.zeros((len(PHASES), 4))
        for row in self._all:
            total += row
        total[:, [0, 1, 3]] /= 1e9
        return total

    def row(self) -> np.ndarray:
        """This thread's part of `totals`, in nanoseconds."""
        try:
            row: np.ndarray = self._own.row
        except AttributeError:
            row = self._own.row = np.zeros((len(PHASES), 4))
            self._all.append(row)
        return row


class Shares:
    """Divides each moment among the tasks that are worked on in it: what n threads do side by side counts 1 / n, and
    all of it where the others have nothing to do."""

    def __init__(self, times: Iterable[PhaseTimes]):
        self._times = tuple(times)
        self._lock = threading.Lock()
        self._at_work, self._since_ns, self._share_ns = 0, 0, 0.0

    def during(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """What `work` returns; the phases that it counts meanwhile get its share of the time."""
        rows = [times.row() for times in self._times]
        walls_ns = [row[:, 0].copy() for row in rows]
        _task.shares = True
        begin_ns, begin_share_ns = self._count(1)
        try:
            return work(*arguments)
        finally:
            end_ns, end_share_ns = self._count(-1)
            _task.shares = False
            share = (end_share_ns - begin_share_ns) / max(end_ns - begin_ns, 1)
            for row, wall_ns in zip(rows, walls_ns, strict=True):
                row[:, 3] += (row[:, 0] - wall_ns) * share

    def _count(self, change: int) -> tuple[int, float]:
        """Now, and what a thread that had worked all along would have had of the time until now."""
        with self._lock:
            now_ns = time.perf_counter_ns()
            if self._at_work:
                self._share_ns += (now_ns - self._since_ns) / self._at_work
            self._since_ns = now_ns
            self._at_work += change
            return now_ns, self._share_ns


class Pool(ThreadPoolExecutor):
    """Threads whose tasks share the time."""

    def __init__(self, threads: int, name: str, shares: Shares):
        super().__init__(threads, thread_name_prefix=name)
        self._shares = shares

    def submit(self, work: Callable[..., Any], /, *arguments: Any) -> Future[Any]:  # type: ignore[override]
        return super().submit(self._shares.during, work, *arguments)


class Busy:
    """A clock that runs while at least one of some threads is at work."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._at_work, self._since, self._total_s = 0, 0.0, 0.0

    @contextmanager
    def working(self) -> Iterator[None]:
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def total_s(self) -> float:
        """Seconds so far."""
        with self._lock:
            return self._total_s + (time.perf_counter() - self._since if self._at_work else 0.0)

    def _count(self, change: int) -> None:
        with self._lock:
            if not self._at_work:
                self._since = time.perf_counter()
            self._at_work += change
            if not self._at_work:
                self._total_s += time.perf_counter() - self._since


@dataclass(frozen=True)
class Prepared:
    """What a loader had spent when one batch was ready, on all of them so far; differences are what each took.

    busy_s    wall seconds in which it worked, not those in which it waited for somebody to take a batch
    totals    float64 [streams, phases, 4], as `PhaseTimes.totals`, with what the next batch, rendered meanwhile, took
    """

    step: int
    busy_s: float
    totals: np.ndarray

    def by_phase(self, before: Prepared) -> np.ndarray:
        """Wall seconds float64 [phases] that the loader spent since `before`: they add up to those in which it worked,
        divided as `Shares` are."""
        shares_s = (self.totals - before.totals)[:, :, 3].sum(0)
        by_phase: np.ndarray = shares_s * (self.busy_s - before.busy_s) / max(shares_s.sum(), 1e-12)
        return by_phase


def stamp_s() -> float:
    """What one stamp costs here, in seconds of CPU."""
    times, stamp, count = PhaseTimes(), now(), 2000
    begin = time.thread_time()
    for _ in range(count):
        stamp = times.add(PLAN, stamp)
    return (time.thread_time() - begin) / count
