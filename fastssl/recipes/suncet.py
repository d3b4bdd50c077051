"""SuNCEt's recipes: the last step after PAWS on CIFAR-10."""

from __future__ import annotations

from dataclasses import replace

from fastssl.methods.base import Epochs, Ref, Stage, Stages
from fastssl.methods.suncet import SuncetConfig
from fastssl.optim.rates import WarmupCosine
from fastssl.optim.sgd import Sgd
from fastssl.recipes import paws
from fastssl.recipes.published import Published, published
from loaders.plan.ops import Flip

_AFTER = "mean of 5 seeds; the authors' code keeps the epoch of the best test accuracy, this the last"
_PAPER = published(Published(source=paws.SOURCE, labels="4,000", epochs=600, nearest=96.0, spread=0.2, but=_AFTER))


@_PAPER
def cifar10() -> Stages:
    """A run of paws.cifar10, fine-tuned for 180 steps, as the authors' code does."""
    return _after(paws.cifar10(), images_per_class=64, epochs=30)


@_PAPER
def cifar10_two_stages() -> Stages:
    """paws.cifar10, and then suncet.cifar10."""
    (pretrain,), (tuned,) = paws.cifar10(), cifar10()
    return (pretrain, replace(tuned, needs={"init": Ref(stage=pretrain.name)}))


@_PAPER
def cifar10_sgd() -> Stages:
    """As cifar10 by the paper's appendix C: momentum SGD, every image once and as it is."""
    (stage,) = cifar10()
    view = replace(stage.settings("view")["view"], ops=(), copies=1)
    return (stage.with_settings(view=view, optimizer=Sgd(), rate=WarmupCosine(0.1)),)


def cifar10_small() -> Stages:
    """A run of paws.cifar10_small, fine-tuned for 180 steps of half the paper's batch: minutes on one CPU core."""
    return _after(paws.cifar10_small(), images_per_class=32, epochs=15)


def _after(stages: Stages, images_per_class: int, epochs: int) -> Stages:
    """What follows a PAWS recipe, on the images that it saw the labels of."""
    (stage,) = stages
    shared = stage.settings("dataset", "eval_view", "labels", "precision", "encoder", "classes_global")
    view = replace(stage.config.eval_view, name="labelled", ops=(Flip(),), copies=2)
    config = SuncetConfig(
        **shared, **stage.settings("out_features", "prediction"), view=view, images_per_class=images_per_class
    )
    return (Stage("finetune", config, Epochs(epochs), needs={"init": Ref()}),)
