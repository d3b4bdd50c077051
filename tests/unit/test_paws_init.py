"""PAWS from a trunk that another method trained: the second stage of paws.cifar10_small."""

import pytest
import torch

from fastssl.methods import paws, supervised
from fastssl.methods.base import Artefact, Facts

FACTS = Facts(num_classes=10, channels=3, seed=0)


def test_trunk_and_running_statistics_are_those_of_the_first_stage(tmp_path):
    """Catches a start from random weights, and one that leaves the batch statistics behind."""
    first, second = (stage.method for stage in paws.cifar10_small())
    trained = first.build(FACTS, {}).nets().online
    trained.trunk.layer1[0].bn1.running_mean.fill_(3.0)
    path = tmp_path / "state.pt"
    torch.save({"nets": {"online": trained.state_dict()}}, path)

    net = second.build(FACTS, {"init": Artefact(path, "")}).nets().online
    for name, value in trained.trunk.state_dict().items():
        assert torch.equal(net.trunk.state_dict()[name], value), name


def test_a_trunk_of_another_width_is_refused(tmp_path):
    _, second = (stage.method for stage in paws.cifar10_small())
    other = supervised.digits()[0].method.build(Facts(10, 1, 0), {}).nets().online
    path = tmp_path / "state.pt"
    torch.save({"nets": {"online": other.state_dict()}}, path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        second.build(FACTS, {"init": Artefact(path, "")}).nets()


def test_the_baseline_is_the_first_stage_and_nothing_but_longer():
    """Catches a baseline handicapped by another network, view, rate or batch than the run it is compared with."""
    first, _ = paws.cifar10_small()
    (baseline,) = supervised.cifar10_small()
    assert baseline.method == first.method
    assert baseline.length.count > first.length.count
