"""The process that the ranks of this host are forked from, multiprocessing's server of forks: it imports what they need
once, where each would take seconds, and may begin to while whoever asks for them still looks at the data.

It ignores requests to stop, which SLURM sends to every process; the ranks answer them.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from typing import Any

FORWARDED = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT
IMPORTED = "fastssl.launch.imported"

_server = forkserver._forkserver
_is_ours = False


def begin(module: str) -> bool:
    """Start it, to import `module`, unless it runs; whether it is ours. Another's lacks our modules."""
    global _is_ours
    if _server._forkserver_pid is None:  # type: ignore[attr-defined]
        _server.set_forkserver_preload([IMPORTED, module])
        with requests_to(signal.SIG_IGN), _python_path():
            resource_tracker.ensure_running()  # which it needs, and which SLURM's signals reach, too
            _server.ensure_running()
        _is_ours = True
    return _is_ours


def end() -> None:
    """Stop it, if it is ours: the next launch's has the open files of its own day."""
    global _is_ours
    if _is_ours:
        if (pid := _server._forkserver_pid) is not None:  # type: ignore[attr-defined]
            os.kill(pid, signal.SIGKILL)  # it would wait for a rank of which an interrupted launch does not know
        _server._stop()  # type: ignore[attr-defined]
        _server.set_forkserver_preload(["__main__"])
        _is_ours = False


@contextmanager
def requests_to(handler: Any) -> Iterator[None]:
    """Requests to stop go to `handler`, one of `signal.signal`'s, meanwhile. Python lets the main thread alone decide
    that: in another one nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, handler) for signum in FORWARDED}
    try:
        yield
    finally:
        for signum, former in before.items():
            signal.signal(signum, former)


@contextmanager
def _python_path() -> Iterator[None]:
    """A process that is started meanwhile finds modules where we do, as in some versions of Python the server would
    not; and not in the folder that it is started in, where a file may have the name of one."""
    given = {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"}
    before = {name: os.environ.get(name) for name in given}
    os.environ |= given
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
