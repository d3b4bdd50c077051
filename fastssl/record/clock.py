"""Where the training loop's wall time goes: waiting for data, stepping, or pausing to evaluate and save.

Host time only, and nothing here synchronises a device: over a logging window, which ends in the one transfer of the
loss, host and device time agree.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

NUM_WINDOWS_IN_ETA = 10  # enough to smooth a slow window, few enough to follow a change of pace
MAX_PACES = 1000


@dataclass(frozen=True)
class Pace:
    """How long one step took, without pauses."""

    step_s: float
    wait_s: float  # for its batch, not in step_s


class Clock:
    """Seconds and images since the last `window()`.

    Time is of three kinds: waiting (inside `waiting()`), paused (inside `paused()`) and, all the rest, stepping.
    Paused time counts in no rate. The two contexts do not nest.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self.doing = "stepping"  # or what the context is that is being run; read by other threads
        self._recent: deque[tuple[float, int]] = deque(maxlen=NUM_WINDOWS_IN_ETA)  # (unpaused seconds, steps)
        self._warm = False
        self._paces: deque[Pace] = deque(maxlen=MAX_PACES)
        self._begin()
        self._begin_step()

    def _begin(self) -> None:
        self._start, self._wait_s, self._pause_s = self._now(), 0.0, 0.0
        self._num_images = self._num_steps = 0

    def _begin_step(self) -> None:
        self._step_start, self._step_wait_s, self._step_pause_s = self._now(), 0.0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around whatever fetches the next batch."""
        start, self.doing = self._now(), "waiting for data"
        try:
            yield
        finally:
            waited_s = self._now() - start
            self._wait_s += waited_s
            self._step_wait_s += waited_s
            self.doing = "stepping"

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training: evaluation, checkpoints."""
        start, self.doing = self._now(), "pausing"
        try:
            yield
        finally:
            paused_s = self._now() - start
            self._pause_s += paused_s
            self._step_pause_s += paused_s
            self.doing = "stepping"

    def step(self, num_images: int) -> None:
        """Counts one finished step and the images it used, over all ranks."""
        self._num_steps += 1
        self._num_images += num_images
        step_s = self._now() - self._step_start - self._step_wait_s - self._step_pause_s
        self._paces.append(Pace(step_s, self._step_wait_s))
        self._begin_step()

    def paces(self) -> list[Pace]:
        """Each step's since the last call, the last MAX_PACES at most."""
        paces = list(self._paces)
        self._paces.clear()
        return paces

    def window(self) -> dict[str, float]:
        """What happened since the last call, and starts afresh.

        elapsed_s is the window's length without pauses, images_per_s the rate over it; step_s is what a step took on
        average, of which wait_s, the share wait_share, was spent waiting.
        """
        elapsed_s = max(self._now() - self._start - self._pause_s, 1e-9)
        num_steps = max(self._num_steps, 1)
        measured = {
            "images_per_s": self._num_images / elapsed_s,
            "wait_share": self._wait_s / elapsed_s,
            "step_s": elapsed_s / num_steps,
            "wait_s": self._wait_s / num_steps,
            "elapsed_s": elapsed_s,
        }
        if self._num_steps and self._warm:
            self._recent.append((elapsed_s, self._num_steps))
        self._warm = self._warm or self._num_steps > 0
        self._begin()
        return measured

    def eta_s(self, num_steps_left: int) -> float | None:
        """Seconds that as many steps will take at the pace of the last windows, pauses not foreseen. The first window,
        in which code is compiled and caches fill, tells nothing: None until there is another."""
        num_steps = sum(steps for _, steps in self._recent)
        return num_steps_left * sum(s for s, _ in self._recent) / num_steps if num_steps else None
