"""Training on the labelled images of another recipe alone: beside it to compare with, or before it to start from."""

from __future__ import annotations

from dataclasses import replace

from fastssl.methods.base import Epochs, Ref, Stage, Stages, Steps
from fastssl.methods.supervised import SupervisedConfig
from fastssl.optim.rates import WarmupCosine


def beside(pretrain: Stage, batch_global: int, peak: float) -> SupervisedConfig:
    """What trains on the labels of a stage of PAWS alone: everything that is not the method is the same."""
    view = replace(pretrain.settings("global_view")["global_view"], name="labelled", copies=1)
    shared = pretrain.settings("dataset", "eval_view", "labels", "precision", "encoder")
    return SupervisedConfig(**shared, view=view, batch_global=batch_global, rate=WarmupCosine(peak, Epochs(5)))


def alone(config: SupervisedConfig, length: Epochs, name: str = "train") -> Stage:
    """A stage that trains so, evaluated ten times."""
    tenth = Epochs(max(1, length.count // 10))
    return Stage(
        name=name,
        config=config,
        length=length,
        evaluate=("classifier", "knn"),
        evaluate_every=tenth,
        log_every=Steps(100),
        checkpoint_every=tenth,
    )


def after_labels(pretrain: Stage, config: SupervisedConfig, length: Epochs) -> Stages:
    """`pretrain` from the encoder that `config` learns from the labels alone: two stages."""
    first = alone(config, length, name="labels")
    return (first, replace(pretrain, needs={"init": Ref(stage=first.name)}))
