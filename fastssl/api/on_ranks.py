"""A job on all its ranks: what `fastssl.launch` is asked to start, and what is checked before it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fastssl.costs import memory_model
from fastssl.engine.job import Job
from fastssl.engine.stages import run
from fastssl.launch.ranks import Ranks
from fastssl.launch.start import start


def on_ranks(job: Job, work: Callable[[Job], Any] = run) -> Any:
    """Do `work` for `job`, by default train, on all its ranks and return the first rank's result. Raises as
    `fastssl.launch.start` does, and ConfigError where a GPU cannot hold its share of the step."""
    if job.device == "cuda" and torch.cuda.is_available():
        card_bytes = torch.cuda.get_device_properties(0).total_memory
        job = replace(job, with_room=memory_model.stages_with_room(job, card_bytes))
    return start(Ranks(job.world, job.device), partial(work, job), job.command, partial(_check_memory, job))


def _check_memory(job: Job) -> None:
    """At the door rather than in the first step."""
    if job.device == "cuda":
        here = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
        memory_model.refuse_job(job, here)
