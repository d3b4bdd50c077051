"""BYOL: predicting what an average of the network says of another view; no negatives.

Paper      Grill et al., NeurIPS 2020, arXiv 2006.07733
Code       google-deepmind/deepmind-research, byol
Command    fastssl train byol.rn50_300ep --data PATH --gpus 64

SemPPL on BYOL without semantic positives: `fastssl.methods.semppl`. Labels are used by evaluations alone.
"""

from __future__ import annotations

from fastssl.methods.base import Stages
from fastssl.recipes import semppl
from fastssl.recipes.published import published


@published(*semppl.paper(1000, one_pct=53.2, ten_pct=68.8, but="quoted from BYOL's paper, whose runs are longer"))
def rn50_300ep() -> Stages:
    """ImageNet, ResNet-50, 300 epochs."""
    (stage,) = semppl.byol_rn50_300ep()
    return (stage.with_settings(alpha=0.0),)
