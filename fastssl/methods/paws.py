"""PAWS: semi-supervised learning by predicting view assignments with support samples.

Paper      Assran et al., ICCV 2021, arXiv 2104.13963
Code       facebookresearch/suncet at 731547d, whose behaviour the published numbers came from; where paper and code
           differ, this follows the code and says so, but for its bugs
Command    fastssl train paws.rn50_100ep --data PATH --gpus 64
Published  ResNet-50, 100 / 200 / 300 epochs, fine-tuned: 63.8 / 66.1 / 66.5 % with 1 % of the labels,
           73.9 / 75.0 / 75.5 % with 10 %
Hours      8.5 a hundred epochs on 64 V100 (figure 1; 8.2 in section 6); 200 epochs 17; twice as wide, 100 epochs, 12

An image's views predict class probabilities from their similarity to a class-balanced batch of labelled images; each
view is trained towards the sharpened prediction of another view.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastssl.dist import mean_over_ranks, world_size
from fastssl.errors import ConfigError
from fastssl.losses.paws import (
    Supports,
    Targets,
    consistency,
    diagnostics,
    gather_supports,
    label_columns,
    p_in_auroc,
    sharpen,
    sharpened_targets,
)
from fastssl.losses.paws import paws_loss as paws_loss
from fastssl.losses.paws import ropaws_targets as ropaws_targets
from fastssl.losses.ropaws import in_domain_targets
from fastssl.losses.similarity import (
    BalancedLabels,
)
from fastssl.methods.base import (
    Artefact,
    Config,
    Epochs,
    Facts,
    Method,
    Nets,
    autocast,
    in_full,
    through,
)
from fastssl.nn.encoders.encoder import Encoder
from fastssl.nn.encoders.resnet import ResNet
from fastssl.nn.heads import Activation, prediction_head, projection_head
from fastssl.nn.norm.lockstep import LockstepSequential
from fastssl.optim.lars import Lars
from fastssl.optim.optimiser import Optimiser
from fastssl.optim.rates import Rate, WarmupCosine
from loaders.batch import Batch
from loaders.plan.ops import ColourJitter, Flip, GaussianBlur, Grayscale
from loaders.plan.plan import Plan
from loaders.plan.views import (
    IMAGENET,
    All,
    Balanced,
    Rrc,
    Shuffled,
    Stream,
    View,
    parse_subset,
)

# Colour strength 1.0 of the authors' ImageNet runs.
_IMAGENET_OPS = (Flip(), ColourJitter(0.8, 0.8, 0.8, 0.8, 0.2), Grayscale(0.2), GaussianBlur(0.5))
GLOBAL_VIEW = View("global", 224, Rrc((0.14, 1.0)), _IMAGENET_OPS, IMAGENET, copies=2)
SMALL_VIEW = View("small", 96, Rrc((0.05, 0.14)), _IMAGENET_OPS, IMAGENET, copies=6)


@dataclass(frozen=True)
class Ropaws:
    """RoPAWS's targets; the defaults are those of its authors' released code."""

    prior_tau: float = 3.0
    label_ratio: float = 5.0
    prior_pow: float = 1.0  # of p_in, by which an image's cross-entropy counts

    def __post_init__(self) -> None:
        if self.prior_tau <= 0 or self.label_ratio <= 0:
            raise ConfigError(f"prior_tau {self.prior_tau} and label_ratio {self.label_ratio} must be above zero")


@dataclass(frozen=True)
class PawsConfig(Config):
    """PAWS's settings; the defaults are those of the paper's ImageNet runs."""

    encoder: Encoder = ResNet(50)
    out_features: int = 2048
    prediction: bool = True  # a prediction head after the projection head
    hidden_features: int | None = None  # of both heads; None: as many as the trunk's, and a quarter of out_features
    activation: Activation = "relu"  # of both heads
    global_view: View = GLOBAL_VIEW
    small_view: View | None = (
        SMALL_VIEW  # without it the code crops global views from .08 on: global_view.crop.area=.08,1
    )
    batch_global: int = 4096
    classes_global: int = 960  # 15 a GPU on 64 GPUs; keep it near 960 on fewer (suncet#11)
    images_per_class: int = 7
    support_views: int = 1
    label_smoothing: float = 0.1
    tau: float = 0.1  # paper, section 5
    sharpen_T: float = 0.25  # paper, section 5
    me_max: float = 1.0  # weight of that term; the paper's table 6 has it at 0
    entropy: float = 0.0  # weight of the predictions' mean entropy, minimised: appendix D.2, where no weight is given
    label_targets: bool = False  # an image with a label in sight has that for its target: appendix D.1
    ropaws: Ropaws | None = None
    # The published numbers come from the code, which adapts the shortcuts' norms too.
    optimizer: Optimiser = Lars("paws", "authors", weight_decay=1e-6)
    rate: Rate = WarmupCosine(6.4, Epochs(10), start=0.3, final=0.064)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau <= 0 or self.sharpen_T <= 0:
            raise ConfigError(f"tau {self.tau} and sharpen_T {self.sharpen_T}: both are temperatures, above zero")
        if self.global_view.copies < 2:
            raise ConfigError("global_view.copies is 1, but a view's target are the image's other global views")
        if not 0 <= self.label_smoothing <= 1:
            raise ConfigError(f"label_smoothing {self.label_smoothing}: a share between 0 and 1")

    def for_classes(self, num_classes: int) -> PawsConfig:
        return replace(self, classes_global=min(self.classes_global, num_classes))

    def build(self, facts: Facts, inputs: Mapping[str, Artefact]) -> Paws:
        return Paws(self, facts, inputs)


class PawsNet(nn.Module):
    """Trunk, projection head and prediction head."""

    def __init__(self, config: PawsConfig, channels: int):
        super().__init__()
        self.trunk = config.encoder.build(channels)
        form = config.hidden_features, config.activation
        self.projection = projection_head(self.trunk.num_features, config.out_features, *form)
        self.prediction = prediction_head(config.out_features, *form) if config.prediction else LockstepSequential()

    def forward(self, resolutions: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Images of each resolution -> h and z of each, [N, out_features] in full precision. Resolutions go through in
        lockstep, each with batch statistics of its own; the last one weighs most in the running statistics."""
        h = self.projection.lockstep(self.trunk.lockstep(resolutions))
        z = self.prediction.lockstep(h)
        return [in_full(each) for each in h], [in_full(each) for each in z]


