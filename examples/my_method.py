"""A method of one's own, complete: SimSiam (Chen and He, CVPR 2021, arXiv 2011.10566), with its encoder beside it.

A copy of this file anywhere can be imported by a recipe that lies beside it (`my_recipes.py`); in `fastssl/methods/` it
would be one of ours. Its network predicts one view of an image from another, and gradients stop at what is predicted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.methods.base import Artefact, Config, Epochs, Facts, Method, Nets, autocast, in_full
from fastssl.nn.encoders.encoder import Encoder
from fastssl.nn.encoders.resnet import ResNet
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.nn.norm.lockstep import LockstepSequential
from fastssl.optim.optimiser import Optimiser
from fastssl.optim.rates import Rate, WarmupCosine
from fastssl.optim.sgd import Sgd
from loaders.batch import Batch
from loaders.plan.ops import ColourJitter, Flip, GaussianBlur, Grayscale
from loaders.plan.plan import Plan
from loaders.plan.views import IMAGENET, Rrc, Shuffled, Stream, View

_OPS = (Flip(), ColourJitter(0.8, 0.4, 0.4, 0.4, 0.1), Grayscale(0.2), GaussianBlur(0.5))


def simsiam_loss(prediction_ND: Tensor, other_ND: Tensor) -> Tensor:
    """Minus the mean cosine of each row's prediction with the other view's projection, which gets no gradient: 0-dim.
    Of this rank's rows: the mean over ranks is that of the global batch."""
    return -F.cosine_similarity(prediction_ND, other_ND.detach(), dim=1).mean()


@dataclass(frozen=True)
class SimSiamConfig(Config):
    """Settings; the defaults are those of the paper's ImageNet runs."""

    encoder: Encoder = ResNet(50)
    out_features: int = 2048
    hidden_features: int = 512  # of the predictor
    view: View = View("view", 224, Rrc((0.2, 1.0)), _OPS, IMAGENET, copies=2)
    batch_global: int = 512
    optimizer: Optimiser = Sgd(weight_decay=1e-4)
    rate: Rate = WarmupCosine(0.1, Epochs(0))

    def build(self, facts: Facts, inputs: Mapping[str, Artefact]) -> Method:
        return SimSiam(self, facts, inputs)


class SimSiamNet(nn.Module):
    """Trunk, projection and predictor."""

    def __init__(self, config: SimSiamConfig, channels: int):
        super().__init__()
        self.trunk = config.encoder.build(channels)
        self.projection = _two_layers(self.trunk.num_features, config.out_features, config.out_features)
        self.predictor = _two_layers(config.out_features, config.hidden_features, config.out_features)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images [N, C, H, W] -> projections and predictions of the other view, both [N, D], in full precision."""
        z = self.projection(self.trunk(x))
        return in_full(z), in_full(self.predictor(z))


def _two_layers(inputs: int, hidden: int, outputs: int) -> nn.Module:
    return LockstepSequential(
        nn.Linear(inputs, hidden, bias=False),
        GlobalBatchNorm(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, outputs),
    )


class SimSiam(Method[SimSiamConfig, SimSiamNet]):
    """Two views that predict each other."""

    taps = ("backbone", "z")

    def plan(self) -> Plan:
        c = self.config
        stream = Stream("unlabelled", "unlabelled", (c.view,), Shuffled(), c.batch_global)
        return Plan((stream,), epoch_of="unlabelled", seed=self.facts.seed)

    def nets(self) -> Nets[SimSiamNet]:
        return Nets(SimSiamNet(self.config, self.facts.channels))

    def loss(self, nets: Nets[SimSiamNet], batch: Batch) -> dict[str, Tensor]:
        x = batch.parts["unlabelled"].x[self.config.view.name]
        with autocast(batch.step.device, self.config.precision):
            z, prediction = nets.online(x)
        (z1, z2), (p1, p2) = z.chunk(2), prediction.chunk(2)
        return {"total": (simsiam_loss(p1, z2) + simsiam_loss(p2, z1)) / 2}

    def embed(self, nets: Nets[SimSiamNet], x: Tensor, tap: str) -> Tensor:
        net = nets.online
        with autocast(x.device, self.config.precision):
            features = net.trunk(x)
            return in_full(features if tap == "backbone" else net.projection(features))
