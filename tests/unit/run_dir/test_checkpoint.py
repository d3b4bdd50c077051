"""Checkpoints: whole or not at all, written beside training, and what stays of them."""

import hashlib
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastssl.engine import stages
from fastssl.methods.base import Stage, Steps
from fastssl.run_dir import checkpoint
from fastssl.run_dir.checkpoint import CheckpointError, Checkpoints
from fastssl.run_dir.saver import Saver
from tests.end_to_end.command import ROOT, kill, wait_until
from tests.ranks.pool import run_ranks
from tests.support import fakes


def state(value: float, size: int = 4) -> dict:
    """Like a trainer's: nested, with plain values, and two names for one tensor."""
    weight = torch.full((size,), value)
    return {"step": int(value), "nets": {"online": {"weight": weight, "tied": weight}}, "groups": [{"lr": 0.1}]}


def read(checkpoints: Checkpoints) -> float:
    found = checkpoints.load_newest(pytest.fail)
    assert found is not None
    return found["nets"]["online"]["weight"].unique().item()


class Slow(Checkpoints):
    """Does not write before it is let."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.may_write = threading.Event()

    def save(self, step, state):
        assert self.may_write.wait(30)
        return super().save(step, state)


def test_what_training_changes_while_a_checkpoint_is_written_is_not_in_it(tmp_path):
    """Catches a checkpoint that holds references to live weights: some of its tensors would be a step ahead."""
    checkpoints = Slow(tmp_path)
    saver, live = Saver(checkpoints), state(1.0)
    saver.save(1, live)
    live["nets"]["online"]["weight"].fill_(2.0)
    live["groups"][0]["lr"] = 0.2
    assert checkpoints.steps() == []  # training is not held up
    checkpoints.may_write.set()
    saver.finish()
    saved = checkpoints.load(1)
    assert saved["nets"]["online"]["tied"].tolist() == [1.0] * 4 and saved["groups"] == [{"lr": 0.1}]
    saver.close()


def test_the_next_save_waits_for_the_last_and_reuses_its_memory(tmp_path):
    """Catches a second copy that is taken while the first is still read, and memory that grows with every save."""
    checkpoints = Slow(tmp_path)
    saver = Saver(checkpoints)
    saver.save(1, state(1.0))
    places = [copy.data_ptr() for copy in saver._copies.values()]
    second = threading.Thread(target=saver.save, args=(2, state(2.0)))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    checkpoints.may_write.set()
    second.join(30)
    saver.finish()
    assert checkpoints.load(1)["nets"]["online"]["weight"].unique().item() == 1.0
    assert read(checkpoints) == 2.0
    assert [copy.data_ptr() for copy in saver._copies.values()] == places
    saver.close()


def test_the_digest_that_was_taken_on_the_way_is_that_of_the_file(tmp_path):
    path = Checkpoints(tmp_path).save(3, state(3.0, size=100_000))
    content = (path / "state.pt").read_bytes()
    digest = json.loads((path / "digest.json").read_text())
    assert digest == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def test_the_newest_stay_and_milestones_stay_for_ever(tmp_path):
    """Catches milestones that count as the newest ones, and those of a run with another spacing."""
    checkpoints = Checkpoints(tmp_path, keep=2, milestone_every=4)
    for step in range(1, 11):
        checkpoints.save(step, state(step))
    assert checkpoints.steps() == [4, 8, 9, 10]
    assert (tmp_path / "latest").read_text() == "step-00000010\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest"] + [f"step-{s:08d}" for s in (4, 8, 9, 10)]


def test_a_damaged_one_is_replaced(tmp_path):
    """A run that went back to the step before comes to it again."""
    checkpoints = Checkpoints(tmp_path)
    (checkpoints.save(1, state(1.0)) / "state.pt").write_bytes(b"PK")
    checkpoints.save(1, state(5.0))
    assert read(checkpoints) == 5.0 and not list(tmp_path.glob(".*"))


def test_a_stage_saves_its_milestones_too(tmp_path):
    (stage,) = fakes.stages("contrast")
    stage: Stage = replace(stage, checkpoint_every=Steps(3), keep_checkpoints=1, milestone_every=Steps(2), evaluate=())
    stages.run(fakes.job((stage,), tmp_path))
    assert Checkpoints(tmp_path / "checkpoints").steps() == [2, 4, 6]


WRITES_UNTIL_KILLED = """
import sys, torch
from pathlib import Path
from fastssl.run_dir.checkpoint import Checkpoints
checkpoints = Checkpoints(Path(sys.argv[1]))
for step in range(1, 1000):
    checkpoints.save(step, {"step": step, "nets": {"online": {"weight": torch.full((20_000_000,), float(step))}}})
