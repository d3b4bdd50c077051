"""Plain supervised training on the labelled images alone: the baseline that every other method must beat.

Command    fastssl train supervised.digits

Cross-entropy with label smoothing, SGD with Nesterov momentum, warm-up and cosine decay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from fastssl.config import ConfigError
from fastssl.methods import paws
from fastssl.methods.base import (
    Artefact,
    Config,
    Epochs,
    Facts,
    Horizon,
    Method,
    Nets,
    Span,
    Stage,
    Stages,
    Steps,
    autocast,
    in_full,
)
from fastssl.nn.encoders import Encoder, ResNet
from fastssl.optim.schedule import warmup_cosine
from loaders.batch import Batch
from loaders.plan.plan import Plan
from loaders.plan.views import Shuffled, Stream, View, parse_subset


@dataclass(frozen=True)
class SupervisedConfig(Config):
    """Settings of the baseline; an epoch is a pass over the labelled images."""

    view: View = paws.GLOBAL_VIEW
    encoder: Encoder = ResNet(50)
    batch_global: int = 256
    lr_peak: float = 0.1
    warmup: Span = Epochs(5)
    momentum: float = 0.9
    weight_decay: float = 5e-4  # on kernels only
    label_smoothing: float = 0.1

    def build(self, facts: Facts, inputs: Mapping[str, Artefact]) -> Method:
        return Supervised(self, facts, inputs)


class Classifier(nn.Module):
    """Trunk and linear classifier."""

    def __init__(self, config: SupervisedConfig, facts: Facts):
        super().__init__()
        self.trunk = config.encoder.build(facts.channels)
        self.fc = nn.Linear(self.trunk.num_features, facts.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] -> logits [N, num_classes]."""
        return self.fc(self.trunk(x))


class Supervised(Method):
    """Cross-entropy on labelled images."""

    config: SupervisedConfig
    taps = ("backbone", "logits")

    def __init__(self, config: SupervisedConfig, facts: Facts, inputs: Mapping[str, Artefact]):
        if not facts.num_classes:
            raise ConfigError("no image of the labelled data carries a label: give --data labelled=PATH")
        super().__init__(config, facts, inputs)

    def plan(self) -> Plan:
        c = self.config
        stream = Stream("labelled", "labelled", (c.view,), Shuffled(), c.batch_global, ids=parse_subset(c.labels))
        return Plan((stream,), epoch_of="labelled", seed=self.facts.seed)

    def nets(self) -> Nets:
        return Nets(Classifier(self.config, self.facts))

    def optimizer(self, nets: Nets) -> SGD:
        c = self.config
        parameters = list(nets.online.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": c.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return SGD(groups, lr=c.lr_peak, momentum=c.momentum, nesterov=True)

    def rates(self, step: int, horizon: Horizon) -> tuple[float, ...]:
        rate = warmup_cosine(
            step,
            start=0.0,
            peak=self.config.lr_peak,
            final=0.0,
            warmup_steps=horizon.steps(self.config.warmup),
            total_steps=horizon.total_steps,
        )
        return rate, rate

    def loss(self, nets: Nets, batch: Batch) -> dict[str, Tensor]:
        part, c = batch.parts["labelled"], self.config
        with autocast(batch.step.device, c.precision):
            logits = in_full(nets.online(part.x[c.view.name]))
        return {"total": F.cross_entropy(logits, part.labels, label_smoothing=c.label_smoothing)}

    def embed(self, nets: Nets, x: Tensor, tap: str) -> Tensor:
        net = nets.online
        assert isinstance(net, Classifier)
        with autocast(x.device, self.config.precision):
            return in_full(net.trunk(x) if tap == "backbone" else net(x))


# ---------------------------------------------------------------------------------------------------------- recipes


def digits() -> Stages:
    """The network, labels and crops of paws.digits, trained on the hundred labelled digits alone."""
    return _beside(paws.digits(), batch_global=100, lr_peak=0.1, length=Epochs(400))


def cifar10_small() -> Stages:
    """The network, labels and crops of paws.cifar10_small, trained on the 4,000 labelled images alone."""
    return _beside(paws.cifar10_small(), batch_global=128, lr_peak=0.2, length=Epochs(2000))


def _beside(stages: Stages, batch_global: int, lr_peak: float, length: Epochs) -> Stages:
    """The baseline of a PAWS recipe: everything that is not the method is the same."""
    (stage,) = stages
    theirs = stage.method
    assert isinstance(theirs, paws.PawsConfig)
    ours = SupervisedConfig(
        dataset=theirs.dataset,
        eval_view=theirs.eval_view,
        labels=theirs.labels,
        precision=theirs.precision,
        view=replace(theirs.global_view, name="labelled", copies=1),
        encoder=theirs.encoder,
        batch_global=batch_global,
        lr_peak=lr_peak,
    )
    tenth = Epochs(length.count // 10)
    return (
        Stage(
            name="train",
            method=ours,
            length=length,
            evaluate=("classifier", "knn"),
            evaluate_every=tenth,
            log_every=Steps(100),
            checkpoint_every=tenth,
        ),
    )
