"""What to type so that ranks run on several hosts: lines for torchrun and for SLURM."""

from __future__ import annotations

import shlex

from fastssl.errors import EXIT_STOPPED, ConfigError
from fastssl.launch.ranks import Ranks

GPUS_PER_HOST = 8  # of the hosts that `lines` proposes
CPUS_PER_GPU = 10  # as the PAWS authors' own jobs asked of SLURM
AGENT_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"  # of the last two torchrun dies if it is not told
SUBMISSION_OPTIONS = "--submit", "--nodes", "--gpus-per-node", "--cpus-per-rank", "--partition", "--time"
SAVE_S = 120  # before its time limit a job is told to save and leave


def show_how(found: list[str]) -> None:
    """Print `lines` of what cannot start here; where they are its command alone, that says nothing new."""
    if len(found) == 2:
        print(f"on each of the hosts:\n  {found[0]}\nor in their place, under SLURM (--submit slurm does as much):")
        print(f"  {found[1]}", flush=True)


def lines(ranks: Ranks, command: str) -> list[str]:
    """What to type so that `command` runs on `ranks`: itself alone where they fit one host; else what to run on each of
    the hosts, and what in its place where SLURM rules."""
    command = _without_options(command, once=("--dry-run",), with_value=SUBMISSION_OPTIONS)
    if ranks.device == "cpu" or ranks.world <= GPUS_PER_HOST:
        return [command]
    nodes, each = hosts_for(ranks.world)
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
        f"--rdzv-id fastssl --signals-to-handle {AGENT_SIGNALS} "
        f"--no-python {command}",  # with `-m` each rank would import what lies in its folder first
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
