"""A run directory belongs to one live job at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from fastssl import dist
from fastssl.errors import FastsslError

LOCK = "lock"
PATIENCE_S = 5.0  # the ranks of a job that was just ended may take a moment to go
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # what file systems answer that keep none


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Hold `out`, made where it is missing, for the first rank of this job. Raises FastsslError, on every rank, where
    another live job has it, or where it cannot be written.

    The kernel keeps the lock and drops it with the process that holds it, however that ends, so none is ever stale;
    what the file says of its holder is for the message alone. On NFS the lock reaches other hosts where the server's
    lock service runs (not with the mount option `nolock` or `local_lock`).
    """
    problem, file = None, None
    if dist.is_main():
        try:
            out.mkdir(parents=True, exist_ok=True)
            file = os.open(out / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if not _taken(file):
                holder = _holder(out / LOCK)
                problem = f"{out} is in use by another job ({holder}): stop that one, or choose another --out"
        except OSError as error:
            problem = f"--out {out} cannot be written: {error.strerror}"
    try:
        if problem := dist.broadcast_object(problem):
            raise FastsslError(problem)
        yield
    finally:
        if file is not None:
            os.close(file)


def _taken(file: int) -> bool:
    """Whether the lock could be had within PATIENCE_S; then the file names this process."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print("note: this file system keeps no locks: see to it that no other job uses --out", flush=True)
            break
    os.ftruncate(file, 0)
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    os.pwrite(file, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}).encode(), 0)
    return True


def _holder(path: Path) -> str:
    try:
        return ", ".join(f"{name} {value}" for name, value in json.loads(path.read_text()).items())
    except (OSError, ValueError):  # it is just being written
        return "which has just begun"
