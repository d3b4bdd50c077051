"""BYOL: predicting what an average of the network says of another view; no negatives.

Paper      Grill et al., NeurIPS 2020, arXiv 2006.07733
Code       google-deepmind/deepmind-research, byol
Command    fastssl train byol.rn50_300ep --data PATH --gpus 64
Published  ResNet-50, fine-tuned: 53.2 % with 1 % of the labels, 68.8 % with 10 % (as SemPPL's paper has them)

SemPPL on BYOL without semantic positives: `fastssl.methods.semppl`. Labels are used by evaluations alone.
"""

from __future__ import annotations

from dataclasses import replace

from fastssl.methods import semppl
from fastssl.methods.base import Stages


def rn50_300ep() -> Stages:
    """ImageNet, ResNet-50, 300 epochs. Paper: 68.8 % fine-tuned with 10 % of the labels; 53.2 % with 1 %."""
    (stage,) = semppl.byol_rn50_300ep()
    method = stage.method
    assert isinstance(method, semppl.SempplConfig)
    return (replace(stage, method=replace(method, alpha=0.0)),)
