"""Ranks however they are started: by the command itself, by torchrun on one host and on two, and what it says where it
cannot. About 40 s."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from click.testing import CliRunner
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from fastssl.commands.main import main
from fastssl.errors import EXIT_STOPPED, ConfigError, FastsslError, Stopped
from fastssl.launch.here import _failure
from fastssl.launch.lines import hosts_for, lines
from fastssl.launch.parent import end_with
from fastssl.launch.ranks import Ranks
from fastssl.launch.slurm import minutes
from tests.end_to_end import command, two_hosts
from tests.support.interrupted import assert_same_run

SHORT = (*command.CHANGES, "--set", "length=4steps", "--set", "evaluate_every=4steps")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def last_line(log):
    assert "Traceback" not in log, log
    return log.rstrip().rpartition("\n")[2]


def refused(*arguments):
    """What the command line answers, in this process, where it must fail."""
    result = CliRunner().invoke(main, ["train", *arguments])
    assert isinstance(result.exception, SystemExit) and result.exit_code == 1, repr(result.exception)
    return result.output


# ------------------------------------------------------------------------------------------------- two hosts


def test_two_hosts_train_bitwise_as_one(tmp_path):
    """Catches a rank or thread count taken from the wrong host, and files that only one host writes or both do."""
    if why := two_hosts.missing():
        pytest.skip(why)
    if (available := os.sched_getaffinity(0)) and len(available) < 2:
        pytest.skip("two hosts need two CPUs")
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    train = ("train", "--cpu-ranks", "2", "--out", "run", *SHORT)
    with two_hosts.two_hosts() as hosts:
        torchrun = (*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "fastssl")
        rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{two_hosts.ADDRESSES[0]}:29400")
        running = []
        for host, cpu in enumerate(sorted(available)[:2]):  # as many threads a rank as one host with both has
            own = ("--local-addr", two_hosts.ADDRESSES[host], "--rdzv-conf", f"is_host={1 - host}")
            whole = ("taskset", "--cpu-list", str(cpu), *torchrun, *rendezvous, *own, "-m", "fastssl", *train)
            running.append(hosts.start(host, whole, two / f"log{host}"))
        codes = [process.wait(timeout=200) for process in running]
    assert codes == [0, 0], (two / "log0").read_text() + (two / "log1").read_text()
    assert (two / "log0").read_text().count("directory   run") == 1
    assert "directory" not in (two / "log1").read_text()
    command.run_here(one, *train)
    assert_same_run(one / "run", two / "run")


# ------------------------------------------------------------------------------------------------- one host


def test_request_to_stop_reaches_the_ranks_and_their_answer_comes_back(tmp_path):
    """Catches ranks that are killed before they saved, a request that counts twice, and an exit code of 1."""
    with command.running(tmp_path, "train", "--cpu-ranks", "2", "--out", "run", *command.CHANGES) as process:
        command.wait_until(lambda: command.steps_logged(tmp_path / "run") >= 2)
        ranks = command.children(process.pid)
        for pid in (process.pid, *ranks):  # as SLURM does
            os.kill(pid, signal.SIGUSR1)
        assert process.wait(timeout=60) == EXIT_STOPPED, (tmp_path / "log").read_text()
    command.wait_until(lambda: not any(map(command.alive, ranks)), timeout_s=10)
    log = (tmp_path / "log").read_text()
    assert "as SIGUSR1 asked; the same command continues" in last_line(log)
    assert log.count("the same command") == 1
    stopped_after = int(log.partition("stopped after step ")[2].split()[0])
    assert (tmp_path / "run" / "checkpoints" / f"step-{stopped_after:08}" / "state.pt").exists()


def _said(name):
    return os.environ.get(name), os.getcwd()


def test_each_launch_has_the_environment_and_the_folder_of_its_time(tmp_path):
    """Catches ranks forked from a process that knows those of an earlier launch, and one that is left behind."""
    script = """
import multiprocessing, os
from functools import partial
from fastssl.launch.here import started_here
from fastssl.launch.parent import end_with
from fastssl.launch.ranks import Ranks
from tests.end_to_end.command import children
from tests.end_to_end.test_launch import _said

if __name__ == "__main__":
    said = []
    for k in range(2):
        os.makedirs(str(k))
        os.chdir(str(k))
        os.environ["SAID"] = str(k)
        said += [started_here(Ranks(2, "cpu"), partial(_said, name)) for name in ("SAID", "MASTER_ADDR")[: 2 - k]]
        os.environ.pop("SAID")
    print(said)
    tracker = multiprocessing.resource_tracker._resource_tracker._pid
    assert children(os.getpid()) == [tracker], "a process is left"
