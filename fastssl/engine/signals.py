"""Requests to stop: signals that ask a run to save and leave, and how the ranks agree on the step at which they do.

SIGTERM, SIGUSR1, SIGUSR2 (SLURM's time limit and preemption, submitit, a user's `kill`) and SIGINT (Ctrl-C) ask. Each
rank tells the others at every step, and all learn of it at the step after, so that nobody waits for the telling: a
request is met at the second step boundary after it at the latest. The run saves there and ends with EXIT_STOPPED.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

from fastssl import dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
SAME_REQUEST_S = 2.0  # schedulers signal a whole group, and launchers pass it on: one request may come several times


class StopRequest:
    """Within its context: the number of the signal that has asked this process to stop, else 0; always 0 where the
    context is not of the main thread.

    A second request, later than SAME_REQUEST_S, ends the process at once with 128 + its number. A thread answers, not
    a Python signal handler: that would wait for a collective that never ends. Where SIGINT was KeyboardInterrupt
    before, as in a notebook, a second one is that again.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._asked_s = 0.0
        self._listens = False

    def __enter__(self) -> StopRequest:
        self._listens = threading.current_thread() is threading.main_thread()
        if not self._listens:  # Python lets nobody else set handlers
            return self
        self._read, write = socket.socketpair()
        write.setblocking(False)
        self._write = write
        self._handlers = {signum: signal.signal(signum, self._handle) for signum in STOP_SIGNALS}
        self._wakeup_before = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="fastssl-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._listens:
            return
        signal.set_wakeup_fd(self._wakeup_before)
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)
        self._write.close()  # ends the thread
        self._thread.join()
        self._read.close()

    def _listen(self) -> None:
        while arrived := self._read.recv(64):
            for signum in arrived:
                if signum not in STOP_SIGNALS:
                    continue
                if not self.signum:
                    self._asked_s, self.signum = time.monotonic(), signum
                elif self._again() and not self._raises(signum):
                    os._exit(128 + signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.signum and self._again() and self._raises(signum):
            raise KeyboardInterrupt

    def _again(self) -> bool:
        """Whether what arrives now is more than the request that was made."""
        return time.monotonic() - self._asked_s > SAME_REQUEST_S

    def _raises(self, signum: int) -> bool:
        return self._handlers[signal.Signals(signum)] is signal.default_int_handler


class Agreement:
    """A small number of each rank's a step, of which all ranks learn the greatest one step later. Nothing of it passes
    through a GPU, and the answer is there long before it is asked for."""

    def __init__(self) -> None:
        self._answer: Callable[[], int] | None = None

    def exchange(self, mine: int) -> int:
        """Give this step's number and take the greatest of the step before, 0 at first. All ranks must call it at the
        same steps."""
        greatest = self.close()
        self._answer = dist.begin_greatest(mine)
        return greatest

    def close(self) -> int:
        """Take the last answer, so that nothing is under way any more."""
        answer, self._answer = self._answer, None
        return answer() if answer is not None else 0
