"""Runs of several stages: what is looked at before the first begins, and what one stage takes over from another."""

from dataclasses import replace

import pytest

from fastssl.engine import stages
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
