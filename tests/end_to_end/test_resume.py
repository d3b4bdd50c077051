"""A run that was killed and started again is, bit for bit, the run that was not."""

import random
from pathlib import Path

import pytest

from fastssl.engine import stages
from tests import fakes
from tests.end_to_end import command
from tests.interrupted import assert_same_run, assert_same_stages, run_in_pieces
from tests.ranks.pool import run_ranks

LAST_STEP = 12  # of command.TINY


# --------------------------------------------------------------------------------------------- processes and signals


@pytest.mark.timeout(900)  # many starts of many processes, on a machine that may be busy
@pytest.mark.parametrize(
    ("world", "stops"), [(1, ["interrupt", "launcher"]), (2, ["worker", "launcher"]), (4, ["all"])], ids=["1", "2", "4"]
)
def test_stopped_at_a_random_step_and_started_again_is_bitwise_the_same(world, stops, tmp_path):
    """Catches state that a checkpoint lacks, data order that depends on where a process began, DDP's first step summing
    in another order, metrics lines lost or doubled, and workers that outlive their launcher."""
    arguments = ("train", "--out", "run", "--cpu-ranks", str(world), *command.CHANGES)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    code, log = command.run(whole, *arguments)
    assert code == 0, log
    for stop in stops:
        with command.running(broken, *arguments) as process:
            STOPS[stop](process, broken)
        assert not (broken / "run" / "result.json").exists(), "it finished before it was stopped"
    code, log = command.run(broken, *arguments)
    assert code == 0, log
    assert_same_run(whole / "run", broken / "run")
    steps = [record["step"] for record in command.metrics(broken / "run") if "loss" in record]
    assert steps == list(range(1, LAST_STEP + 1))


def kill_all(process, folder):
    workers = workers_at_a_random_step(process, folder)
    command.kill(process.pid, *workers)
    expect_end(process, workers)


def kill_launcher(process, folder):
    workers = workers_at_a_random_step(process, folder)
    command.kill(process.pid)
    expect_end(process, workers)


def kill_worker(process, folder):
    workers = workers_at_a_random_step(process, folder)
    ranks = [pid for pid in workers if "resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_text()]
    command.kill(ranks[-1])
    assert expect_end(process, workers) == 1
    last_line = only_error(folder)
    assert "Error: rank " in last_line and "died: SIGKILL (out of memory?)" in last_line


def interrupt(process, folder):
    workers = workers_at_a_random_step(process, folder)
    command.interrupt(process.pid)
    assert expect_end(process, workers) == 1
    assert only_error(folder) == "Error: interrupted; the same command continues from the last checkpoint"


STOPS = {"all": kill_all, "launcher": kill_launcher, "worker": kill_worker, "interrupt": interrupt}


def workers_at_a_random_step(process, folder):
    """The processes below the launcher, once a random step is logged."""
    at = random.randrange(1, LAST_STEP - 2)
    command.wait_until(lambda: process.poll() is not None or command.steps_logged(folder / "run") >= at)
    assert process.poll() is None, (folder / "log").read_text()
    return command.children(process.pid)


def expect_end(process, workers):
    """Exit code of a launcher that leaves no process behind for longer than 10 s."""
    code = process.wait(timeout=100)
    command.wait_until(lambda: not any(map(command.alive, workers)), timeout_s=10)
    return code


def only_error(folder):
    log = (folder / "log").read_text()
    assert log.count("Error") == 1 and "Traceback" not in log, log
    return log.splitlines()[-1]


# ------------------------------------------------------------------------- in process: averages, queues and chains

FAMILIES = ["paws", "semppl", "simclrv2", "s4l"]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_stopped_and_continued_is_bitwise_the_same(family, tmp_path):
    """Catches an average, queue or pointer that is not saved, and a chain that takes a stage's wrong artefact."""
    check(family, tmp_path, both_ways(family, tmp_path, world=1))


def test_each_family_on_two_ranks_stopped_and_continued_is_bitwise_the_same(tmp_path):
    """As above, and catches a throw-away backward pass that leaves a trace in an average or a queue."""
    for family, stops in run_ranks(2, _all_families, tmp_path, timeout_s=250.0)[0].items():
        check(family, tmp_path / family, stops)


def _all_families(folder):
    return {family: both_ways(family, folder / family, world=2) for family in FAMILIES}


def both_ways(family, folder, world):
    """A family's run in one piece and in several, in `whole` and `pieces`; the number of stops."""
    stages.run(fakes.job(fakes.stages(family), folder / "whole", world=world))
    return run_in_pieces(fakes.job(fakes.stages(family), folder / "pieces", world=world), every=5)


def check(family, folder, stops):
    assert stops >= sum(stage.do == "train" for stage in fakes.stages(family))
    assert_same_stages(folder / "whole", folder / "pieces", fakes.stages(family))
