"""Distillation of features: a student learns to give, behind a linear map, the features that a teacher gives of the
same images. The teacher needs no classifier and no labels: a run of any method here, or a file of weights of others.

Paper      Romero et al., ICLR 2015, arXiv 1412.6550, of which this is the form without intermediate layers
Command    fastssl train distil_features.cifar10_small --set teacher=RUN --data PATH
Published  nothing with these settings

The teacher stays as it is, in eval mode, and sees the student's crops normalised as its own makers did. The map is
trained along, and left behind: what is evaluated and exported is the student's trunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastssl.errors import ConfigError
from fastssl.methods.base import (
    Artefact,
    Config,
    Facts,
    Method,
    Nets,
    autocast,
    in_full,
    setting_of,
    through,
)
from fastssl.nn.encoders.encoder import Encoder
from fastssl.nn.encoders.resnet import ResNet
from fastssl.nn.trunks.trunk import Trunk
from fastssl.optim.optimiser import Optimiser
from fastssl.optim.rates import Rate, WarmupCosine
from fastssl.optim.sgd import Sgd
from fastssl.weights.read import Weights, load_whole
from fastssl.weights.tensor_files import WeightsError
from loaders.batch import Batch
from loaders.plan.ops import Flip
from loaders.plan.plan import Plan
from loaders.plan.views import IMAGENET, Pixels, Rrc, Shuffled, Stream, View

Measure = Literal["cosine", "mse"]
VIEW = View("student", 224, Rrc((0.08, 1.0)), (Flip(),), IMAGENET)


def feature_distance(student_ND: Tensor, teacher_ND: Tensor, measure: Measure) -> Tensor:
    """Mean over rows of 1 - cosine, or of the mean squared difference: 0-dim, float32 or float64. No gradient reaches
    the teacher's."""
    taught_ND = teacher_ND.detach()
    if measure == "cosine":
        return 1 - F.cosine_similarity(student_ND, taught_ND, dim=1).mean()
    return F.mse_loss(student_ND, taught_ND)


@dataclass(frozen=True)
class DistilFeaturesConfig(Config):
    """Settings of the student's training, which sees no label."""

    view: View = VIEW
    encoder: Encoder = ResNet(18)
    teacher_encoder: Encoder = ResNet(50)  # what the teacher's weights are of
    teacher_pixels: Pixels | None = None  # as its images were normalised; None: as it says itself
    measure: Measure = "cosine"
    batch_global: int = 256
    optimizer: Optimiser = Sgd(nesterov=True, weight_decay=1e-4)
    rate: Rate = WarmupCosine(0.1)

    def build(self, facts: Facts, inputs: Mapping[str, Artefact]) -> DistilFeatures:
        return DistilFeatures(self, facts, inputs)


class Student(nn.Module):
    """Trunk, and the linear map to the teacher's features."""

    def __init__(self, config: DistilFeaturesConfig, channels: int):
        super().__init__()
        self.trunk = config.encoder.build(channels)
        self.map = nn.Linear(self.trunk.num_features, config.teacher_encoder.num_features(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] -> the teacher's features as the student has them, [N, D]."""
        features: Tensor = self.map(self.trunk(x))
        return features


class Teacher(nn.Module):
    """A trunk that is given pixels normalised as a student's."""

    scale_C11: Tensor
    shift_C11: Tensor

    def __init__(self, trunk: Trunk, own: Pixels, students: Pixels):
        super().__init__()
        self.trunk = trunk
        mean, std, own_mean, own_std = (
            torch.tensor(each).view(-1, 1, 1) for each in (students.mean, students.std, own.mean, own.std)
        )
        self.register_buffer("scale_C11", std / own_std)
        self.register_buffer("shift_C11", (mean - own_mean) / own_std)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.trunk(x * self.scale_C11 + self.shift_C11)
        return features


class DistilFeatures(Method[DistilFeaturesConfig, Student]):
    """Learning a teacher's features."""

    taps = ("backbone", "mapped")

    def __init__(self, config: DistilFeaturesConfig, facts: Facts, inputs: Mapping[str, Artefact]):
        super().__init__(config, facts, inputs)
        if why := config.teacher_encoder.refused_size(config.view.size):
            raise ConfigError(
                f"view.size is {config.view.size}, which {config.teacher_encoder.name} does not take: {why}"
            )

    def plan(self) -> Plan:
        c = self.config
        stream = Stream("unlabelled", "unlabelled", (c.view,), Shuffled(), c.batch_global)
        return Plan((stream,), epoch_of="unlabelled", seed=self.facts.seed)

    def nets(self) -> Nets[Student]:
        return Nets(Student(self.config, self.facts.channels))

    def load_inputs(self, nets: Nets[Student]) -> None:
        """The input "teacher" becomes `nets.frozen`. Raises WeightsError where it is none of `teacher_encoder`."""
        nets.frozen = self._teacher(self.inputs["teacher"].weights()).requires_grad_(False).eval()
        super().load_inputs(nets)

    def _teacher(self, weights: Weights) -> Teacher:
        c = self.config
        theirs = setting_of(weights, Encoder, "encoder")
        if theirs is not None and theirs != c.teacher_encoder:
            raise WeightsError(
                f"{weights.source} is of {theirs.name}, not of {c.teacher_encoder.name}: set teacher_encoder to that"
            )
        pixels = c.teacher_pixels or setting_of(weights, Pixels, "eval_view", "pixels")
        if pixels is None:
            raise WeightsError(
                f"{weights.source} does not say how its images were normalised: --set 'teacher_pixels=pixels((0.485,"
                "0.456,0.406),(0.229,0.224,0.225))' says that they were as ImageNet's usually are"
            )
        trunk = c.teacher_encoder.build(self.facts.channels)
        load_whole(trunk, weights.part("trunk"), weights.source)
        return Teacher(trunk, pixels, c.view.pixels)

    def loss(self, nets: Nets[Student], batch: Batch) -> dict[str, Tensor]:
        c, x = self.config, batch.parts["unlabelled"].x[self.config.view.name]
        if nets.frozen is None:
            self.load_inputs(nets)  # a dry run, which has none, says so
            assert nets.frozen is not None
        with autocast(batch.step.device, c.precision):
            student_ND = in_full(nets.online(x))
            with torch.no_grad():
                teacher_ND = in_full(nets.frozen(x))
        return {"total": feature_distance(student_ND, teacher_ND, c.measure)}

    def embed(self, nets: Nets[Student], x: Tensor, tap: str) -> Tensor:
        layers = (nets.online.trunk, nets.online.map)
        return through(layers[: 1 + self.taps.index(tap)], x, self.config.precision)
