"""A run that was killed and started again is, bit for bit, the run that was not."""

import random
from pathlib import Path

import pytest
import torch

from fastssl.engine import stages
from fastssl.engine.stages import Job
from fastssl.record import Recorder
from tests import fakes
from tests.end_to_end import command
from tests.ranks.pool import run_ranks

LAST_STEP = 12


def final_state(run_dir):
    """Everything that the last checkpoint holds, flattened to name -> tensor or plain value."""
    newest = sorted(run_dir.glob("checkpoints/step-*"))[-1]
    return _flat(torch.load(newest / "state.pt", weights_only=True))


def _flat(value, name=""):
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in _flat(part, f"{name}.{key}").items()}
    if isinstance(value, list | tuple):
        return _flat(dict(enumerate(value)), name)
    return {name: value}


def assert_same_run(one, other):
    """Weights, optimiser state and metrics; NaN would differ from itself, and so fail."""
    ours, theirs = final_state(one), final_state(other)
    assert ours.keys() == theirs.keys()
    different = [
        k for k, v in ours.items() if not (torch.equal(v, theirs[k]) if torch.is_tensor(v) else v == theirs[k])
    ]
    assert different == []
    assert command.metrics(one) == command.metrics(other)


# --------------------------------------------------------------------------------------------- processes, SIGKILL


def killed(process, folder, who):
    """Kill `who` ("all", "launcher" or "worker") once a random step is logged; nobody may live 10 s later."""
    at = random.randrange(1, LAST_STEP - 2)
    command.wait_until(lambda: process.poll() is not None or command.steps_logged(folder / "run") >= at)
    workers = command.children(process.pid)
    assert process.poll() is None, (folder / "log").read_text()
    if who == "worker":
        command.kill(ranks(workers)[-1])
    elif who == "launcher":
        command.kill(process.pid)
    else:
        command.kill(process.pid, *workers)
    code = process.wait(timeout=10)
    command.wait_until(lambda: not any(map(command.alive, workers)), timeout_s=10)
    assert not (folder / "run" / "result.json").exists(), "it finished before it was killed"
    return code


def ranks(pids):
    """Those of the processes that compute: the resource tracker of multiprocessing does not."""
    return [pid for pid in pids if "resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.timeout(900)  # many starts of many processes, on a machine that may be busy
@pytest.mark.parametrize(
    ("world", "kills"), [(1, ["launcher"]), (2, ["worker", "launcher"]), (4, ["all"])], ids=["1", "2", "4"]
)
def test_killed_at_a_random_step_and_started_again_is_bitwise_the_same(world, kills, tmp_path):
    """Catches state that a checkpoint lacks, data order that depends on where a process began, DDP's first step summing
    in another order, metrics lines lost or doubled, and workers that outlive their launcher."""
    arguments = ("train", "--out", "run", "--cpu-ranks", str(world), *command.CHANGES)
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    code, log = command.run(tmp_path / "whole", *arguments)
    assert code == 0, log
    for who in kills:
        code = killed(command.start(tmp_path / "broken", *arguments), tmp_path / "broken", who)
        if who == "worker":
            log = (tmp_path / "broken" / "log").read_text()
            assert code == 1 and log.count("Error:") == 1 and "Traceback" not in log, log
            assert "died: SIGKILL" in log.splitlines()[-1]
    code, log = command.run(tmp_path / "broken", *arguments)
    assert code == 0, log
    assert_same_run(tmp_path / "whole" / "run", tmp_path / "broken" / "run")
    assert [m["step"] for m in command.metrics(tmp_path / "broken" / "run") if "loss" in m] == list(range(1, 13))


# ------------------------------------------------------------------------- in process: averages, queues and chains


class Stopped(Exception):
    """Stands for a kill."""


def run_in_pieces(job: Job, every: int) -> int:
    """Run `job`, stopped after every `every` logged steps, between their metrics line and their checkpoint, and
    started again until it is done; how often it was stopped."""
    log, stops = Recorder.log, 0
    while True:
        left = every

        def stopping(recorder, record):
            nonlocal left
            log(recorder, record)
            left -= 1
            if left == 0:
                raise Stopped

        Recorder.log = stopping  # type: ignore[method-assign]
        try:
            stages.run(job)
            return stops
        except Stopped:
            stops += 1
        finally:
            Recorder.log = log  # type: ignore[method-assign]


FAMILIES = ["paws", "semppl", "simclrv2", "s4l"]


def both_ways(family, folder, world):
    """A family's run in one piece and in several, in `whole` and `pieces`."""
    stages.run(fakes.job(fakes.stages(family), folder / "whole", world=world))
    return run_in_pieces(fakes.job(fakes.stages(family), folder / "pieces", world=world), every=5)


def check(family, folder, stops):
    trained = [stage for stage in fakes.stages(family) if stage.do == "train"]
    assert stops >= len(trained)
    for stage in trained:
        name = stage.name if len(fakes.stages(family)) > 1 else ""
        assert_same_run(folder / "whole" / name, folder / "pieces" / name)
    for produced in folder.glob("whole/*/produced.pt"):
        theirs = torch.load(folder / "pieces" / produced.parent.name / "produced.pt", weights_only=True)
        for name, values in torch.load(produced, weights_only=True).items():
            assert torch.equal(values, theirs[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_stopped_and_continued_is_bitwise_the_same(family, tmp_path):
    """Catches an average, queue or pointer that is not saved, and a chain that takes a stage's wrong artefact."""
    check(family, tmp_path, both_ways(family, tmp_path, world=1))


def _all_families(folder):
    return {family: both_ways(family, folder / family, world=2) for family in FAMILIES}


def test_each_family_on_two_ranks_stopped_and_continued_is_bitwise_the_same(tmp_path):
    """As above, and catches a throw-away backward pass that leaves a trace in an average or a queue."""
    for family, stops in run_ranks(2, _all_families, tmp_path, timeout_s=250.0)[0].items():
        check(family, tmp_path / family, stops)
