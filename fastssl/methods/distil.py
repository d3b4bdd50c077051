"""Distillation: a student learns what a trained classifier says of images, with or without some labels. The last of
SimCLRv2's three stages; the teacher may come from any method.

Paper      Chen et al., NeurIPS 2020, arXiv 2006.10029, equations 2 and 3
Code       google-research/simclr at 383d414: a notebook shows the loss and its optimiser, nothing else was released
Command    fastssl train simclrv2.distill_rn50_from_rn152w3_sk --set teacher=RUN --data PATH --gpus 64
Published  ResNet-50 from a ResNet-152 of 3 x width with selective kernels: 73.9 / 77.5 % with 1 / 10 % of the labels;
           that ResNet-152 from itself: 76.6 / 80.9 %

Teacher and student see the same augmented images. The teacher stays as it is, in eval mode; its classes and the
normalisation of its pixels must be the student's. The student is a trunk and a linear classifier, from random weights
(the paper does not say), without a layer of a projection head even where the teacher has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl.errors import ConfigError
from fastssl.methods.base import (
    Artefact,
    Config,
    Facts,
    Horizon,
    Method,
    Nets,
    autocast,
    in_full,
    other_classes,
    rows_of_classes,
    setting_of,
    with_classes,
)
from fastssl.methods.supervised import Classifier, FirstLayer, SupervisedConfig, check_same_input
from fastssl.nn.encoders.encoder import Encoder
from fastssl.nn.encoders.resnet import SimclrResNet
from fastssl.optim.horizon import Share
from fastssl.optim.lars import Lars
from fastssl.optim.optimiser import Optimiser
from fastssl.optim.rates import Rate, Scaling, WarmupCosine
from fastssl.weights.read import Weights
from fastssl.weights.tensor_files import WeightsError
from loaders.batch import Batch
from loaders.plan.ops import Flip
from loaders.plan.plan import Plan
from loaders.plan.views import UNIT, All, Complement, DistortedBox, Filter, Shuffled, Stream, View, parse_subset

VIEW = View("student", 224, DistortedBox((0.08, 1.0)), (Flip(),), UNIT, Filter.BICUBIC_ALIASED)


def distillation(student_NK: Tensor, teacher_NK: Tensor, *, temperature: float) -> Tensor:
    """Mean over rows of -sum softmax(teacher / T) log softmax(student / T), both logits: 0-dim. float32 or float64; no
    gradient reaches the teacher's."""
    taught_NK = torch.softmax(teacher_NK.detach() / temperature, dim=1)
    return F.cross_entropy(student_NK / temperature, taught_NK)


def labelled_cross_entropy(logits_NK: Tensor, labels_N: Tensor) -> Tensor:
    """Sum over the rows whose label shows (is not -1) of -log softmax at it, divided by the number of all rows: 0-dim.
    Equation 3 sums over labelled images as over all, so each counts alike."""
    return F.cross_entropy(logits_NK, labels_N, ignore_index=-1, reduction="sum") / len(labels_N)


@dataclass(frozen=True)
class DistilConfig(Config):
    """Settings of the student's training; the defaults are those of the paper's ImageNet runs. Of `labels` training
    sees what `alpha` below 1 lets it."""

    view: View = VIEW
    encoder: Encoder = SimclrResNet(50)
    batch_global: int = 4096
    images: Literal["all", "labelled"] = "all"  # what is learnt from; "labelled": those of `labels` alone
    # Where labelled images are a set of their own and `alpha` is below 1, so many stand beside `batch_global` of the
    # others, and both terms see them; None: an eighth of that, where 10 % of the labels make a tenth of one set.
    labelled_batch: int | None = None
    temperature: float = 0.1  # the paper's for a student like its teacher; 1 for a smaller one
    alpha: float = 1.0  # share of distillation in the loss; 1 - alpha is that of the labels
    # The notebook multiplies distillation by temperature², the paper's equation does not. LARS makes little of it: what
    # changes is how far norms and biases move, which it does not adapt, and how much weight decay counts.
    times_temperature_squared: bool = False
    # As in the notebook, the classifier's kernel is adapted and decayed like any other.
    optimizer: Optimiser = Lars("simclr", weight_decay=1e-4)
    rate: Rate = WarmupCosine(6.4, Share(0.05))  # as in pre-training: .1 times the root of 4,096
    scaling: Scaling = "none"  # how the peak follows the batch

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ConfigError(f"temperature {self.temperature}: above zero")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha {self.alpha}: a share between 0 and 1")
        if self.labelled_batch == 0:
            raise ConfigError("labelled_batch 0: leave it to its default, or set alpha=1, which needs no labels")

    def build(self, facts: Facts, inputs: Mapping[str, Artefact]) -> Distil:
        return Distil(self, facts, inputs)


