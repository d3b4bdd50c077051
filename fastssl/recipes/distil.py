"""Distillation on CIFAR-10; on ImageNet it is the last of SimCLRv2's stages: `fastssl.recipes.simclrv2`."""

from __future__ import annotations

from dataclasses import replace

from fastssl.methods.base import Epochs, Ref, Stage, Stages
from fastssl.methods.distil import DistilConfig
from fastssl.optim.rates import WarmupCosine
from fastssl.recipes import supervised
from loaders.plan.ops import Flip


def cifar10_small() -> Stages:
    """The network of supervised.cifar10_small learns on all images of CIFAR-10, without labels, what a classifier says
    of them: a run of supervised.cifar10_finetune or any other with its pixels, given by --set teacher=RUN."""
    (stage,) = supervised.cifar10_small()
    config = DistilConfig(
        **stage.settings("dataset", "eval_view", "labels", "encoder"),
        view=replace(stage.settings("view")["view"], ops=(Flip(),)),
        batch_global=256,
        temperature=1.0,
        # Peaks of 1.6, 4.8 and 12.8, by a hundred held-out training images a class (`--sweep`).
        rate=WarmupCosine(12.8, Epochs(2)),
    )
    return (distil(config, Epochs(30)),)


def distil(config: DistilConfig, length: Epochs, teacher: Ref | None = None) -> Stage:
    """Train `config` under `teacher`: by default the one that `--set teacher=RUN` names."""
    return Stage("distil", config, length, needs={"teacher": teacher or Ref()}, evaluate=("classifier", "knn"))
