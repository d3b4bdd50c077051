"""Requests to stop, by real signals to real processes: all ranks save at one step, and the same command continues."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fastssl.errors import EXIT_STOPPED
from tests.end_to_end import command
from tests.interrupted import assert_same_run

LAST_STEP = 12  # of command.TINY


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same run, uninterrupted, by number of ranks."""
    found = {}
    for world in (1, 2):
        folder = tmp_path_factory.mktemp(f"whole{world}")
        code, log = command.run(folder, *arguments(world))
        assert code == 0, log
        found[world] = folder / "run"
    return found


def arguments(world):
    return ("train", "--out", "run", "--cpu-ranks", str(world), *command.CHANGES, "--set", "checkpoint_every=100steps")


def ask_to_stop(folder, world, signum, to):
    """Run until `signum`, sent at a step in the middle to the process that `to` chooses from launcher and workers; the
    exit code, the log, and the step that was saved."""
    with command.running(folder, *arguments(world)) as process:
        before = command.steps_logged(folder / "run")
        command.wait_until(lambda: process.poll() is not None or command.steps_logged(folder / "run") > before)
        if process.poll() is None:
            os.kill(to(process.pid, command.children(process.pid)), signum)
        code = process.wait(timeout=200)
    log = (folder / "log").read_text()
    saved = sorted((folder / "run" / "checkpoints").glob("step-*"))
    return code, log, int(saved[-1].name[5:]) if saved else 0


def launcher(pid, workers):
    return pid


def last_worker(pid, workers):
    return max(workers)  # started last; the first child is Python's own


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("world", "signals"),
    [(1, {"SIGUSR1": launcher, "SIGUSR2": launcher}), (2, {"SIGTERM": launcher, "SIGUSR1": last_worker})],
    ids=["alone", "two ranks"],
)
def test_a_signal_saves_at_a_step_between_and_the_same_command_continues_bitwise(world, signals, whole, tmp_path):
    """Catches a request that waits for the next scheduled checkpoint, that one of the ranks misses, or whose checkpoint
    differs from a scheduled one. checkpoint_every is beyond the end: what is saved, the request saved."""
    step = 0
    for name, to in signals.items():
        code, log, saved = ask_to_stop(tmp_path, world, signal.Signals[name], to)
        if (tmp_path / "run" / "result.json").exists():
            break  # a busy machine let it finish first
        assert code == EXIT_STOPPED, log
        assert step < saved < LAST_STEP and command.steps_logged(tmp_path / "run") == saved
        says = f"saved and stopped after step {saved} of {LAST_STEP}, as {name} asked; the same command continues"
        assert log.rstrip().splitlines()[-1] == says
        step = saved
    assert step > 0, "it always finished before it was stopped"
    code, log = command.run(tmp_path, *arguments(world))
    assert code == 0, log
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