"""
    (tmp_path / "script.py").write_text(script)
    with command.running(tmp_path, "script.py", program=(sys.executable,)) as process:
        assert process.wait(timeout=60) == 0, (tmp_path / "log").read_text()
    folder = str(tmp_path)
    expected = [("0", f"{folder}/0"), ("127.0.0.1", f"{folder}/0"), ("1", f"{folder}/0/1")]
    assert str(expected) in (tmp_path / "log").read_text()


def test_a_request_that_comes_before_a_rank_listens_is_not_lost(tmp_path):
    """Ranks are forked from a process that ignores requests to stop."""
    script = """
import os, signal, sys
from pathlib import Path
from fastssl.launch.here import _worker

signal.signal(signal.SIGTERM, signal.SIG_IGN)
_worker(None, print, os.getppid(), {}, Path(sys.argv[1]))
"""
    (tmp_path / "script.py").write_text(script)
    (tmp_path / "SIGTERM").touch()
    with command.running(tmp_path, "script.py", str(tmp_path), program=(sys.executable,)) as process:
        assert process.wait(timeout=60) == -signal.SIGTERM


def test_a_rank_that_an_interrupted_launch_does_not_know_ends_too(tmp_path):
    """Ctrl-C between the fork of the first rank and the agent's hearing of it: the launcher waited for a server that
    waited for the rank, which waited for the others."""
    script = """
import multiprocessing, os, sys, time
from fastssl.launch import server
from tests.end_to_end.test_launch import _rank

if __name__ == "__main__":
    assert server.begin("tests.end_to_end.test_launch")
    rank = multiprocessing.get_context("forkserver").Process(target=_rank, daemon=True)
    rank.start()
    began = time.monotonic()
    server.end()
    rank.join(5)
    print("ended", time.monotonic() - began < 5 and rank.exitcode is not None)
"""
    (tmp_path / "script.py").write_text(script)
    with command.running(tmp_path, "script.py", program=(sys.executable,)) as process:
        assert process.wait(timeout=60) == 0, (tmp_path / "log").read_text()
    assert "ended True" in (tmp_path / "log").read_text()


def _rank():
    end_with(os.getppid())
    time.sleep(15)


def test_the_process_that_ranks_are_forked_from_is_bound_to_its_launcher_before_it_imports(tmp_path):
    """After a mistake at the door it lived on for the seconds that torch takes, and held the terminal's pipe open."""
    script = (
        "import sys, fastssl.launch.parent as p; p.end_with = lambda parent: sys.exit('torch' in sys.modules); "
        "import fastssl.launch.imported"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_ranks_end_with_a_killed_torchrun(tmp_path):
    """torchrun gives each rank a session of its own: without more they train on, and the next start meets them."""
    train = ("-m", "fastssl", "train", "--cpu-ranks", "2", "--out", "run", *command.CHANGES)
    with command.running(tmp_path, *train, program=(*TORCHRUN, "--standalone", "--nproc-per-node", "2")) as process:
        command.wait_until(lambda: command.steps_logged(tmp_path / "run") >= 1)
        ranks = command.children(process.pid)
        command.kill(process.pid)
        command.wait_until(lambda: not any(map(command.alive, ranks)), timeout_s=10)
    assert len(ranks) >= 2 and not (tmp_path / "run" / "result.json").exists()


def test_error_under_torchrun_is_said_once(tmp_path):
    train = ("-m", "fastssl", "train", "--cpu-ranks", "3", "--out", "run", *SHORT)
    with command.running(tmp_path, *train, program=(*TORCHRUN, "--standalone", "--nproc-per-node", "3")) as process:
        assert process.wait(timeout=100) == 1
    log = (tmp_path / "log").read_text()
    assert log.count("Error: batch 32 does not divide by 3 ranks; nearest: 2 or 4") == 1


@pytest.mark.parametrize(
    ("code", "kind", "says"),
    [
        (-signal.SIGUSR1, Stopped, "as SIGUSR1 asked; the same command continues"),
        (-signal.SIGKILL, FastsslError, "died: SIGKILL (out of memory?); the same command continues"),
        (-signal.SIGSEGV, FastsslError, "died: SIGSEGV; the same command continues"),
        (3, FastsslError, "died: exit code 3; the same command continues"),
    ],
)
def test_ranks_that_ended_without_a_word(code, kind, says):
    """A request that comes before a rank can answer it ends the rank: nothing is lost, and it counts as stopped."""
    error = _failure(1, ProcessFailure(local_rank=1, pid=1, exitcode=code, error_file="nowhere"))
    assert type(error) is kind and says in str(error)


# ------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, "torchrun started 2 ranks"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "the launcher started 2 ranks"),
        (
            {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
            "srun started 2 ranks",
        ),
    ],
    ids=["torchrun", "other", "srun"],
)
def test_world_size_that_contradicts_the_launcher_is_refused_once(environment, says, monkeypatch):
    before = os.environ.copy()
    monkeypatch.setattr(os, "environ", before | environment)
    line = refused("--cpu-ranks", "3", *SHORT)
    assert line == f"Error: {says}, the command asks for 3: make it --cpu-ranks 2\n"
    assert "one seed a command where a launcher starts the ranks" in refused("--seeds", "0,1", "--cpu-ranks", "2")
    rank = "SLURM_PROCID" if "SLURM_PROCID" in environment else "RANK"
    monkeypatch.setattr(os, "environ", before | environment | {rank: "1"})
    assert refused("--cpu-ranks", "3", *SHORT) == ""


