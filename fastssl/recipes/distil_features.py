"""Distillation of features on CIFAR-10."""

from __future__ import annotations

from dataclasses import replace

from fastssl.methods.base import Epochs, Ref, Stage, Stages
from fastssl.methods.distil_features import DistilFeaturesConfig
from fastssl.optim.rates import WarmupCosine
from fastssl.recipes import supervised
from loaders.plan.ops import Flip


def cifar10_small() -> Stages:
    """The network of supervised.cifar10_small learns, without labels, the features that a trained one has of all images
    of CIFAR-10: a run or a file given by --set teacher=PATH, of another kind by --set teacher_encoder."""
    (stage,) = supervised.cifar10_small()
    known = stage.settings("dataset", "eval_view", "labels", "encoder", "view")
    config = DistilFeaturesConfig(
        **known | {"view": replace(known["view"], ops=(Flip(),))},
        teacher_encoder=known["encoder"],
        # Peaks of .1, 1, 4 and 16, by a hundred held-out training images a class (`--sweep`): at .1 it learns little.
        rate=WarmupCosine(1.0, Epochs(2)),
    )
    return (Stage("distil_features", config, Epochs(30), needs={"teacher": Ref()}, evaluate=("knn",)),)