class Paws(Method[PawsConfig, PawsNet]):
    """Predicting view assignments with support samples."""

    taps = ("backbone", "h", "z")

    def __init__(self, config: PawsConfig, facts: Facts, inputs: Mapping[str, Artefact]):
        super().__init__(config, facts, inputs)
        if config.label_targets and not facts.one_set:
            raise ConfigError(
                "label_targets needs images in both roles, labelled and unlabelled: give them as one set, --data PATH"
            )

    def plan(self) -> Plan:
        c = self.config
        views = (c.global_view,) if c.small_view is None else (c.global_view, c.small_view)
        support_view = replace(c.global_view, name="support", copies=c.support_views)
        visible = parse_subset(c.labels) if c.label_targets else All()
        return Plan(
            streams=(
                Stream("unlabelled", "unlabelled", views, Shuffled(), c.batch_global, visible=visible),
                Stream(
                    "support",
                    "labelled",
                    (support_view,),
                    Balanced(c.classes_global, c.images_per_class),
                    c.classes_global * c.images_per_class,
                    ids=parse_subset(c.labels),
                ),
            ),
            epoch_of="unlabelled",
            seed=self.facts.seed,
        )

    def nets(self) -> Nets[PawsNet]:
        return Nets(PawsNet(self.config, self.facts.channels))

    def loss(self, nets: Nets[PawsNet], batch: Batch) -> dict[str, Tensor]:
        c, unlabelled, support = self.config, batch.parts["unlabelled"].x, batch.parts["support"]
        resolutions = [torch.cat([support.x["support"], unlabelled["global"]])]
        if c.small_view is not None:
            resolutions.append(unlabelled["small"])
        with autocast(batch.step.device, c.precision):
            h, z = nets.online(resolutions)
        num_support = len(support.x["support"])
        labels = BalancedLabels(
            c.classes_global, c.images_per_class, c.support_views, world_size(), smoothing=c.label_smoothing
        )
        # What half-precision networks computed loses little in bfloat16, and travels in half the time.
        dtype = None if c.precision == "fp32" else torch.bfloat16
        supports = gather_supports(z[0][:num_support], h[0][:num_support], labels, dtype)
        z_ND, h_GD = torch.cat([z[0][num_support:], *z[1:]]), h[0][num_support:]
        targets = self._targets(h_GD, supports, batch)
        terms = consistency(z_ND, targets, supports, tau=c.tau, sharpen_T=c.sharpen_T, entropy=c.entropy > 0)
        self._seen = h_GD.detach(), supports.h_SD, labels
        parts = {"cross_entropy": terms.cross_entropy, "me_max": terms.me_max}
        total = terms.cross_entropy + c.me_max * terms.me_max
        if terms.entropy is not None:
            total, parts = total + c.entropy * terms.entropy, parts | {"entropy": terms.entropy}
        return {"total": total, **parts}

    def _targets(self, h_GD: Tensor, supports: Supports, batch: Batch) -> Targets:
        """Of the global views, as the configuration has them."""
        c, num_global = self.config, self.config.global_view.copies
        self._p_in_B = None
        if c.ropaws is None:
            targets = sharpened_targets(h_GD, supports, tau=c.tau, sharpen_T=c.sharpen_T, num_global=num_global)
        else:
            r, settings = c.ropaws, {"prior_tau": c.ropaws.prior_tau, "label_ratio": c.ropaws.label_ratio}
            p_GK, self._p_in_B = in_domain_targets(
                h_GD.detach(), supports.h_SD, supports.labels, tau=c.tau, num_global=num_global, **settings
            )
            targets = Targets(sharpen(p_GK, c.sharpen_T), num_global, self._p_in_B.pow(r.prior_pow))
        if c.label_targets:
            seen, support = batch.parts["unlabelled"].labels, batch.parts["support"]
            assert support.columns is not None
            column_B = label_columns(seen, support.labels, support.columns, c.classes_global)
            targets = replace(targets, column_B=column_B)
        return targets

    def metrics(self, nets: Nets[PawsNet], batch: Batch, truth: Mapping[str, Tensor]) -> dict[str, Tensor]:
        c = self.config
        found = diagnostics(*self._seen, tau=c.tau, sharpen_T=c.sharpen_T, num_global=c.global_view.copies)
        if self._p_in_B is not None:
            found["p_in"] = mean_over_ranks(self._p_in_B.mean())
            found["p_in_auroc"] = p_in_auroc(self._p_in_B, truth["unlabelled"] >= 0)
        return found

    def embed(self, nets: Nets[PawsNet], x: Tensor, tap: str) -> Tensor:
        net = nets.online
        layers = (net.trunk, net.projection, net.prediction)
        return through(layers[: 1 + self.taps.index(tap)], x, self.config.precision)
