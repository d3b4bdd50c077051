"""What ranks in other processes log, told in this one as they log it."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from pathlib import Path
from typing import Any

from fastssl.engine.job import Job

EVERY_S = 0.2


@contextmanager
def following(job: Job, heard: Callable[[dict[str, Any]], object]) -> Iterator[None]:
    """Within: `heard` gets each line that the job's ranks add to metrics.jsonl, on a thread of its own. What it raises
    asks the ranks to save and leave, and is raised at the end in the place of how they ended."""
    lines = _Lines([job.folder(stage) / "metrics.jsonl" for stage in job.stages])
    over, failed = threading.Event(), []  # type: threading.Event, list[BaseException]

    def tell() -> None:
        last = False
        while not last:
            last = over.wait(EVERY_S)
            for record in lines.new():
                try:
                    heard(record)
                except BaseException as error:
                    failed.append(error)
                    _ask_to_stop()
                    return

    thread = threading.Thread(target=tell, name="fastssl-following", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        if failed:
            raise failed[0]


def _ask_to_stop() -> None:
    for rank in active_children():
        if rank.pid is not None:
            os.kill(rank.pid, signal.SIGTERM)


class _Lines:
    """Files that grow by lines of JSON. What is there at first is old; a file that got shorter is read from where a
    continued run begins to write."""

    def __init__(self, paths: list[Path]):
        self._read = {path: path.stat().st_size if path.exists() else 0 for path in paths}

    def new(self) -> Iterator[dict[str, Any]]:
        for path, begin in self._read.items():
            if not path.exists():
                continue
            with path.open("rb") as file:
                begin = min(begin, os.fstat(file.fileno()).st_size)
                file.seek(begin)
                whole, newline, _ = file.read().rpartition(b"\n")
            self._read[path] = begin + len(whole) + len(newline)
            for line in whole.splitlines():
                record = json.loads(line)
                if "loss" in record:
                    yield record
