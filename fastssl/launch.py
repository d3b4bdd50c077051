"""From one command to ranks: alone, started here on one host, or already started by torchrun or SLURM."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import uuid
from typing import Any

import torch

from fastssl import dist
from fastssl.config import FastsslError
from fastssl.engine.stages import RESULT, Job, run
from loaders.errors import LoaderError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def start(job: Job) -> dict[str, Any]:
    """Run `job` on all its ranks and return its result. Raises FastsslError where the ranks cannot be had."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        given = int(os.environ["WORLD_SIZE"])
        if given != job.world:
            raise FastsslError(f"the launcher started {given} ranks, the command asks for {job.world}")
        return _joined(job)
    if job.device == "cuda" and job.world > torch.cuda.device_count():
        raise FastsslError(
            f"--gpus {job.world}: this host has {torch.cuda.device_count()}. With more on several hosts, run on "
            "each: torchrun --nnodes NODES --nproc-per-node GPUS --rdzv-backend c10d --rdzv-endpoint HOST:29400 "
            f"-m fastssl {' '.join(sys.argv[1:])}"
        )
    if job.world == 1:
        return run(job)
    return _started_here(job)


def _started_here(job: Job) -> dict[str, Any]:
    """One process a rank through torch's elastic launcher."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job.world,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="spawn",
    )
    try:
        elastic_launch(config, _worker)(job, os.getpid())
    except ChildFailedError as error:
        rank, failed = error.get_first_failure()
        raise FastsslError(f"rank {rank} ended with exit code {failed.exitcode}; its message is above") from None
    return json.loads((job.out / RESULT).read_text())


def _worker(job: Job, parent: int) -> None:
    """A rank of its own process: ends with its launcher, and shows a user's error as one line."""
    _end_with_parent(parent)
    try:
        _joined(job)
    except (FastsslError, LoaderError) as error:
        if dist.is_main():
            print(f"Error: {error}", file=sys.stderr, flush=True)
        # Not sys.exit: peers may be inside a collective, and waiting for them here would never end.
        os._exit(1)


def _joined(job: Job) -> dict[str, Any]:
    dist.init("nccl" if job.device == "cuda" else "gloo")
    try:
        return run(job)
    finally:
        dist.shutdown()


def _end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its launcher dies; the launcher puts workers in sessions of their own,
    where a terminal's signals do not reach them."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)
