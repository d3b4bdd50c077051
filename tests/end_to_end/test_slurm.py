"""A real SLURM of one node: srun, sbatch with a requeue, and submission through submitit. About 50 s."""

import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from fastssl.errors import EXIT_STOPPED
from fastssl.launch.lines import lines
from fastssl.launch.ranks import Ranks
from tests.end_to_end import command, slurm
from tests.end_to_end.test_signals import TORCHRUN
from tests.support.interrupted import assert_same_run

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
    command.run_here(folder, *TRAIN)
    return folder / "run"


def answer(cluster, folder, *words):
    """The output of a command that must succeed."""
    result = subprocess.run(words, cwd=folder, env=cluster, capture_output=True, text=True, check=False, timeout=400)
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


def until_step(run_dir, step, process=None):
    """Wait until that many steps are logged, or `process` has ended."""
    command.wait_until(lambda: command.steps_logged(run_dir) >= step or (process and process.poll() is not None))


def until_it_says(log, words):
    command.wait_until(lambda: words in log.read_text(), timeout_s=100)


def last_saved(run_dir):
    """The step of the newest checkpoint."""
    return int(sorted((run_dir / "checkpoints").glob("step-*"))[-1].name[5:])


LONG = ("train", "--cpu-ranks", "2", "--out", "run", *command.CHANGES, "--set", "length=30steps")
LONGER = (*LONG, "--set", "length=90steps", "--set", "evaluate_every=90steps")  # to be stopped again and again


@pytest.mark.timeout(900)
@pytest.mark.parametrize("how", ["srun", "srun torchrun"])
def test_a_signal_to_srun_saves_and_the_same_command_continues(how, cluster, tmp_path):
    """Catches a launcher, or one below it, that dies of a signal before the ranks have saved."""
    program = ("srun", "-n2", *command.FASTSSL) if how == "srun" else ("srun", "-n1", *TORCHRUN)
    environment = {key: value for key, value in cluster.items() if os.environ.get(key) != value}
    saved = 0
    for name in ("SIGUSR1", "SIGUSR2"):
        with command.running(tmp_path, *LONGER, program=program, **environment) as process:
            until_step(tmp_path / "run", saved + 2, process)
            process.send_signal(signal.Signals[name])
            code = process.wait(timeout=200)
        log = (tmp_path / "log").read_text()
        assert not saved or log.count(f"continues   from step {saved}") == 1
        before, saved = saved, last_saved(tmp_path / "run")
        assert code == (1 if how == "srun torchrun" else EXIT_STOPPED), log
        assert saved > before
        assert f"saved and stopped after step {saved} of 90, as {name} asked; the same command continues" in log
    log = answer(cluster, tmp_path, *program, *LONGER)
    assert log.count(f"continues   from step {saved}") == 1 and (tmp_path / "run" / "result.json").exists()


@pytest.mark.timeout(900)
def test_sigterm_to_srun_itself_is_a_kill_and_the_same_command_continues(cluster, tmp_path):
    """It is SLURM's srun that kills its tasks with SIGKILL then; what SLURM itself ends gets SIGTERM first."""
    often = (*LONG, "--set", "checkpoint_every=1steps")
    environment = {key: value for key, value in cluster.items() if os.environ.get(key) != value}
    with command.running(tmp_path, *often, program=("srun", "-n2", *command.FASTSSL), **environment) as process:
        saved = tmp_path / "run" / "checkpoints"
        command.wait_until(lambda: process.poll() is not None or len(list(saved.glob("step-*"))) >= 2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=200) not in (0, EXIT_STOPPED), (tmp_path / "log").read_text()
    assert "saved and stopped" not in (tmp_path / "log").read_text()
    log = answer(cluster, tmp_path, "srun", "-n2", *command.FASTSSL, *often)
    assert log.count("continues   from step ") == 1 and (tmp_path / "run" / "result.json").exists()


@pytest.mark.timeout(900)
def test_a_signal_to_the_jobs_shell_saves(cluster, tmp_path):
    """`--signal=B:` and `scancel --batch` signal the shell alone, which dies of it; SLURM then ends what it started."""
    wrap = f"srun {shlex.join([*command.FASTSSL, *LONGER])}"
    saved = 0
    for name in ("USR1", "USR2", "TERM"):
        log = tmp_path / f"{name}.out"
        options = ("--parsable", "--ntasks=2", f"--output={log}")
        number = answer(cluster, tmp_path, "sbatch", *options, f"--wrap={wrap}").strip()
        until_step(tmp_path / "run", saved + 2)
        answer(cluster, tmp_path, "scancel", "--batch", f"--signal={name}", number)
        until_it_says(log, "the same command continues")
        assert not saved or log.read_text().count(f"continues   from step {saved}") == 1
        before, saved = saved, last_saved(tmp_path / "run")
        assert saved > before and f"saved and stopped after step {saved} of 90" in log.read_text()
    log = answer(cluster, tmp_path, "srun", "-n2", *command.FASTSSL, *LONGER)
    assert log.count(f"continues   from step {saved}") == 1


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
