"""Requests to stop, by real signals to real processes: all ranks save at one step, and the same command continues."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fastssl.errors import EXIT_STOPPED
from fastssl.launch.lines import AGENT_SIGNALS
from tests.end_to_end import command
from tests.support.interrupted import assert_same_run

LAST_STEP = 24


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same run, uninterrupted, by number of ranks."""
    found = {}
    for world in (1, 2):
        folder = tmp_path_factory.mktemp(f"whole{world}")
        command.run_here(folder, *arguments(world))
        found[world] = folder / "run"
    return found


RARELY = ("--set", "checkpoint_every=100steps", "--set", "evaluate_every=100steps")
LENGTH = ("--set", f"length={LAST_STEP}steps", *RARELY)
# As `--gpus 64` prints it, for two ranks of this host; the agent passes all of these on.
TORCHRUN = (
    *(
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "1",
        "--nproc-per-node",
        "2",
        "--rdzv-backend",
        "c10d",
    ),
    *("--rdzv-endpoint", "127.0.0.1:0", "--signals-to-handle", AGENT_SIGNALS, "--no-python", *command.FASTSSL),
)


def arguments(world):
    return ("train", "--out", "run", "--cpu-ranks", str(world), *command.CHANGES, *LENGTH)


def ask_to_stop(folder, world, signum, to, program=command.FASTSSL):
    """Run until `signum`, sent at a step in the middle to the process that `to` chooses from launcher and workers; the
    exit code, the log, and the step that was saved."""
    with command.running(folder, *arguments(world), program=program) as process:
        before = command.steps_logged(folder / "run")
        command.wait_until(lambda: process.poll() is not None or command.steps_logged(folder / "run") > before)
        if process.poll() is None and signum == signal.SIGINT and program is command.FASTSSL:
            command.interrupt(process.pid)
        elif process.poll() is None:
            os.kill(to(process.pid, command.children(process.pid)), signum)
        code = process.wait(timeout=200)
    log = (folder / "log").read_text()
    saved = sorted((folder / "run" / "checkpoints").glob("step-*"))
    return code, log, int(saved[-1].name[5:]) if saved else 0


def launcher(pid, workers):
    return pid


def last_worker(pid, workers):
    return max(workers)  # started last; the first child is Python's own


def last_rank(pid, workers):
    """Of torchrun's: a rank has no children."""
    return max(worker for worker in workers if not command.children(worker))


ALL = ("SIGUSR1", "SIGINT", "SIGUSR2", "SIGTERM")


@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("program", "world", "to"),
    [
        (command.FASTSSL, 1, launcher),
        (command.FASTSSL, 2, launcher),
        (command.FASTSSL, 2, last_worker),
        (TORCHRUN, 2, launcher),
        (TORCHRUN, 2, last_rank),
    ],
    ids=["alone", "the command", "its rank", "torchrun", "torchrun's rank"],
)
def test_a_signal_saves_at_a_step_between_and_the_same_command_continues_bitwise(program, world, to, whole, tmp_path):
    """Catches a request that waits for the next scheduled checkpoint, that one of the ranks misses, that a launcher
    dies of, or whose checkpoint differs from a scheduled one. Those are due beyond the end: what is saved, the
    request saved."""
    step, asked = 0, 0
    for name in ALL:
        code, log, saved = ask_to_stop(tmp_path, world, signal.Signals[name], to, program)
        if (tmp_path / "run" / "result.json").exists():
            break  # a busy machine let it finish first
        assert code == (1 if program is TORCHRUN else EXIT_STOPPED), log
        assert step < saved < LAST_STEP and command.steps_logged(tmp_path / "run") == saved
        says = f"saved and stopped after step {saved} of {LAST_STEP}, as {name} asked; the same command continues"
        assert log.count(says) == 1 and (program is TORCHRUN or log.rstrip().splitlines()[-1] == says), log
        step, asked = saved, asked + 1
    assert asked >= 2, "it always finished before it was stopped"
    if not (tmp_path / "run" / "result.json").exists():
        with command.running(tmp_path, *arguments(world), program=program) as process:
            assert process.wait(timeout=400) == 0, (tmp_path / "log").read_text()
    assert_same_run(whole[world], tmp_path / "run")


IN_C_CODE = """
import hashlib, sys, time
from fastssl.engine import signals
signals.SAME_REQUEST_S = float(sys.argv[1])
with signals.StopRequest() as stop:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # as in a collective that never ends, no Python handler runs here
"""


def in_c_code(same_request_s):
    started = [sys.executable, "-c", IN_C_CODE, str(same_request_s)]
    process = subprocess.Popen(started, cwd=command.ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_second_request_ends_a_process_that_cannot_answer_at_once():
    """Catches a handler that Python runs only when C code returns: a rank in a hung collective could not be ended."""
    process = in_c_code(0.2)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=20) == 128 + signal.SIGUSR1


AT_CTRL_C = """
import signal, time
from fastssl.engine import signals
signals.SAME_REQUEST_S = 0.2
signal.signal(signal.SIGINT, signal.default_int_handler)
with signals.StopRequest() as stop:
    print("ready", flush=True)
    while not stop.signum:
        time.sleep(0.01)
    print("asked", flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


def test_ctrl_c_asks_at_first_and_is_pythons_own_the_second_time():
    """Catches a Ctrl-C that loses what was trained since the last checkpoint, and a second that ends a notebook."""
    process = subprocess.Popen([sys.executable, "-c", AT_CTRL_C], cwd=command.ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "asked\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "interrupted\n" and process.wait(timeout=20) == 0


def test_one_request_that_arrives_twice_is_one():
    """Catches a launcher's forwarding, on top of the scheduler's signal to all, that ends the run without saving."""
    process = in_c_code(60.0)
    for signum in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR2):
        process.send_signal(signum)
        time.sleep(0.1)
    time.sleep(0.5)
    try:
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
