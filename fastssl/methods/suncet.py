"""SuNCEt: fine-tuning on the labelled images for nearest neighbours, without a classifier.

Paper      Assran et al., "Recovering Petaflops in Contrastive Semi-Supervised Learning of Visual Representations",
           arXiv 2006.10803; as the last step of PAWS on CIFAR-10: arXiv 2104.13963, appendix C
Code       facebookresearch/suncet at 731547d, which this follows: LARS and two flipped views an image, where the PAWS
           paper says momentum SGD and no augmentation (suncet.cifar10_sgd); similarities in fp32, there in half
           precision
Command    fastssl train suncet.cifar10 --init-from RUN --data PATH
Published  CIFAR-10, 4,000 labels, soft nearest neighbours after PAWS: 96.0 +- 0.2 %

Each row of a class-balanced labelled batch predicts its class from its similarity to all other rows. The statistics of
batch norms stay those of pre-training; their weights and biases are trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastssl.dist import gather_rows, rank
from fastssl.errors import ConfigError
from fastssl.losses.similarity import unit_rows
from fastssl.methods import paws
from fastssl.methods.base import (
    Artefact,
    Config,
    Facts,
    Method,
    Nets,
    autocast,
    setting_of,
    through,
)
from fastssl.methods.supervised import check_encoder, check_same_input
from fastssl.nn.encoders.encoder import Encoder
from fastssl.nn.encoders.wide_resnet import WideResNet
from fastssl.nn.heads import Activation
from fastssl.nn.norm.running_stats import set_batch_norm_mode
from fastssl.optim.lars import Lars
from fastssl.optim.optimiser import Optimiser
from fastssl.optim.rates import Rate, WarmupCosine
from fastssl.weights.read import Weights
from fastssl.weights.tensor_files import WeightsError
from loaders.batch import Batch
from loaders.plan.ops import Flip
from loaders.plan.plan import Plan
from loaders.plan.views import CIFAR10, Balanced, Stream, View, Whole, parse_subset


def suncet_loss(z_ND: Tensor, class_N: Tensor, *, tau: float = 0.1) -> Tensor:
    """Mean over this rank's rows of -log p, 0-dim: p is the share that the row's own class has in exp(cosine / tau),
    summed over the rows of all ranks but the row itself.

    z_ND     [N, D] this rank's embeddings, any length; with gradient, also through the rows it is compared with
    class_N  int64 [N], the same numbers on all ranks

    float32 or float64. Every rank must call it, with as many rows as the others; averaging the parameter gradients over
    ranks gives the gradient of the global batch. Infinite where a row is the only one of its class.
    """
    unit_ND = unit_rows(z_ND)
    all_SD, class_S = gather_rows(unit_ND), gather_rows(class_N)
    number_S = torch.arange(len(all_SD), device=z_ND.device)
    itself_NS = (number_S[: len(z_ND)] + rank() * len(z_ND))[:, None] == number_S
    logits_NS = (unit_ND @ all_SD.T / tau).masked_fill(itself_NS, -torch.inf)
    own_class_NS = logits_NS.masked_fill(class_N[:, None] != class_S, -torch.inf)
    return (torch.logsumexp(logits_NS, dim=1) - torch.logsumexp(own_class_NS, dim=1)).mean()


@dataclass(frozen=True)
class SuncetConfig(Config):
    """SuNCEt's settings; the defaults are PAWS's for CIFAR-10. An epoch is a pass over the labelled images."""

    view: View = View("labelled", 32, Whole(), (Flip(),), CIFAR10, copies=2)
    encoder: Encoder = WideResNet(28, 2)
    out_features: int = 128
    prediction: bool = False  # a prediction head after the projection head, as the PAWS run has it
    hidden_features: int | None = None  # of both heads, as the PAWS run has them, like their activation
    activation: Activation = "relu"
    classes_global: int = 10
    images_per_class: int = 64
    tau: float = 0.1
    optimizer: Optimiser = Lars("paws", "authors")
    rate: Rate = WarmupCosine(0.1, final=0.01)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau <= 0:
            raise ConfigError(f"tau {self.tau}: a temperature, above zero")
        if self.images_per_class * self.view.copies < 2:
            raise ConfigError("images_per_class is 1, but a row needs another one of its class")

    def for_classes(self, num_classes: int) -> SuncetConfig:
        return replace(self, classes_global=min(self.classes_global, num_classes))

    def build(self, facts: Facts, inputs: Mapping[str, Artefact]) -> Suncet:
        return Suncet(self, facts, inputs)


class Suncet(Method[SuncetConfig, paws.PawsNet]):
    """Classifying labelled images by the others, with PAWS's network."""

    taps = ("backbone", "h", "z")

    def plan(self) -> Plan:
        c = self.config
        order = Balanced(c.classes_global, c.images_per_class)
        batch_global, ids = c.classes_global * c.images_per_class, parse_subset(c.labels)
        stream = Stream("labelled", "labelled", (c.view,), order, batch_global, ids=ids)
        return Plan((stream,), epoch_of="labelled", seed=self.facts.seed)

    def nets(self) -> Nets[paws.PawsNet]:
        c = self.config
        shape = paws.PawsConfig(
            c.dataset, c.eval_view, encoder=c.encoder, out_features=c.out_features, prediction=c.prediction,
            hidden_features=c.hidden_features, activation=c.activation,
        )  # fmt: skip
        online = paws.PawsNet(shape, self.facts.channels)
        set_batch_norm_mode(online, "frozen")
        return Nets(online)

    def start_from(self, nets: Nets[paws.PawsNet], weights: Weights) -> None:
        """From a run of PAWS, whole. Raises WeightsError where it does not fit; then nothing is loaded."""
        check_same_input(weights, self.config.eval_view)
        check_encoder(weights, self.config.encoder)
        theirs = setting_of(weights, str, "activation")
        if theirs is not None and theirs != self.config.activation:  # which has no tensor that would not fit
            raise WeightsError(
                f"{weights.source} has {theirs} in its heads: --set activation={theirs} would take it; nothing loaded"
            )
        weights.load_whole(nets.online, "online")

    def loss(self, nets: Nets[paws.PawsNet], batch: Batch) -> dict[str, Tensor]:
        part, c = batch.parts["labelled"], self.config
        assert part.columns is not None
        with autocast(batch.step.device, c.precision):
            _, (z_ND,) = nets.online([part.x[c.view.name]])
        return {"total": suncet_loss(z_ND, part.columns.repeat(c.view.copies), tau=c.tau)}

    def embed(self, nets: Nets[paws.PawsNet], x: Tensor, tap: str) -> Tensor:
        net = nets.online
        layers = (net.trunk, net.projection, net.prediction)
        return through(layers[: 1 + self.taps.index(tap)], x, self.config.precision)
