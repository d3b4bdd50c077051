"""S4L's labels of its own: what an earlier stage made stands in for labels, or is refused."""

import json
from dataclasses import replace

import pytest
import torch

from fastssl.errors import ConfigError
from fastssl.methods.base import Artefact, Facts
from fastssl.methods.s4l import (
    PseudoLabels,
)
from tests.parity.test_s4l import config


@pytest.fixture
def made(tmp_path):
    """What a stage leaves that labelled three images."""
    torch.save({"pseudo_label": torch.tensor([2, 0, 1]), "ids": torch.arange(3)}, tmp_path / "produced.pt")
    note(tmp_path)
    return Artefact(tmp_path / "produced.pt", "labels")


def note(folder, **changes):
    """Write of what the stage made its labels; a change to None leaves that out."""
    made_of = {"sha256": "labels", "inputs": {"init": "model"}, "data": {"images": "x"}, "num_images": 3} | changes
    made_of = {name: value for name, value in made_of.items() if value is not None}
    (folder / "result.json").write_text(json.dumps({"made_of": made_of}))


def loaded(inputs, fingerprint="x"):
    method = config(pseudo_labels=True).build(Facts(10, 1, 0, fingerprint), inputs)
    nets = method.nets()
    method.load_inputs(nets)
    return nets


def test_pseudo_labels_stand_in_for_labels(made):
    nets = loaded({"labels": made})
    assert isinstance(nets.frozen, PseudoLabels)
    assert nets.frozen(torch.tensor([1, 2, 2])).tolist() == [0, 1, 1]


def test_pseudo_labels_of_another_model_or_data_set_are_refused(made, tmp_path):
    """As after the first stage was trained anew, with the labels of the old one still there."""
    teacher = Artefact(tmp_path / "state.pt", "model")
    loaded({"labels": made, "teacher": teacher})
    with pytest.raises(ConfigError, match="made by other networks than those in .*state.pt"):
        loaded({"labels": made, "teacher": replace(teacher, sha256="newer")})
    with pytest.raises(ConfigError, match="made of other images"):
        loaded({"labels": made}, fingerprint="y")
    (tmp_path / "result.json").unlink()
    with pytest.raises(ConfigError, match="nothing beside it says"):
        loaded({"labels": made})


def test_pseudo_labels_in_another_file_than_the_stage_wrote_are_refused(made, tmp_path):
    """As when they were damaged, or exchanged for another run's; runs were once made that note no digest."""
    with pytest.raises(ConfigError, match=r"produced.pt is not the file that .*result.json tells of: make it anew"):
        loaded({"labels": replace(made, sha256="other")})
    note(tmp_path, sha256=None)
    with pytest.raises(ConfigError, match=r"produced.pt is older than the digests.*: make it anew"):
        loaded({"labels": made})


@pytest.mark.parametrize("ids", [[0, 2, 1], [0, 1, 1], [0, 1], [1, 2, 3]])
def test_pseudo_labels_that_are_not_one_an_image_in_order_are_refused(ids, made):
    """A row is looked up by the image's index: the labels of some images would be those of others."""
    torch.save({"pseudo_label": torch.zeros(len(ids), dtype=torch.int64), "ids": torch.tensor(ids)}, made.path)
    with pytest.raises(ConfigError, match=r"produced.pt does not hold the labels of images 0 to 2 in this order"):
        loaded({"labels": made})
