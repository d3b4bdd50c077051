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
from dataclasses import dataclass

import numpy as np

PHASES = ("plan", "fetch", "decode", "crop", "finish")
PLAN, FETCH, DECODE, CROP, FINISH = range(len(PHASES))

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
        row = self._row()[phase]
        row[0] += wall_ns - since[0]
        row[1] += cpu_ns - since[1]
        row[2] += 1
        return until

    def add_ns(self, phase: int, spent_ns: np.ndarray, num_stamps: int) -> None:
        """Count what compiled code has measured in this thread by itself: wall and CPU."""
        self._row()[phase] += (*spent_ns, num_stamps)

    def totals(self) -> np.ndarray:
        """float64 [phases, 3]: wall seconds, CPU seconds (both of all threads) and stamps so far."""
        total = np.zeros((len(PHASES), 3))
        for row in self._all:
            total += row
        total[:, :2] /= 1e9
        return total

    def _row(self) -> np.ndarray:
        try:
            row: np.ndarray = self._own.row
        except AttributeError:
            row = self._own.row = np.zeros((len(PHASES), 3))
            self._all.append(row)
        return row


@dataclass(frozen=True)
class Prepared:
    """One batch: wall seconds from the first plan to the last finish, and each stream's totals at its end; differences
    between batches are what each took.

    totals    float64 [streams, phases, 3], as `PhaseTimes.totals`
    elapsed_s float64 [streams, 2], of planning and rendering, and of finishing: threads work on one of these at a time,
              and some of them idle towards its end, which no thread counts
    """

    step: int
    wall_s: float
    totals: np.ndarray
    elapsed_s: np.ndarray

    def by_phase(self, before: Prepared) -> np.ndarray:
        """Wall seconds float64 [phases] that the loader spent since `before`: they add up to what its batches took.
        What threads do side by side is divided as they spent their time."""
        wall_s = (self.totals - before.totals)[:, :, 0]
        rendered_s, finished_s = (self.elapsed_s - before.elapsed_s).T
        side_by_side = wall_s[:, [FETCH, DECODE, CROP]]
        shares = side_by_side / np.maximum(side_by_side.sum(1, keepdims=True), 1e-12)
        parts = np.zeros_like(wall_s)
        parts[:, PLAN], parts[:, FINISH] = wall_s[:, PLAN], finished_s
        parts[:, [FETCH, DECODE, CROP]] = shares * np.maximum(rendered_s - wall_s[:, PLAN], 0.0)[:, None]
        by_phase: np.ndarray = parts.sum(0)
        return by_phase


def stamp_s() -> float:
    """What one stamp costs here, in seconds of CPU."""
    times, stamp, count = PhaseTimes(), now(), 2000
    begin = time.thread_time()
    for _ in range(count):
        stamp = times.add(PLAN, stamp)
    return (time.thread_time() - begin) / count
