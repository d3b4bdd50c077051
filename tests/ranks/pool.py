"""Run a function on several ranks: processes of their own, gloo, one thread each.

They are forked from a server that has imported what every rank needs and done nothing else: to import it takes each
process seconds. Nothing of this process reaches them but its environment and what is given to them.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fastssl import dist

IMPORTED = ["torch._dynamo", "fastssl.engine.stages", "tests.support.fakes"]  # torch's optimisers import the first


class RanksFailed(AssertionError):
    """Some ranks raised, died or did not finish; the message holds each one's traceback."""


def run_ranks(world: int, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """`function(*args)` on each of `world` ranks; their results (anything torch.save takes) in rank order.

    `function` and `args` must pickle: a function at the top level of an importable module.
    Raises RanksFailed; no process outlives the call.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with TemporaryDirectory() as folder:
        ranks = [
            context.Process(
                target=_rank_main,
                args=(rank, world, Path(folder), dict(os.environ), timeout_s, function, args),
                daemon=True,
            )
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout_s
        for process in ranks:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [process.is_alive() for process in ranks]
        for process in ranks:
            process.kill()
            process.join()
        failures = [
            f"rank {rank} of {world}:\n{_failure(Path(folder), rank, late[rank], process.exitcode, timeout_s)}"
            for rank, process in enumerate(ranks)
            if not _result_path(Path(folder), rank).exists()
        ]
        if failures:
            raise RanksFailed("\n".join(failures))
        return [torch.load(_result_path(Path(folder), rank), weights_only=False) for rank in range(world)]


def _rank_main(
    rank: int,
    world: int,
    folder: Path,
    environment: dict[str, str],
    timeout_s: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.clear()  # the server's, of when it was started
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    try:
        # As long as all of it may take: on a busy machine one rank may compile for minutes more than the other.
        dist.init("gloo", init_method=f"file://{folder}/rendezvous", timeout_s=timeout_s)
        result = function(*args)
        torch.save(result, folder / f"{rank}.partial")
        dist.barrier()
        dist.shutdown()
        (folder / f"{rank}.partial").rename(_result_path(folder, rank))
    except BaseException:
        _traceback_path(folder, rank).write_text(traceback.format_exc())
        os._exit(1)  # at once: a regular exit would wait for messages that the others no longer answer


def _failure(folder: Path, rank: int, late: bool, exit_code: int | None, timeout_s: float) -> str:
    if _traceback_path(folder, rank).exists():
        return _traceback_path(folder, rank).read_text()
    return f"not finished after {timeout_s:.0f} s" if late else f"died with exit code {exit_code}"


def _result_path(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.result"


def _traceback_path(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.traceback"
