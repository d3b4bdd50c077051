"""From one command to ranks: alone, started here by torch's elastic launch, or already started by torchrun or srun."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import torch
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, get_error_handler
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fastssl import dist
from fastssl.costs import memory
from fastssl.engine.job import Job
from fastssl.engine.stages import run
from fastssl.errors import EXIT_HUNG, EXIT_STOPPED, ConfigError, FastsslError, Hung, Stopped
from loaders.errors import LoaderError

HOST = "127.0.0.1"
GPUS_PER_HOST = 8  # of the hosts that `lines` proposes
CPUS_PER_GPU = 10  # as the PAWS authors' own jobs asked of SLURM
SUBMISSION_OPTIONS = "--submit", "--nodes", "--gpus-per-node", "--cpus-per-rank", "--partition", "--time"
SAVE_S = 120  # before its time limit a job is told to save and leave
CONTINUES = "the same command continues from the last checkpoint"
_EXIT_REFUSED, _EXIT_BROKEN = 1, 70  # of a rank: an error that the user can put right, and any other
_BROKEN_WAIT_S = 1.0  # a rank that lost a peer ends this much after it, so that whoever watches sees who was first
_FORWARDED = signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

Work = Callable[[Job], Any]  # what every rank does, once all have met; it pickles


def start(job: Job, work: Work = run) -> Any:
    """Do `work` for `job`, by default train, on all its ranks and return the first rank's result. Raises FastsslError
    where the ranks cannot be had or end, of which Stopped means that they saved and left on request."""
    if (started := launcher()) is not None:
        _check_world(job, *started)
        _check_memory(job)
        _end_with_agent()
        return _one_of_many(job, work)
    _check_memory(job)
    if job.device == "cuda" and job.world > torch.cuda.device_count():
        _show_how(lines(job))
        raise FastsslError(f"--gpus {job.world}: this host has {torch.cuda.device_count()}")
    return work(job) if job.world == 1 else _started_here(job, work)


def _check_memory(job: Job) -> None:
    """Raise ConfigError where a GPU cannot hold its share of the step: now rather than in the first step."""
    if job.device == "cuda":
        here = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
        memory.refuse_job(job, here)


# --------------------------------------------------------------------------------- ranks that somebody else started


def launcher() -> tuple[str, int] | None:
    """Who started this process as one of several ranks, and how many; None where it stands alone.

    A job step of one task is no launcher: it may be the shell that the command was typed into.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return ("torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "the launcher"), int(os.environ["WORLD_SIZE"])
    if "SLURM_STEP_ID" in os.environ and (tasks := int(os.environ.get("SLURM_NTASKS", "1"))) > 1:
        return "srun", tasks
    return None


def _check_world(job: Job, who: str, given: int) -> None:
    if who == "srun":
        _take_from_slurm(given)
    if given != job.world:
        option = "--gpus" if job.device == "cuda" else "--cpu-ranks"
        error = f"{who} started {given} ranks, the command asks for {job.world}: make it {option} {given}"
        raise FastsslError(error) if os.environ["RANK"] == "0" else SystemExit(1)


def _take_from_slurm(tasks: int) -> None:
    """The variables that torchrun would set, from those of srun; what the user has set stays.

    All tasks must arrive at the same port unasked, so it follows from the job and step, below the ports that Linux
    hands out by itself (32768 up).
    """
    env = os.environ
    seed = int(env["SLURM_JOB_ID"]) * 101 + int(env["SLURM_STEP_ID"])
    num_hosts = int(env.get("SLURM_STEP_NUM_NODES", "1"))
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = _first_host(env["SLURM_STEP_NODELIST"]) if num_hosts > 1 else HOST
    env.setdefault("MASTER_PORT", str(20000 + seed % 12000))
    # Threads follow from how many ranks share this process's CPUs: none where srun bound each task to some of its own.
    bound = len(os.sched_getaffinity(0)) < int(env.get("SLURM_CPUS_ON_NODE", "0"))
    env.setdefault("LOCAL_WORLD_SIZE", "1" if bound else str(-(-tasks // num_hosts)))
    env.update(RANK=env["SLURM_PROCID"], LOCAL_RANK=env["SLURM_LOCALID"], WORLD_SIZE=str(tasks))


def _first_host(node_list: str) -> str:
    """`node[3-4,7]` -> `node3`, by SLURM's own reading of it."""
    try:
        command = ["scontrol", "show", "hostnames", node_list]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError) as error:
        raise FastsslError(f"scontrol cannot read the node list {node_list}: set MASTER_ADDR yourself") from error


def _one_of_many(job: Job, work: Work) -> Any:
    """As `_joined`, but an error ends the process: one rank of all says what is wrong, the others leave in silence."""
    try:
        return _joined(job, work)
    except Stopped as stop:
        words = str(stop) if dist.is_main() else ""
        dist.shutdown()
        raise Stopped(words, stop.signum) from None
    except Exception as error:
        code = _exit_code(error)
        if dist.first_to("speak of an error"):
            words = str(error) if code == _EXIT_REFUSED else _told_by(int(os.environ["RANK"]), _words(error))
            print(f"Error: {words}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # a regular exit may wait for peers, and these for messages of this rank


def _joined(job: Job, work: Work) -> Any:
    master = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        dist.init("nccl" if job.device == "cuda" else "gloo", join_timeout_s=_join_s())
    except DistError as error:
        raise FastsslError(_why_not_joined(master, str(error))) from error
    result = work(job)
    dist.shutdown()
    return result


def _join_s() -> float:
    """Seconds in which all ranks must have come together."""
    return float(os.environ.get("FASTSSL_JOIN_S", "300"))


def _why_not_joined(master: str, error: str) -> str:
    who = f"rank {os.environ['RANK']} on {socket.gethostname()}"
    if "EADDRINUSE" in error or "address already in use" in error:
        return f"{who} cannot listen at {master}, the port is in use: set MASTER_PORT to another"
    within = f"within {_join_s():g} s (FASTSSL_JOIN_S)"
    if "waiting for clients" in error:
        return f"{who} waited at {master}, and not all {os.environ['WORLD_SIZE']} ranks came {within}"
    return f"{who} did not reach the first rank at {master} {within}: is it running, and MASTER_ADDR right?"


# --------------------------------------------------------------------------------------------- ranks started here


def _started_here(job: Job, work: Work) -> Any:
    """One process a rank, watched by torch's elastic agent in this process; the first that fails ends the others."""
    with TemporaryDirectory(prefix="fastssl-ranks-") as folder, _signals_forwarded(), _quiet():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=job.world,
            run_id="fastssl",
            role="rank",
            rdzv_backend="c10d",
            rdzv_endpoint=f"{HOST}:0",
            local_addr=HOST,
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            signals_to_handle="SIGHUP,SIGQUIT",  # at these the agent ends the ranks and itself
        )
        try:
            return elastic_launch(config, _worker)(job, work, os.getpid())[0]
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
        if code == _EXIT_REFUSED:
            return FastsslError(text)
        return RuntimeError(_told_by(rank, failure.message["extraInfo"]["py_callstack"]))
    if code == EXIT_HUNG:
        return Hung(f"a rank hung, as the watchdog said above; {CONTINUES}")
    by = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    if -code in _FORWARDED:
        return Stopped(f"stopped before there was anything new to save, as {by} asked; {CONTINUES}")
    hint = " (out of memory?)" if by == "SIGKILL" else ""
    return FastsslError(f"rank {rank} on {socket.gethostname()} died: {by}{hint}; {CONTINUES}")


def _worker(job: Job, work: Work, parent: int) -> Any:
    """A rank in a process of its own: ends with its launcher, and leaves word of errors where the agent looks."""
    _end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts all its processes; the launcher answers
    try:
        return _joined(job, work)
    except Exception as error:
        get_error_handler().record_exception(error)
        sys.stdout.flush()
        os._exit(_exit_code(error))  # a regular exit may wait for peers, and these for messages of this rank


@contextmanager
def _signals_forwarded() -> Iterator[None]:
    """Pass requests to stop on to the ranks, and go on watching these: how they end is the answer."""

    def forward(signum: int, frame: FrameType | None) -> None:
        ranks = multiprocessing.active_children()
        if not ranks:
            raise SystemExit(128 + signum)
        for rank in ranks:
            os.kill(rank.pid, signum)  # type: ignore[arg-type]  # all have started

    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets nobody else set handlers
        return
    before = {signum: signal.signal(signum, signal.SIG_IGN) for signum in _FORWARDED}
    resource_tracker.ensure_running()  # multiprocessing's helper inherits that; SLURM's signals reach it too
    for signum in _FORWARDED:
        signal.signal(signum, forward)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def _quiet() -> Iterator[None]:
    """The agent logs each rank that it ends, and why; what a user should read of it is in our errors."""
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


# ------------------------------------------------------------------------------------------------- ends and errors


def _exit_code(error: Exception) -> int:
    """How a rank ends after `error`. Where it may be that of a lost peer, a moment later, for whoever watches to see
    who was first."""
    if isinstance(error, Stopped):
        return EXIT_STOPPED
    if isinstance(error, FastsslError | LoaderError):
        return _EXIT_REFUSED
    time.sleep(_BROKEN_WAIT_S)
    return _EXIT_BROKEN


def _told_by(rank: int, words: str) -> str:
    return f"{socket.gethostname()}, rank {rank}: {words}"


def _words(error: Exception) -> str:
    """The traceback of a bug; of a lost peer what the network says."""
    if isinstance(error, DistError) or "gloo/transport" in str(error):
        return f"lost another rank ({str(error).splitlines()[0]}); {CONTINUES}"
    return traceback.format_exc()


def _end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, however that comes about."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call above
        os._exit(1)


def _end_with_agent() -> None:
    """`_end_with` torchrun's agent, which gives each rank a session of its own and leaves it behind when it is killed.

    An agent that died before this call was replaced as parent by process 1, which is an agent only as the first process
    of a container. srun needs none of this: its daemon ends what it started.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        parent = os.getppid()
        if parent == 1 and b"python" not in Path("/proc/1/cmdline").read_bytes():
            os._exit(1)
        _end_with(parent)


# ------------------------------------------------------------------------------------------------- what to type


def _show_how(found: list[str]) -> None:
    """Print `lines` for a job that cannot start here; where they are its command alone, that says nothing new."""
    if len(found) == 2:
        print(f"on each of the hosts:\n  {found[0]}\nor in their place, under SLURM (--submit slurm does as much):")
        print(f"  {found[1]}", flush=True)


def lines(job: Job) -> list[str]:
    """What to type so that `job` runs: its command alone where the ranks fit one host; else what to run on each of the
    hosts, and what in its place where SLURM rules."""
    command = _without_options(job.command or "fastssl train", once=("--dry-run",), with_value=SUBMISSION_OPTIONS)
    if job.device == "cpu" or job.world <= GPUS_PER_HOST:
        return [command]
    nodes, each = hosts_for(job.world)
    submission = {
        "nodes": nodes,
        "ntasks-per-node": each,
        "gpus-per-node": each,
        "cpus-per-task": CPUS_PER_GPU,
        "open-mode": "append",
        "signal": f"USR1@{SAVE_S}",
    }
    options = " ".join(f"--{name} {value}" for name, value in submission.items())
    again = f"|| {{ code=$?; [ $code != {EXIT_STOPPED} ] || scontrol requeue $SLURM_JOB_ID; exit $code; }}"
    wrapped = f"srun --cpus-per-task {CPUS_PER_GPU} {command} {again}"  # which srun does not take from sbatch
    return [
        f"torchrun --nnodes {nodes} --nproc-per-node {each} --rdzv-backend c10d --rdzv-endpoint FIRST_HOST:29400 "
        f"--rdzv-id fastssl -m {command}",
        f"sbatch {options} --requeue --wrap {shlex.quote(wrapped)}",
    ]


def hosts_for(world: int, num_hosts: int | None = None, ranks_each: int | None = None) -> tuple[int, int]:
    """Hosts and ranks on each; what is None is chosen, with 8 ranks a host at most. Raises ConfigError where they
    cannot make `world`."""
    if num_hosts is None:
        each = ranks_each or max(n for n in range(1, GPUS_PER_HOST + 1) if world % n == 0)
        num_hosts = -(-world // each)
    each = ranks_each or -(-world // num_hosts)
    if num_hosts * each != world:
        raise ConfigError(f"{world} ranks are not {num_hosts} nodes with {each} each")
    return num_hosts, each


def _without_options(command: str, once: tuple[str, ...], with_value: tuple[str, ...]) -> str:
    kept = []
    words = iter(shlex.split(command))
    for word in words:
        name, _, value = word.partition("=")
        if name in with_value and not value:
            next(words, None)
        if name not in (*once, *with_value):
            kept.append(word)
    return shlex.join(kept)
