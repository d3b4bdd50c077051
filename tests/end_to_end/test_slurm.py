"""A real SLURM of one node: srun, sbatch with a requeue, and submission through submitit. About 50 s."""

import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from fastssl.launch.lines import lines
from fastssl.launch.ranks import Ranks
from tests.end_to_end import command, slurm
from tests.interrupted import assert_same_run

TRAIN = ("train", "--cpu-ranks", "2", "--out", "run", *command.CHANGES, "--set", "length=20steps")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if why := slurm.missing():
        pytest.skip(why)
    with slurm.cluster() as environment:
        yield environment | {"PYTHONPATH": str(command.ROOT)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody stops, on ranks which the command starts itself."""
    folder = tmp_path_factory.mktemp("whole")
    code, log = command.run(folder, *TRAIN)
    assert code == 0, log
    return folder / "run"


def answer(cluster, folder, *words):
    """The output of a command that must succeed."""
    result = subprocess.run(words, cwd=folder, env=cluster, capture_output=True, text=True, check=False, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_srun_starts_the_same_ranks(cluster, whole, tmp_path):
    """Catches a rank, port or thread count that only torchrun sets."""
    log = answer(cluster, tmp_path, "srun", "-n2", *command.FASTSSL, *TRAIN)
    assert log.count("ranks       2 x 1 threads, cpu") == 1
    assert_same_run(tmp_path / "run", whole)


def test_job_that_is_told_to_leave_twice_continues_bitwise(cluster, whole, tmp_path):
    """Its time is up, so that it goes back into the queue by itself; then SLURM takes its place away. Catches a signal
    that arrives at several processes and so counts twice, an exit code that is not passed on, and lost steps."""
    typed = shlex.join([*command.FASTSSL, *TRAIN])
    wrap = shlex.split(lines(Ranks(64, "cuda"), typed)[1])[-1].replace(
        "--cpus-per-task 10", ""
    )  # what `--gpus 64` tells users to submit
    options = ("--parsable", "--ntasks=2", "--requeue", "--open-mode=append", "--output=job.out")
    number = answer(cluster, tmp_path, "sbatch", *options, f"--wrap={wrap}").strip()
    command.wait_until(lambda: command.steps_logged(tmp_path / "run") >= 1)
    answer(cluster, tmp_path, "scancel", "--signal=USR1", number)
    log = tmp_path / "job.out"
    command.wait_until(lambda: "continues   from step " in log.read_text(), timeout_s=100)
    answer(cluster, tmp_path, "scontrol", "requeue", number)
    command.wait_until(lambda: (tmp_path / "run" / "result.json").exists(), timeout_s=100)
    for asked in ("SIGUSR1", "SIGTERM"):
        assert log.read_text().count(f"as {asked} asked; the same command continues") == 1, log.read_text()
    assert log.read_text().count("continues   from step ") == 2
    assert_same_run(tmp_path / "run", whole)


def test_submitted_job_is_requeued_by_submitit_and_finishes(cluster, whole, tmp_path):
    pytest.importorskip("submitit", reason="the extra `slurm` is not installed")
    said = answer(cluster, tmp_path, *command.FASTSSL, *TRAIN, "--submit", "slurm", "--time", "1:00:00")
    assert said.startswith("submitted as SLURM job ") and "1 x 2 ranks" in said
    number = said.split()[4].rstrip(":")
    command.wait_until(lambda: command.steps_logged(tmp_path / "run") >= 2)
    answer(cluster, tmp_path, "scancel", f"--signal={signal.SIGUSR2.name}", number)
    command.wait_until(lambda: (tmp_path / "run" / "result.json").exists(), timeout_s=100)
    log = "".join(path.read_text() for path in (tmp_path / "run" / "slurm").glob("*_log.*"))
    assert log.count("continues   from step ") == 1 and f"Requeued job {number}" in log
    assert_same_run(tmp_path / "run", whole)
    assert Path(said.strip().rpartition(" ")[2]) == tmp_path / "run" / "slurm"