"""


def test_killed_in_the_middle_of_a_write_the_one_before_is_whole(tmp_path):
    """Catches a checkpoint that is visible before it is complete, and remains that fill the disk."""
    writer = subprocess.Popen([sys.executable, "-c", WRITES_UNTIL_KILLED, tmp_path], cwd=ROOT)
    checkpoints = Checkpoints(tmp_path)
    partial = tmp_path / ".step-00000003.partial" / "state.pt"
    wait_until(lambda: partial.exists() and partial.stat().st_size > 1 << 20, timeout_s=60)
    kill(writer.pid)
    writer.wait()
    assert partial.exists() and checkpoints.steps() == [1, 2]
    assert read(checkpoints) == 2.0
    checkpoints.save(3, state(3.0))
    assert not list(tmp_path.glob(".*")) and read(checkpoints) == 3.0


def _with_files_up_to(num_bytes: int, folder: Path) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, state(1.0))
    try:
        checkpoints.save(2, state(2.0, size=1_000_000))
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_a_disk_that_takes_no_more_leaves_what_was_there(tmp_path):
    """Catches torch's "unexpected pos" in the place of what the disk said, and a partial file that keeps the room."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        said = pool.apply(_with_files_up_to, (100_000, tmp_path))
    assert said == f"cannot write checkpoint {tmp_path}/step-00000002: [Errno 27] File too large"
    assert read(Checkpoints(tmp_path)) == 1.0 and not list(tmp_path.glob(".*"))


def _told_where_the_disk_fills(folder: Path) -> tuple[str, int]:
    """What a rank is told where the third save fails, and how many steps later."""
    saved, write = [], checkpoint._write_state

    def full(path, state):
        saved.append(state["step"])
        if len(saved) == 3:
            raise OSError(28, "No space left on device")
        return write(path, state)

    checkpoint._write_state = full
    (stage,) = fakes.stages("paws", steps=400)
    try:
        stages.run(fakes.job((replace(stage, evaluate=()),), folder, world=2))
    except CheckpointError as error:
        return str(error), (folder / "metrics.jsonl").read_text().count("\n")
    return "finished", 0


def test_a_save_that_fails_stops_every_rank_and_loses_nothing(tmp_path):
    """Catches an error that stays with the thread it arose in while training goes on for hours, and ranks that wait
    for one that has stopped."""
    told = run_ranks(2, _told_where_the_disk_fills, tmp_path)
    path = tmp_path / "checkpoints"
    error = f"cannot write checkpoint {path}/step-00000009: [Errno 28] No space left on device"
    assert {words for words, _ in told} == {error}
    assert max(steps for _, steps in told) <= 12  # the save after the one that failed would be of step 12
    assert Checkpoints(path).steps() == [3, 6] and read_step(path) == 6


def read_step(path: Path) -> int:
    found = Checkpoints(path).load_newest(pytest.fail)
    assert found is not None
    return found["step"]


def test_resuming_looks_at_names_not_at_clocks(tmp_path):
    """Catches newest-by-mtime: hosts' clocks differ, and a restored backup has new times."""
    checkpoints = Checkpoints(tmp_path, keep=9)
    for step in (1, 2, 10):
        checkpoints.save(step, state(step))
    now = time.time()
    for days, step in enumerate((10, 2, 1)):  # the newest oldest, some in the future
        for path in (checkpoints.path(step), *checkpoints.path(step).iterdir()):
            os.utime(path, (now + 86400 * (days - 1),) * 2)
    assert read(checkpoints) == 10.0
