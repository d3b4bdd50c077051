"""A run that was killed and started again is, bit for bit, the run that was not."""

import random
import shutil

import pytest

from fastssl.engine import stages
from tests.end_to_end import command
from tests.ranks.pool import run_ranks
from tests.support import fakes
from tests.support.interrupted import assert_same_run, assert_same_stages, run_in_pieces

LAST_STEP = 12  # of command.TINY


# --------------------------------------------------------------------------------------------- processes and signals


@pytest.mark.timeout(900)  # many starts of many processes, on a machine that may be busy
@pytest.mark.parametrize(
    ("world", "stops"), [(1, ["launcher"]), (2, ["worker", "launcher"]), (4, ["all"])], ids=["1", "2", "4"]
)
def test_stopped_at_a_random_step_and_started_again_is_bitwise_the_same(world, stops, tmp_path):
    """Catches state that a checkpoint lacks, data order that depends on where a process began, DDP's first step summing
    in another order, metrics lines lost or doubled, and workers that outlive their launcher."""
    arguments = ("train", "--out", "run", "--cpu-ranks", str(world), *command.CHANGES)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    command.run_here(whole, *arguments)
    for stop in stops:
        for _ in range(5):
            if stopped(stop, broken, arguments):
                break
            shutil.rmtree(broken / "run")  # a busy machine let it finish first: once more
        else:
            pytest.fail(f"{stop}: it always finished before it was stopped")
    code, log = command.run(broken, *arguments)
    assert code == 0, log
    assert_same_run(whole / "run", broken / "run")
    steps = [record["step"] for record in command.metrics(broken / "run") if "loss" in record]
    assert steps == list(range(1, LAST_STEP + 1))


STOPS = {  # what is done to the launcher and its workers; what the launcher answers, -9 where it cannot
    "all": (lambda launcher, workers: command.kill(launcher, *workers), -9, ""),
    "launcher": (lambda launcher, workers: command.kill(launcher), -9, ""),
    "worker": (lambda launcher, workers: command.kill(*workers[-1:]), 1, "died: SIGKILL (out of memory?); the same"),
}


def stopped(stop, folder, arguments):
    """Start and stop at a random step; whether that came before the end. No process may live 10 s longer."""
    act, expected_code, says = STOPS[stop]
    at = random.randrange(1, LAST_STEP - 2)
    with command.running(folder, *arguments) as process:
        command.wait_until(lambda: process.poll() is not None or command.steps_logged(folder / "run") >= at)
        workers = command.children(process.pid)
        if process.poll() is None:
            act(process.pid, workers)
        code = process.wait(timeout=100)
        command.wait_until(lambda: not any(map(command.alive, workers)), timeout_s=10)
    if (folder / "run" / "result.json").exists():
        return False
    log = (folder / "log").read_text()
    assert code == expected_code, log
    last_line = log.rstrip().rpartition("\n")[2]
    assert says in last_line and log.count("Error") == bool(says) and "Traceback" not in log, log
    return True


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
