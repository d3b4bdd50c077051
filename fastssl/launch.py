"""From one command to ranks: alone, started here on one host, or already started by torchrun or SLURM."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import shlex
import signal
import sys
import traceback
from enum import IntEnum
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
from torch.distributed import TCPStore

from fastssl import dist
from fastssl.config import FastsslError
from fastssl.engine.job import Job
from fastssl.engine.run_dir import RESULT
from fastssl.engine.stages import run
from loaders.errors import LoaderError

HOST = "127.0.0.1"
PEERS_FAIL_S = 1.0  # in which ranks that lost a peer report so, beside the report of the one that caused it
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Cause(IntEnum):
    """Why a rank ended, the likeliest cause of the others' end first: these see a broken connection, an exception."""

    REFUSAL = 0  # an error that the user can put right
    DEATH = 1  # by a signal, without a word
    EXCEPTION = 2


def start(job: Job) -> dict[str, Any]:
    """Run `job` on all its ranks and return its result. Raises FastsslError where the ranks cannot be had or end."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        given = int(os.environ["WORLD_SIZE"])
        if given != job.world:
            raise FastsslError(f"the launcher started {given} ranks, the command asks for {job.world}")
        return _joined(job)
    if job.device == "cuda" and job.world > torch.cuda.device_count():
        raise FastsslError(
            f"--gpus {job.world}: this host has {torch.cuda.device_count()}. With more on several hosts, run on "
            "each: torchrun --nnodes NODES --nproc-per-node GPUS --rdzv-backend c10d --rdzv-endpoint HOST:29400 "
            f"-m fastssl {shlex.join(sys.argv[1:])}"
        )
    if job.world == 1:
        return run(job)
    return _started_here(job)


def _started_here(job: Job) -> dict[str, Any]:
    """One process a rank; the first that fails ends the others."""
    context = multiprocessing.get_context("spawn")
    store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
    ranks: dict[Connection, SpawnProcess] = {}
    try:
        for rank in range(job.world):
            report, theirs = context.Pipe(duplex=False)
            arguments = (job, rank, store.port, os.getpid(), theirs)
            process = context.Process(target=_worker, args=arguments, name=f"rank {rank}")
            process.start()
            theirs.close()  # only the rank holds this end now, and its report ends when it does
            ranks[report] = process
        _await(ranks)
    finally:
        for process in ranks.values():
            process.kill()
            process.join()
    return json.loads((job.out / RESULT).read_text())


def _await(ranks: dict[Connection, SpawnProcess]) -> None:
    """Return once all ranks have finished. Raises the error that ended one, FastsslError but for bugs of ours."""
    running, failures = set(ranks), list[tuple[Cause, str]]()
    while running and (ready := wait(running, timeout=PEERS_FAIL_S if failures else None)):
        for report in running.intersection(ready):
            running.remove(report)
            failures += _failure(ranks[report], report)
    if failures:
        cause, message = min(failures)
        raise (RuntimeError if cause is Cause.EXCEPTION else FastsslError)(message)


def _failure(process: SpawnProcess, report: Connection) -> list[tuple[Cause, str]]:
    """What a rank that reported, or ended, says of itself; nothing where it finished well."""
    try:
        return [report.recv()]
    except EOFError:
        process.join()
    code = process.exitcode
    if not code:
        return []
    by = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    hint = " (out of memory?)" if by == "SIGKILL" else ""
    return [(Cause.DEATH, f"{process.name} died: {by}{hint}; the same command continues from the last checkpoint")]


def _worker(job: Job, rank: int, port: int, launcher: int, report: Connection) -> None:
    """A rank in a process of its own: ends with its launcher and tells it of errors."""
    _end_with(launcher)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts all its processes; the launcher answers
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job.world), LOCAL_WORLD_SIZE=str(job.world),
        MASTER_ADDR=HOST, MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",  # the store is the launcher's
    )  # fmt: skip
    try:
        _joined(job)
        return
    except (FastsslError, LoaderError) as error:
        report.send((Cause.REFUSAL, str(error)))
    except Exception:
        report.send((Cause.EXCEPTION, f"rank {rank}: {traceback.format_exc()}"))
    os._exit(1)  # a regular exit may wait for peers, and these for messages of this rank


def _joined(job: Job) -> dict[str, Any]:
    dist.init("nccl" if job.device == "cuda" else "gloo")
    result = run(job)
    dist.shutdown()
    return result


def _end_with(launcher: int) -> None:
    """Have the kernel kill this process when its launcher dies, however that comes about."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it died before the call above
        os._exit(1)