def test_a_job_step_of_one_task_is_a_shell_and_no_launcher(monkeypatch):
    """`srun --pty bash` on a cluster: what is typed there starts its own ranks."""
    monkeypatch.setattr(os, "environ", os.environ | {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"})
    assert "--gpus 999: this host has" in refused("--gpus", "999", *SHORT)


def test_port_in_use_and_unreachable_master_are_one_line_in_time(tmp_path):
    """Catches a wait of half an hour, and C++ stack traces in its place."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, log = joining(tmp_path, port, rank=0)
    assert code == 1
    assert f"cannot listen at 127.0.0.1:{port}, the port is in use: set MASTER_PORT to another" in last_line(log)
    start_s = time.monotonic()
    code, log = joining(tmp_path, port, rank=1)
    assert code == 1 and time.monotonic() - start_s < 60
    assert f"did not reach the first rank at 127.0.0.1:{port} within 2 s (FASTSSL_JOIN_S)" in last_line(log)
    assert log.count("rror: ") == 1


def joining(folder, port, rank):
    """Exit code and output of one rank of two, the other of which is not there."""
    environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "FASTSSL_JOIN_S": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return command.run(folder, "train", "--cpu-ranks", "2", *SHORT, **environment)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--submit slurm", "--submit slurm needs --time"),
        ("--submit slurm --time soon", "--time soon: write minutes, H:MM:SS or D-HH:MM:SS"),
        ("--submit slurm --time 1:00:00 --cpu-ranks 4 --nodes 3", "4 ranks are not 3 nodes with 2 each"),
        ("--nodes 2", "belong to --submit slurm"),
    ],
)
def test_mistakes_of_submission(arguments, says):
    pytest.importorskip("submitit", reason="the extra `slurm` is not installed")
    assert says in refused(*arguments.split())


def test_submission_without_submitit_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert "--submit slurm needs submitit: install the extra `slurm`" in refused("--submit", "slurm", "--time", "60")


# ------------------------------------------------------------------------------------------------- what to type


def test_64_gpus_are_eight_lines_of_torchrun_or_one_of_sbatch(monkeypatch):
    typed = "fastssl train paws.rn50_100ep --data imagenet --gpus 64 --dry-run --submit slurm --time 10:00 --nodes=8"
    command_line = "fastssl train paws.rn50_100ep --data imagenet --gpus 64"
    assert lines(Ranks(64, "cuda"), typed) == [
        "torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint FIRST_HOST:29400 --rdzv-id fastssl "
        f"--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 --no-python {command_line}",
        "sbatch --nodes 8 --ntasks-per-node 8 --gpus-per-node 8 --cpus-per-task 10 --open-mode append "
        f"--signal USR1@120 --requeue --wrap 'srun --cpus-per-task 10 {command_line} || "
        "{ code=$?; [ $code != 85 ] || scontrol requeue $SLURM_JOB_ID; exit $code; }'",
    ]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    said = refused("paws.rn50_100ep", "--data", "imagenet", "--gpus", "64")
    assert said.startswith("on each of the hosts:\n  torchrun --nnodes 8 ") and "):\n  sbatch --nodes 8 " in said
    assert last_line(said) == "Error: --gpus 64: this host has 8"


def test_what_fits_one_host_is_the_command_itself():
    typed = "fastssl train paws.rn50_100ep --gpus 8 --dry-run"
    assert lines(Ranks(8, "cuda"), typed) == ["fastssl train paws.rn50_100ep --gpus 8"]


@pytest.mark.parametrize(
    ("asked", "hosts"),
    [((64,), (8, 8)), ((12,), (2, 6)), ((8,), (1, 8)), ((13,), (13, 1)), ((16, 4), (4, 4)), ((16, None, 4), (4, 4))],
)
def test_hosts_hold_the_ranks_exactly(asked, hosts):
    assert hosts_for(*asked) == hosts


@pytest.mark.parametrize("asked", [(64, 3), (64, None, 7), (64, 4, 8)])
def test_hosts_that_cannot_hold_the_ranks_are_refused(asked):
    with pytest.raises(ConfigError, match="64 ranks are not"):
        hosts_for(*asked)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90),
        ("90:30", 91),
        ("24:00:00", 1440),
        ("1:00:01", 61),
        ("2-0", 2880),
        ("1-2:30", 1590),
        ("1-0:0:5", 1441),
    ],  # fmt: skip
)
def test_slurms_notation_of_time(text, expected):
    assert minutes(text) == expected
