"""A job on all its ranks, or a run looked at on several: what `fastssl.launch` is asked to start, and what is checked
before it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fastssl import dist
from fastssl.costs import memory_model
from fastssl.engine.job import Job
from fastssl.engine.stages import run
from fastssl.errors import FastsslError
from fastssl.launch.ranks import Ranks
from fastssl.launch.start import start
from fastssl.machine import no_room_for_code, own_cpus, share_cpus, threads_per_rank


def on_ranks(job: Job, work: Callable[[Job], Any] = run) -> Any:
    """Do `work` for `job`, by default train, on all its ranks and return the first rank's result. Raises as
    `fastssl.launch.start` does, and ConfigError where a GPU cannot hold its share of the step."""
    if job.device == "cuda" and torch.cuda.is_available():
        card_bytes = torch.cuda.get_device_properties(0).total_memory
        job = replace(job, with_room=memory_model.stages_with_room(job, card_bytes))
    return start(Ranks(job.world, job.device), partial(work, job), job.command, partial(_check_room, job))


def looked_at_on_ranks(ranks: Ranks, work: Callable[[torch.device], Any], command: str) -> Any:
    """Do `work` on each of the ranks, with the device that is its own, and return the first rank's result. Raises as
    `fastssl.launch.start` does."""
    return start(ranks, partial(_with_own_device, ranks, work), command, lambda: None)


def _with_own_device(ranks: Ranks, work: Callable[[torch.device], Any]) -> Any:
    if ranks.world > 1:
        share_cpus(dist.gather_objects(own_cpus()))
        torch.set_num_threads(threads_per_rank())
    return work(torch.device("cuda", dist.local_gpu()) if ranks.device == "cuda" else torch.device("cpu"))


def _check_room(job: Job) -> None:
    """On the card and for its kernels on the disk: at the door rather than in the first step."""
    if job.device == "cuda":
        if problem := no_room_for_code("TRITON_CACHE_DIR"):
            raise FastsslError(f"kernels cannot be compiled: {problem}")
        here = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
        memory_model.refuse_job(job, here)
