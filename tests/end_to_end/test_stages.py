"""Runs of several stages: what is looked at before the first begins, and what one stage takes over from another."""

import json
from dataclasses import replace

import pytest
import torch

from fastssl.config import ConfigError
from fastssl.engine import stages
from fastssl.engine.checkpoint import sha256_of
from fastssl.methods.base import Artefact
from loaders.errors import PlanError, StoreError
from tests import fakes


def test_data_that_a_later_stage_lacks_is_missed_before_the_first_trains(tmp_path):
    """The first stage knows labelled and unlabelled images, the second wants the plain training set."""
    job = fakes.job(fakes.stages("s4l"), tmp_path, data=("labelled=digits", "unlabelled=digits"))
    with pytest.raises(StoreError, match="no data for 'train'"):
        stages.run(job)
    assert not (tmp_path / "joint").exists()


def test_a_batch_that_a_later_stage_cannot_share_is_refused_before_the_first_trains(tmp_path):
    *first, last = fakes.stages("s4l")
    last = replace(last, method=replace(last.method, batch_global=47))
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
