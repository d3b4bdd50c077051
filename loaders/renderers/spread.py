"""One step's images over the threads of a pool."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait


def spread(pool: ThreadPoolExecutor, work: Callable[[int, int], None], count: int, a_task: int) -> None:
    """Call work(begin, end) for consecutive stretches of 0..count, at most `a_task` long.

    Returns, or raises the first stretch's error, only when all have ended: the buffers they write are free again.
    """
    tasks = [pool.submit(work, begin, min(begin + a_task, count)) for begin in range(0, count, a_task)]
    wait(tasks)
    for task in tasks:
        task.result()
