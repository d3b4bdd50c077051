"""A rank that hangs is named by the others within the stated time, and the run ends; real processes, real signals."""

import os
import re
import signal
import sys
import time

import pytest

from fastssl.errors import EXIT_HUNG
from tests.end_to_end import command

LIMIT_S = 6.0
HOST = re.escape(os.uname().nodename)
SLACK_S = 20.0  # a busy machine's


def named_after_s(folder, process):
    """Seconds until the log names somebody."""
    start = time.monotonic()
    command.wait_until(lambda: "watchdog: " in (folder / "log").read_text() or process.poll() is not None, 120)
    return time.monotonic() - start


def ended(folder, process):
    """The log of a run that the watchdog has ended."""
    assert process.wait(timeout=100) == EXIT_HUNG, (folder / "log").read_text()
    return (folder / "log").read_text()


@pytest.mark.timeout(400)
def test_a_stopped_rank_is_named_and_the_others_end(tmp_path):
    """Catches ranks that wait ten minutes for a collective and then say only that it timed out. A stopped process keeps
    its connections: nothing but its silence tells."""
    arguments = ("train", "--out", "run", "--cpu-ranks", "2", *command.CHANGES, "--set", "length=100000steps")
    with command.running(tmp_path, *arguments, "--watchdog", str(LIMIT_S)) as process:
        command.wait_until(lambda: process.poll() is not None or command.steps_logged(tmp_path / "run") > 2)
        last = max(command.children(process.pid))  # started last, the rank of the highest number
        os.kill(last, signal.SIGSTOP)
        took_s = named_after_s(tmp_path, process)
        log = ended(tmp_path, process)
    assert re.search(rf"^watchdog: rank 1 on {HOST} has not answered for \d+ s, last heard of ", log, re.MULTILINE)
    assert LIMIT_S - 1 < took_s < LIMIT_S + SLACK_S
    assert "fastssl/engine/train.py" in log.partition("rank-00000:")[2]  # where the other one waits
    assert log.rstrip().endswith("Error: a rank hung, as the watchdog said above; the same command continues from the "
                                 "last checkpoint")  # fmt: skip


@pytest.mark.timeout(400)
def test_a_rank_asleep_is_told_from_those_that_wait_for_it(tmp_path):
    """Catches blame by who stands still: all do. The stacks show where it sleeps."""
    program = (sys.executable, "-m", "tests.support.sleeping_rank", "run", str(LIMIT_S))
    with command.running(tmp_path, program=program) as process:
        log = ended(tmp_path, process)
    assert re.search(rf"^watchdog: rank 1 on {HOST} has not moved for \d+ s, stepping after step 3", log, re.MULTILINE)
    assert sorted(path.name for path in (tmp_path / "run" / "stacks").iterdir()) == ["rank-00000.txt", "rank-00001.txt"]
    assert "tests/support/sleeping_rank.py" in (tmp_path / "run" / "stacks" / "rank-00001.txt").read_text()
    assert "tests/support/sleeping_rank.py" in log.partition("rank-00001:")[2]
