"""A run that is continued on another number of ranks sees the same images, cut and coloured alike."""

import hashlib
import os
import signal
from dataclasses import replace

import pytest

from fastssl.engine import stages
from fastssl.errors import Stopped
from fastssl.methods.base import Steps
from fastssl.record.recorder import Recorder
from tests.end_to_end import command
from tests.ranks.pool import run_ranks
from tests.support import fakes

LAST_STEP = 9


def part(folder, world, stop_after):
    """One leg of the run; what this rank saw: {(step, stream, position): (image id, digest of its crops)}."""
    seen, loss, log = {}, fakes.TinyPaws.loss, Recorder.log

    def seeing(method, nets, batch):
        for name, images in batch.parts.items():
            for i, (position, image) in enumerate(zip(images.positions.tolist(), images.ids.tolist(), strict=True)):
                crops = b"".join(x[i :: len(images.ids)].contiguous().numpy().tobytes() for x in images.x.values())
                seen[int(batch.step), name, position] = image, hashlib.sha256(crops).hexdigest()
        return loss(method, nets, batch)

    def stopping(recorder, record):
        log(recorder, record)
        if record["step"] == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    fakes.TinyPaws.loss, Recorder.log = seeing, stopping
    (stage,) = fakes.stages("paws", steps=LAST_STEP)
    try:
        stages.run(fakes.job((replace(stage, evaluate=(), checkpoint_every=Steps(100)),), folder, world=world))
    except Stopped:
        assert stop_after
    finally:
        fakes.TinyPaws.loss, Recorder.log = loss, log
    return seen


@pytest.mark.timeout(900)  # ten processes start, on a machine that may be busy
def test_four_then_two_then_four_ranks_see_what_one_sees(tmp_path):
    """Catches crops keyed by rank or by place in the batch, images that a new number of ranks shows twice or not at
    all, and rates or averages that follow the number of ranks. Losses differ by rounding alone: statistics and
    gradients are summed in another order."""
    whole = part(tmp_path / "whole", 1, stop_after=None)
    pieces = {}
    for world, stop_after in ((4, 2), (2, 5), (4, None)):
        for seen in run_ranks(world, part, tmp_path / "pieces", world, stop_after, timeout_s=250.0):
            assert all(pieces.get(at, found) == found for at, found in seen.items())
            pieces |= seen
    assert pieces == whole and len(whole) == LAST_STEP * (48 + 40)
    ones, others = (command.metrics(tmp_path / run) for run in ("whole", "pieces"))
    assert [line["step"] for line in others] == list(range(1, LAST_STEP + 1))
    assert [line["loss"] for line in others] == pytest.approx([line["loss"] for line in ones], rel=1e-4)