class Distil(Method[DistilConfig, Classifier]):
    """Learning a teacher's answers."""

    taps = ("backbone", "logits")
    needs_classes = True

    def plan(self) -> Plan:
        c = self.config
        told = parse_subset(c.labels)
        labelled = Stream("labelled", "labelled", (c.view,), Shuffled(), c.batch_global, ids=told)
        if c.images == "labelled":
            return Plan((labelled,), epoch_of="labelled", seed=self.facts.seed)
        apart = self._sees_labels and not self.facts.one_set
        visible = Complement(All()) if apart else told if self._sees_labels else All()
        stream = Stream("unlabelled", "unlabelled", (c.view,), Shuffled(), c.batch_global, visible=visible)
        beside = max(1, c.batch_global // 8) if c.labelled_batch is None else c.labelled_batch
        streams = (stream, replace(labelled, batch_global=beside)) if apart else (stream,)
        return Plan(streams, epoch_of="unlabelled", seed=self.facts.seed)

    @property
    def _sees_labels(self) -> bool:
        return self.config.alpha < 1

    def nets(self) -> Nets[Classifier]:
        return Nets(self._classifier(self.config.encoder))

    def load_inputs(self, nets: Nets[Classifier]) -> None:
        """The input "teacher" becomes `nets.frozen`. Raises WeightsError where it is none for this student."""
        nets.frozen = self._teacher(self.inputs["teacher"].weights()).requires_grad_(False).eval()
        super().load_inputs(nets)

    def _teacher(self, weights: Weights) -> Classifier:
        check_same_input(weights, self.config.view)
        fc, first = weights.part("fc"), weights.part("first")
        if "weight" not in fc:
            raise WeightsError(f"{weights.source} has no classifier: a teacher was trained or fine-tuned on labels")
        if rows_of_classes(weights, self.facts) is None:
            raise WeightsError(f"{other_classes(weights, self.facts)}: a teacher must answer what the student is asked")
        encoder = setting_of(weights, Encoder, "encoder")
        if encoder is None:
            raise WeightsError(f"{weights.source} does not say which encoder it holds: give a run, or its export")
        teacher = self._classifier(encoder, FirstLayer.found_in(first))
        with_classes(weights, self.facts).load_whole(teacher, "online")
        return teacher

    def _classifier(self, encoder: Encoder, head: FirstLayer | None = None) -> Classifier:
        c = self.config
        return Classifier(SupervisedConfig(c.dataset, c.eval_view, encoder=encoder, head=head), self.facts)

    def rates(self, step: int, horizon: Horizon) -> tuple[float, ...]:
        c = self.config
        rate = c.rate.scaled(c.batch_global, c.scaling).at(step, horizon)
        return rate, rate

    def loss(self, nets: Nets[Classifier], batch: Batch) -> dict[str, Tensor]:
        c, parts = self.config, list(batch.parts.values())
        x = torch.cat([part.x[c.view.name] for part in parts]) if len(parts) > 1 else parts[0].x[c.view.name]
        if nets.frozen is None:
            self.load_inputs(nets)  # a dry run, which has none, says so
            assert nets.frozen is not None
        with autocast(batch.step.device, c.precision):
            student_NK = in_full(nets.online(x))
            with torch.no_grad():
                teacher_NK = in_full(nets.frozen(x))
        self._seen = student_NK.detach(), teacher_NK
        taught = distillation(student_NK, teacher_NK, temperature=c.temperature)
        total = taught * c.temperature**2 if c.times_temperature_squared else taught
        if not self._sees_labels:
            return {"total": total, "distillation": taught}
        label_N = torch.cat([part.labels.repeat(c.view.copies) for part in parts])
        told = labelled_cross_entropy(student_NK, label_N)
        return {"total": c.alpha * total + (1 - c.alpha) * told, "distillation": taught, "cross_entropy": told}

    def metrics(self, nets: Nets[Classifier], batch: Batch, truth: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """agreement: share of images of which both say the same; teacher_entropy: of what is taught, in nats, which is
        the least that distillation can come to."""
        student_NK, teacher_NK = self._seen
        agreement = (student_NK.argmax(dim=1) == teacher_NK.argmax(dim=1)).to(student_NK.dtype).mean()
        entropy = distillation(teacher_NK, teacher_NK, temperature=self.config.temperature)
        return {"agreement": agreement, "teacher_entropy": entropy}

    def embed(self, nets: Nets[Classifier], x: Tensor, tap: str) -> Tensor:
        net = nets.online
        with autocast(x.device, self.config.precision):
            return in_full(net.trunk(x) if tap == "backbone" else net(x))
