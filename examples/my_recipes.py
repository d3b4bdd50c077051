"""Recipes of one's own, which need not be part of fastssl:

    fastssl train examples/my_recipes.py:wider          # a shipped recipe, changed
    fastssl train examples/my_recipes.py:simsiam        # a method, an encoder and an optimiser of one's own

What lies beside this file can be imported by it. All ranks import it, wherever they are started, and a run keeps where
it was: `fastssl evaluate RUN` works in any folder as long as the file is there.
"""

from __future__ import annotations

from dataclasses import replace

from my_encoder import ThreeConvs
from my_method import SimSiamConfig
from my_optimiser import Lion

from fastssl.methods.base import Epochs, Stage, Stages
from fastssl.optim.rates import WarmupCosine
from fastssl.recipes import paws
from loaders.plan.ops import Affine
from loaders.plan.views import UNIT, Rrc, View, Whole


def wider() -> Stages:
    """paws.digits with twice the output, half as long."""
    (stage,) = paws.digits()
    return (replace(stage.with_settings(out_features=128), length=Epochs(60)),)


def simsiam() -> Stages:
    """Digits without labels, in seconds."""
    config = SimSiamConfig(
        dataset="digits",
        eval_view=View("eval", 8, Whole(), pixels=UNIT),
        labels="per-class=10",  # which nearest neighbours are looked for among
        precision="fp32",
        encoder=ThreeConvs(8),
        out_features=64,
        hidden_features=32,
        view=View("view", 8, Rrc((0.5, 1.0)), (Affine(degrees=12.0, scale=(0.85, 1.15), shift=0.08),), UNIT, copies=2),
        batch_global=128,
        optimizer=Lion(weight_decay=0.01),
        rate=WarmupCosine(3e-4, Epochs(2)),
    )
    return (Stage("pretrain", config, Epochs(20), evaluate=("knn",)),)
