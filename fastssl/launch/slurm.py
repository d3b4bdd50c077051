"""Work as a SLURM job, through submitit, which also puts it back into the queue: `--submit slurm`."""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastssl.errors import EXIT_STOPPED, ConfigError, Stopped
from fastssl.launch.lines import CPUS_PER_GPU, SAVE_S, hosts_for
from fastssl.launch.ranks import Ranks, Work

MAX_REQUEUES = 1000  # after a time limit; submitit counts them
_REQUEUE_S = 60.0  # that SLURM may take to end a job which asked to be requeued


def submit(
    ranks: Ranks,
    work: Work,
    name: str,
    folder: Path,
    *,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    cpus_per_rank: int | None = None,
    partition: str | None = None,
    time_limit: str | None = None,
) -> str:
    """Submit `work` as the job `name`, one SLURM task a rank, and return a line that says where it is. Each task calls
    it as if typed there: it finds its ranks by itself. Logs go to `folder`; `time_limit` is in SLURM's notation.
    Raises ConfigError where submitit or SLURM is missing or refuses."""
    try:
        import submitit
    except ImportError:
        raise ConfigError("--submit slurm needs submitit: install the extra `slurm`") from None
    if time_limit is None:
        raise ConfigError("--submit slurm needs --time, the time limit of the job, such as 24:00:00")
    num_nodes, ranks_each = hosts_for(ranks.world, nodes, gpus_per_node if ranks.device == "cuda" else None)
    cpus = cpus_per_rank or (CPUS_PER_GPU if ranks.device == "cuda" else 1)
    parameters: dict[str, Any] = {
        "nodes": num_nodes,
        "tasks_per_node": ranks_each,
        "cpus_per_task": cpus,
        "timeout_min": minutes(time_limit),
        "name": name,
        "slurm_signal_delay_s": SAVE_S,
        "slurm_srun_args": [f"--cpus-per-task={cpus}"],  # which srun does not take from sbatch
        "slurm_additional_parameters": {"requeue": True},
        "slurm_setup": ["export PYTHONSAFEPATH=1"],  # or tasks would import what lies in the job's folder first
    }
    if ranks.device == "cuda":
        parameters["gpus_per_node"] = ranks_each
    if partition is not None:
        parameters["slurm_partition"] = partition
    try:
        executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=MAX_REQUEUES)
        executor.update_parameters(**parameters)
        submitted = executor.submit(Submitted(work))
    except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
        raise ConfigError(f"--submit slurm: {' '.join(str(error).split())}") from error
    return f"submitted as SLURM job {submitted.job_id}: {num_nodes} x {ranks_each} ranks; logs in {folder}"


@dataclass(frozen=True)
class Submitted:
    """What each task of the job calls: a rank of it."""

    work: Work

    def __call__(self) -> dict[str, Any]:
        """The run's result. A run that saved because its time is up, or its place wanted, goes back into the queue;
        after SIGTERM it is SLURM that does this, or the user who does not want it done."""
        requeue = signal.getsignal(_notice())  # submitit's, which the run replaces by its own
        try:
            result: dict[str, Any] = self.work()
            return result
        except Stopped as stop:
            if stop.signum in (signal.SIGUSR1, signal.SIGUSR2) and callable(requeue):
                requeue(stop.signum, None)  # on the first rank this leaves
                time.sleep(_REQUEUE_S)  # so that no rank's end is taken for the job's before that
            raise SystemExit(EXIT_STOPPED) from stop

    def checkpoint(self) -> Any:
        """What submitit queues next: the same, for the same command continues."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _notice() -> signal.Signals:
    """The signal by which submitit has SLURM announce that time is up."""
    return signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"]


def minutes(text: str) -> int:
    """SLURM's notation of a time, `MIN`, `MIN:SEC`, `H:MIN:SEC`, `D-H`, `D-H:MIN` or `D-H:MIN:SEC`, in whole minutes,
    rounded up."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None:
        raise ConfigError(f"--time {text}: write minutes, H:MM:SS or D-HH:MM:SS")
    days, *rest = found.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is None:  # counted from the right: minutes alone, minutes and seconds, or all
        parts = [0, *parts] if len(parts) < 3 else parts
    hours, mins, secs = (*parts, 0, 0)[:3]
    return int(days or 0) * 1440 + hours * 60 + mins + (secs > 0)
