"""Runs of several stages: what is looked at before the first begins, and what one stage takes over from another."""

import json
import os
import signal
import time
from dataclasses import replace

import pytest
import torch

from fastssl.engine import produce_stage, stages
from fastssl.errors import ConfigError, Stopped
from fastssl.methods.base import Artefact, Epochs, Stage, Steps
from loaders.errors import PlanError, StoreError
from loaders.files import sha256_of
from loaders.loader import Loader
from tests.ranks.pool import run_ranks
from tests.support import fakes


def test_data_that_a_later_stage_lacks_is_missed_before_the_first_trains(tmp_path):
    """The first stage knows labelled and unlabelled images, the second wants the plain training set."""
    job = fakes.job(fakes.stages("s4l"), tmp_path, data=("labelled=digits", "unlabelled=digits"))
    with pytest.raises(StoreError, match="no data for 'train'"):
        stages.run(job)
    assert not (tmp_path / "joint").exists()


def test_a_batch_that_a_later_stage_cannot_share_is_refused_before_the_first_trains(tmp_path):
    *first, last = fakes.stages("s4l")
    last = replace(last, config=replace(last.config, batch_global=47))
    with pytest.raises(PlanError, match="2 ranks"):
        stages.run(fakes.job((*first, last), tmp_path, world=2))
    assert not (tmp_path / "joint").exists()


# ------------------------------------------------------------------------------------------------ what is taken over


def test_what_a_stage_produced_is_known_by_its_digest(tmp_path):
    """Catches a file that was exchanged or damaged after the stage wrote it."""
    stages.run(fakes.job(fakes.stages("s4l"), tmp_path))
    path = tmp_path / "label" / "produced.pt"
    made_of = Artefact(path, sha256_of(path)).made_of()
    assert made_of == json.loads((tmp_path / "label" / "result.json").read_text())["made_of"]
    assert made_of["num_images"] == len(torch.load(path, weights_only=True)["ids"])
    torch.save(torch.load(path, weights_only=True) | {"pseudo_label": torch.zeros(3)}, path)
    with pytest.raises(ConfigError, match="produced.pt is not the file .*: make it anew"):
        Artefact(path, sha256_of(path)).made_of()


def test_networks_of_a_stage_that_produces_lie_in_memory_as_images_do(tmp_path, monkeypatch):
    """Catches weights that cuDNN would turn round for every batch."""
    load, produce, seen = fakes.TinyLabeller.load_inputs, fakes.TinyLabeller.produce, set()

    def with_convolution(self, nets):
        load(self, nets)
        nets.online.convolution = torch.nn.Conv2d(3, 4, 3)

    def looked_at(self, nets, batch):
        seen.add(nets.online.convolution.weight.is_contiguous(memory_format=torch.channels_last))
        return produce(self, nets, batch)

    monkeypatch.setattr(fakes.TinyLabeller, "load_inputs", with_convolution)
    monkeypatch.setattr(fakes.TinyLabeller, "produce", looked_at)
    stages.run(fakes.job(fakes.stages("s4l"), tmp_path))
    assert seen == {True}


# --------------------------------------------------------------------------------------- stopped inside, and continued

NUM_STEPS = 6  # of a pass over the digits


class Killed(Exception):
    """Stands for a kill."""


def label(out, act=lambda step: None, **changes):
    """Label the digits by networks as they are drawn, `act` called at each step; the steps that were done, the result,
    None where it was killed."""
    done = []

    def produce(self, nets, batch):
        part = batch.parts["images"]
        act(int(batch.step))
        done.append(int(batch.step))
        z = nets.online(part.x["eval"])
        return {"pseudo_label": z[:, :10].argmax(dim=1), "z": z}

    settings = {"config": fakes.config("labeller"), "length": Epochs(1), "checkpoint_every": Steps(2)} | changes
    job = {name: settings.pop(name) for name in ("world", "allow_change") if name in settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fakes.TinyLabeller, "load_inputs", lambda self, nets: None)
        patch.setattr(fakes.TinyLabeller, "produce", produce)
        try:
            return done, stages.run(fakes.job((Stage("label", do="produce", **settings),), out, **job))
        except Killed:
            return done, None


def kill_at(last):
    def act(step):
        if step == last:
            raise Killed

    return act


