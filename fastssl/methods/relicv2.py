"""ReLICv2: contrastive learning with few negatives, held alike from every view by an explicit penalty.

Paper      Tomasev et al., arXiv 2201.05119
Command    fastssl train relicv2.rn50_300ep --data PATH --gpus 64
Published  ResNet-50, fine-tuned: 58.1 % with 1 % of the labels, 72.4 % with 10 % (as SemPPL's paper has them)

SemPPL without semantic positives: `fastssl.methods.semppl`. Labels are used by evaluations alone.
"""

from __future__ import annotations

from dataclasses import replace

from fastssl.methods import semppl
from fastssl.methods.base import Stages


def rn50_300ep() -> Stages:
    """ImageNet, ResNet-50, 300 epochs. Paper: 72.4 % fine-tuned with 10 % of the labels; 58.1 % with 1 %."""
    return _without_positives(semppl.rn50_300ep())


def cifar10_small() -> Stages:
    """semppl.cifar10_small without semantic positives, for as many steps: what these must beat."""
    return _without_positives(semppl.cifar10_small())


def _without_positives(stages: Stages) -> Stages:
    """The baseline of a SemPPL recipe: everything else is the same."""
    (stage,) = stages
    method = stage.method
    assert isinstance(method, semppl.SempplConfig)
    return (replace(stage, method=replace(method, alpha=0.0)),)
