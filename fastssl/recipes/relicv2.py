"""ReLICv2: contrastive learning with few negatives, held alike from every view by an explicit penalty.

Paper      Tomasev et al., arXiv 2201.05119
Command    fastssl train relicv2.rn50_300ep --data PATH --gpus 64

SemPPL without semantic positives: `fastssl.methods.semppl`. Labels are used by evaluations alone.
"""

from __future__ import annotations

from fastssl.methods.base import Stages
from fastssl.recipes import semppl
from fastssl.recipes.published import published


@published(*semppl.paper(1000, one_pct=58.1, ten_pct=72.4, but="quoted from ReLICv2's paper, whose runs are longer"))
def rn50_300ep() -> Stages:
    """ImageNet, ResNet-50, 300 epochs."""
    return without_positives(semppl.rn50_300ep())


def cifar10_small() -> Stages:
    """semppl.cifar10_small without semantic positives, for as many steps: what these must beat."""
    return without_positives(semppl.cifar10_small())


def without_positives(stages: Stages) -> Stages:
    """The baseline of a SemPPL recipe: everything else is the same."""
    (stage,) = stages
    return (stage.with_settings(alpha=0.0),)