def made(out):
    return torch.load(out / "produced.pt", weights_only=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    done, result = label(folder)
    assert done == list(range(NUM_STEPS)) and result["images"] == len(made(folder)["ids"])
    return folder


def assert_same(out, undisturbed):
    assert sha256_of(out / "produced.pt") == sha256_of(undisturbed / "produced.pt")
    assert not (out / "checkpoints").exists()


def test_a_killed_stage_continues_after_the_rows_it_kept(undisturbed, tmp_path, monkeypatch):
    """Catches rows that are made twice, lost, or out of order."""
    monkeypatch.setattr(produce_stage, "_NUM_KEPT", 1)
    assert label(tmp_path, kill_at(3)) == ([0, 1, 2], None)
    assert label(tmp_path, kill_at(5)) == ([2, 3, 4], None)
    done, result = label(tmp_path)
    assert done == [4, 5] and result["images"] == len(made(undisturbed)["ids"])
    assert_same(tmp_path, undisturbed)


def test_without_a_short_checkpoint_every_rows_are_kept_too(undisturbed, tmp_path):
    """An epoch, the default, is all of the stage."""
    label(tmp_path, kill_at(4), checkpoint_every=Epochs(1))
    assert label(tmp_path, checkpoint_every=Epochs(1))[0] == [4, 5]
    assert_same(tmp_path, undisturbed)


def test_a_stage_that_is_asked_to_stop_keeps_what_it_has(undisturbed, tmp_path, monkeypatch):
    monkeypatch.setattr(produce_stage, "_NUM_KEPT", 1)

    def terminate(step):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)  # a thread takes it

    says = f"stopped after step 3 of {NUM_STEPS}, as SIGTERM asked; the same command continues"
    with pytest.raises(Stopped, match=says):
        label(tmp_path, terminate, checkpoint_every=Epochs(1))
    assert label(tmp_path, checkpoint_every=Epochs(1))[0] == [3, 4, 5]
    assert_same(tmp_path, undisturbed)


@pytest.mark.parametrize(("num_damaged", "start"), [(1, 3), (2, 0)])
def test_damaged_rows_are_passed_over(num_damaged, start, undisturbed, tmp_path, capsys):
    label(tmp_path, kill_at(4))
    for path in sorted(tmp_path.glob("checkpoints/step-*/state.pt"))[-num_damaged:]:
        path.write_bytes(path.read_bytes()[:-1])
    assert label(tmp_path)[0] == list(range(start, NUM_STEPS))
    assert capsys.readouterr().out.count("is damaged (its digest differs); passed over") == num_damaged
    assert_same(tmp_path, undisturbed)


def test_rows_made_under_other_settings_are_passed_over(tmp_path, capsys):
    """Catches an artefact of which one part was made by one network and the rest by another."""
    label(tmp_path, kill_at(4))
    other = fakes.config("labeller", lr=0.1)
    assert label(tmp_path, config=other, allow_change=("lr",))[0] == list(range(NUM_STEPS))
    assert "made by other networks, of other images or settings; passed over" in capsys.readouterr().out


def test_rows_of_two_ranks_are_continued_by_one(undisturbed, tmp_path):
    assert run_ranks(2, _killed_on_two_ranks, tmp_path) == [[0, 1, 2], [0, 1, 2]]
    assert label(tmp_path)[0] == [3, 4, 5]
    ours, whole = made(tmp_path), made(undisturbed)
    assert torch.equal(ours["ids"], whole["ids"])
    torch.testing.assert_close(ours["z"], whole["z"])  # other shares of a batch, other rounding


def _killed_on_two_ranks(out):
    return label(out, kill_at(3), world=2)[0]


def test_the_row_of_a_replaced_image_keeps_its_index_and_is_noted(tmp_path, monkeypatch):
    """With `--damaged replace`. Catches ids of which one comes twice: nothing could be looked up by them."""
    init = Loader.__init__

    def damaged(self, *arguments, **settings):
        init(self, *arguments, **settings)
        self.replaced["images"][7] = 8

    monkeypatch.setattr(Loader, "__init__", damaged)
    assert label(tmp_path)[1]["replaced_images"] == {"images": {"7": 8}}
    rows = made(tmp_path)
    assert rows["ids"].tolist() == list(range(len(rows["ids"]))) and torch.equal(rows["z"][7], rows["z"][8])
