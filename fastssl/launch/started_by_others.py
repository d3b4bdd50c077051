"""Ranks that torchrun, srun or another launcher has started: this process is one of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from fastssl import dist
from fastssl.errors import FastsslError, Stopped
from fastssl.launch.meeting import EXIT_REFUSED, HOST, exit_code, joined, told_by, words
from fastssl.launch.parent import end_with
from fastssl.launch.ranks import Ranks, Work


def check_world(ranks: Ranks, who: str, given: int) -> None:
    if who == "srun":
        _take_from_slurm(given)
    if given != ranks.world:
        error = f"{who} started {given} ranks, the command asks for {ranks.world}: make it {ranks.option} {given}"
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


def one_of_many(ranks: Ranks, work: Work) -> Any:
    """As `joined`, but an error ends the process: one rank of all says what is wrong, the others leave in silence."""
    try:
        return joined(ranks, work)
    except Stopped as stop:
        said = str(stop) if dist.is_main() else ""
        dist.shutdown()
        raise Stopped(said, stop.signum) from None
    except Exception as error:
        code = exit_code(error)
        if dist.first_to("speak of an error"):
            said = str(error) if code == EXIT_REFUSED else told_by(int(os.environ["RANK"]), words(error))
            print(f"Error: {said}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # a regular exit may wait for peers, and these for messages of this rank


def end_with_agent() -> None:
    """`end_with` torchrun's agent, which gives each rank a session of its own and leaves it behind when it is killed.

    An agent that died before this call was replaced as parent by process 1, which is an agent only as the first process
    of a container. srun needs none of this: its daemon ends what it started.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        parent = os.getppid()
        if parent == 1 and b"python" not in Path("/proc/1/cmdline").read_bytes():
            os._exit(1)
        end_with(parent)
