"""A SLURM cluster of this one machine: Debian's munged, slurmctld and slurmd on ports and settings of their own.

Starts in about a second and ends with everything it ran. A SLURM that the machine itself may have is not touched.
"""

import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol")
CPUS = 4  # as SLURM counts them, whatever the machine has: two jobs of two ranks
CONFIGURATION = """
ClusterName=fastssl
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1
ReturnToService=2
KillWait=20
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus}
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Why no cluster can be had here; empty where it can."""
    if os.geteuid() != 0:
        return "not root, as SLURM's daemons must be"
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"{', '.join(absent)} not installed (Debian: slurm-wlm, munge)" if absent else ""


@contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """The environment in which srun, sbatch and scontrol find a running cluster."""
    with TemporaryDirectory(prefix="slurm-") as name, ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)  # munge's clients must reach its socket
        for part in ("state", "spool"):
            (folder / part).mkdir()
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        configuration = CONFIGURATION.format(
            folder=folder,
            host=socket.gethostname(),
            controller_port=_free_port(),
            node_port=_free_port(),
            cpus=CPUS,
        )
        (folder / "slurm.conf").write_text(configuration)
        environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        munge_files = [f"--{what}-file={folder}/munge.{what}" for what in ("key", "pid", "log", "seed")]
        munged = ["munged", "--force", "--foreground", f"--socket={folder}/munge.socket", *munge_files]
        for command in (munged, ["slurmctld", "-D", "-i"], ["slurmd", "-D", "-N", socket.gethostname()]):
            silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            stack.callback(_end, subprocess.Popen(command, env=environment, **silent))
            if command is munged:
                _wait_until(lambda: (folder / "munge.socket").exists(), folder)
        _wait_until(lambda: "idle" in _answer(["sinfo", "--noheader", "--format=%T"], environment), folder)
        stack.callback(_answer, ["scancel", "--user=root", "--signal=KILL", "--full"], environment)
        yield environment


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _answer(command: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout


def _wait_until(condition, folder: Path) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        logs = "".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
        assert time.monotonic() < deadline, f"the cluster did not start:\n{logs}"
        time.sleep(0.1)


def _end(daemon: subprocess.Popen) -> None:
    daemon.terminate()
    try:
        daemon.wait(timeout=10)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
