"""Ranks started here: one process each, forked from one that has imported what they need, and watched by torch's
elastic agent."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, get_error_handler
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fastssl.errors import EXIT_HUNG, EXIT_STOPPED, FastsslError, Hung, Stopped
from fastssl.launch import server
from fastssl.launch.meeting import CONTINUES, EXIT_REFUSED, HOST, exit_code, joined, told_by
from fastssl.launch.parent import end_with
from fastssl.launch.ranks import Ranks, Work
from fastssl.launch.server import FORWARDED, requests_to


def started_here(ranks: Ranks, work: Work) -> Any:
    """One process a rank, watched by torch's elastic agent in this process; the first that fails ends the others."""
    with (
        TemporaryDirectory(prefix="fastssl-ranks-") as folder,
        _forked_from(_module(work)) as method,
        requests_to(partial(_forward, Path(folder))),
        _quiet(),
    ):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks.world,
            run_id="fastssl",
            role="rank",
            rdzv_backend="c10d",
            rdzv_endpoint=f"{HOST}:0",
            local_addr=HOST,
            max_restarts=0,
            start_method=method,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle="SIGHUP,SIGQUIT",  # at these the agent ends the ranks and itself
        )
        try:
            return elastic_launch(config, _worker)(ranks, work, os.getpid(), dict(os.environ), Path(folder))[0]
        except ChildFailedError as error:
            raise _failure(*error.get_first_failure()) from None
        except SignalException as error:
            raise FastsslError(f"ended by {error.sigval.name}; {CONTINUES}") from None


def _failure(rank: int, failure: ProcessFailure) -> Exception:
    """What ended a rank: its own words where it left any."""
    code = failure.exitcode
    if isinstance(failure.message, dict):
        text = failure.message["message"].partition(": ")[2]  # after the exception's name
        if code == EXIT_STOPPED:
            return Stopped(text)
        if code == EXIT_REFUSED:
            return FastsslError(text)
        return RuntimeError(told_by(rank, failure.message["extraInfo"]["py_callstack"]))
    if code == EXIT_HUNG:
        return Hung(f"a rank hung, as the watchdog said above; {CONTINUES}")
    by = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    if -code in FORWARDED:
        return Stopped(f"stopped before there was anything new to save, as {by} asked; {CONTINUES}")
    hint = " (out of memory?)" if by == "SIGKILL" else ""
    return FastsslError(f"rank {rank} on {socket.gethostname()} died: {by}{hint}; {CONTINUES}")


def _worker(ranks: Ranks, work: Work, launcher: int, environment: dict[str, str], folder: Path) -> Any:
    """A rank in a process of its own: ends with its launcher, and leaves word of errors where the agent looks."""
    if (imported := sys.modules.get(server.IMPORTED)) is None:
        end_with(launcher)
    else:
        end_with(imported.PID)
        given = {name: value for name, value in os.environ.items() if imported.ENVIRONMENT.get(name) != value}
        os.environ.clear()
        os.environ |= environment | given
    for signum in FORWARDED:  # before it can save, Ctrl-C ends it without Python's traceback
        signal.signal(signum, signal.SIG_DFL)
    for signum in FORWARDED:
        if (folder / signal.Signals(signum).name).exists():  # sent while this was ignored, as by the server
            os.kill(os.getpid(), signum)
    try:
        return joined(ranks, work)
    except Exception as error:
        get_error_handler().record_exception(error)
        sys.stdout.flush()
        os._exit(exit_code(error))  # a regular exit may wait for peers, and these for messages of this rank


def _module(work: Work) -> str:
    """Where what is done was defined, which imports what that needs."""
    while isinstance(work, partial):
        work = work.func
    return work.__module__


@contextmanager
def _forked_from(module: str) -> Iterator[str]:
    """How ranks are started: forked from a server that has imported `module`, where it can be ours."""
    try:
        yield "forkserver" if server.begin(module) else "spawn"
    finally:
        server.end()


def _forward(folder: Path, signum: int, frame: FrameType | None) -> None:
    """Pass a request to stop on to the ranks, noted in `folder`, and go on watching these: how they end is the
    answer."""
    ranks = multiprocessing.active_children()
    if not ranks:
        raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(128 + signum)
    (folder / signal.Signals(signum).name).touch()
    for rank in ranks:
        os.kill(rank.pid, signum)  # type: ignore[arg-type]  # all have started


@contextmanager
def _quiet() -> Iterator[None]:
    """The agent logs each rank that it ends, and why; what a user should read of it is in our errors."""
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
