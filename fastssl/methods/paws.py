"""PAWS: semi-supervised learning by predicting view assignments with support samples.

Paper      Assran et al., ICCV 2021, arXiv 2104.13963
Code       facebookresearch/suncet at 731547d, whose behaviour the published numbers came from; where paper and code
           differ, this follows the code and says so, but for its bugs
Command    fastssl train paws.rn50_100ep --data PATH --gpus 64
Published  ResNet-50, 100 / 200 / 300 epochs, fine-tuned: 63.8 / 66.1 / 66.5 % with 1 % of the labels,
           73.9 / 75.0 / 75.5 % with 10 %; CIFAR-10, 4,000 labels, soft nearest neighbours: 96.0 +- 0.2 %
Hours      8.5 a hundred epochs on 64 V100 (the authors')

An image's views predict class probabilities from their similarity to a class-balanced batch of labelled images; each
view is trained towards the sharpened prediction of another view.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastssl.dist import gather_rows, gather_rows_together, mean_over_ranks, rank, world_size
from fastssl.errors import ConfigError
from fastssl.losses.similarity import (
    BalancedLabels,
    DenseLabels,
    Labels,
    chunks,
    soft_nearest_neighbours,
    sum_of_soft_nearest_neighbours,
    unit_rows,
)
from fastssl.methods.base import (
    Artefact,
    Config,
    Epochs,
    Facts,
    Horizon,
    Method,
    Nets,
    Span,
    autocast,
    in_full,
    through,
)
from fastssl.nn.encoders import Encoder, ResNet
from fastssl.nn.heads import prediction_head, projection_head
from fastssl.nn.norm.lockstep import LockstepSequential
from fastssl.optim.lars import Lars
from fastssl.optim.param_groups import Rule, lars_groups
from loaders.batch import Batch
from loaders.plan.ops import ColourJitter, Flip, GaussianBlur, Grayscale
from loaders.plan.plan import Plan
from loaders.plan.views import (
    IMAGENET,
    Balanced,
    Rrc,
    Shuffled,
    Stream,
    View,
    parse_subset,
)

MIN_TARGET = 1e-4  # suncet: smaller target entries become 0, and the row is not renormalised

# Colour strength 1.0 of the authors' ImageNet runs.
_IMAGENET_OPS = (Flip(), ColourJitter(0.8, 0.8, 0.8, 0.8, 0.2), Grayscale(0.2), GaussianBlur(0.5))
GLOBAL_VIEW = View("global", 224, Rrc((0.14, 1.0)), _IMAGENET_OPS, IMAGENET, copies=2)
SMALL_VIEW = View("small", 96, Rrc((0.05, 0.14)), _IMAGENET_OPS, IMAGENET, copies=6)


def sharpen(p_NK: Tensor, temperature: float) -> Tensor:
    """Rows raised to the power 1/temperature and rescaled to sum 1."""
    powers_NK = p_NK.pow(1.0 / temperature)
    return powers_NK / powers_NK.sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class Supports:
    """The labelled rows of all ranks, L2-normalised, in rank order: z_SD with gradient, h_SD without, their labels."""

    z_SD: Tensor
    h_SD: Tensor
    labels: Labels


def gather_supports(
    z_support_SD: Tensor, h_support_SD: Tensor, labels_SK: Tensor | BalancedLabels, dtype: torch.dtype | None = None
) -> Supports:
    """This rank's supports -> those of all ranks. Arguments as in `paws_loss`; every rank must call it.

    One message carries z and h, and one in backward the gradient of z, both in `dtype`. With S supports on W ranks
    together, a rank receives 3·S·D·(W-1)/W numbers a step: in bfloat16 81 MB for 6,720 x 2,048 on 64 ranks, where the
    authors' two float32 gathers and all-reduced gradient take 218 MB. BalancedLabels do not travel.
    """
    z_SD, h_SD = gather_rows_together(unit_rows(z_support_SD), unit_rows(h_support_SD.detach()), dtype=dtype)
    if isinstance(labels_SK, BalancedLabels):
        return Supports(z_SD, h_SD, labels_SK)
    return Supports(z_SD, h_SD, DenseLabels(gather_rows(labels_SK.to(z_SD.dtype))))


def paws_loss(
    z_ND: Tensor,
    z_support_SD: Tensor,
    labels_SK: Tensor | BalancedLabels,
    h_GD: Tensor,
    h_support_SD: Tensor,
    *,
    tau: float = 0.1,  # PAWS paper, section 5
    sharpen_T: float = 0.25,  # PAWS paper, section 5
) -> tuple[Tensor, Tensor]:
    """PAWS's consistency term and its mean-entropy maximisation: (cross_entropy, me_max), two 0-dim tensors.

    The objective is their sum. Each view predicts class probabilities from its similarity to the labelled supports;
    its target is the sharpened prediction of the image's *other* global view, or for small crops the mean of both.

    z_ND            [(2+M)·B, D] this rank's anchors, view-major, the two global views first, then M small crops
    z_support_SD    [S, D] this rank's supports; gathered over ranks here
    labels_SK       the supports' labels: `BalancedLabels` of all ranks, or a matrix [S, K] of this rank's rows over the
                    columns of all ranks, gathered here
    h_GD            [2·B, D'] projections of the two global views, in the order of z (swapped here); detached here
    h_support_SD    [S, D'] projections of the supports; detached here

    float32 or float64; under autocast the caller casts and switches autocast off. Differentiable once, in z_ND and
    z_support_SD. Every rank must call it: it gathers rows and averages over ranks. `cross_entropy` is the mean over
    this rank's anchors, `me_max` = Σ ā log ā, ā the sharpened anchor predictions (crops included) averaged over all
    ranks; averaging the parameter gradients over ranks gives exactly the gradient of the global batch.

    A class without any support has probability 0 everywhere and contributes 0 to value and gradient. Where a target
    is positive but the prediction is 0 (only an underflow of the softmax can do that), the prediction counts as the
    dtype's smallest normal number: a large, finite loss without gradient.

    Raises ValueError if the rows of z are not two or more whole views of the images of h.
    """
    supports = gather_supports(z_support_SD, h_support_SD, labels_SK)
    return consistency(z_ND, h_GD, supports, tau=tau, sharpen_T=sharpen_T)


def consistency(
    z_ND: Tensor, h_GD: Tensor, supports: Supports, *, tau: float, sharpen_T: float
) -> tuple[Tensor, Tensor]:
    """`paws_loss` of supports that were gathered before.

    Neither similarities nor the targets of small crops are stored: beside rows of features, memory holds the
    predictions of the global views and one chunk's similarities (see fastssl/losses/similarity.py).
    """
    images, num_anchors = len(h_GD) // 2, len(z_ND)
    if len(h_GD) % 2 or not images or num_anchors < 2 * images or num_anchors % images:
        raise ValueError(f"{num_anchors} anchors are not two or more whole views of the {len(h_GD)}/2 images of h")
    with torch.no_grad():
        target_GK = sharpen(soft_nearest_neighbours(h_GD, supports.h_SD, supports.labels, tau), sharpen_T)
    # An anchor's target is the mean of two rows: those of both global views for a small crop, for a global view twice
    # that of the other one.
    row_N = torch.arange(num_anchors, device=z_ND.device)
    image_N = row_N % images
    first_N = torch.where(row_N < images, image_N + images, image_N)
    second_N = torch.where(row_N // images == 1, image_N, image_N + images)

    def sums(p_nK: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Cross-entropy and sharpened predictions, each summed over anchors."""
        target_nK = (target_GK[first_N[rows]] + target_GK[second_N[rows]]) / 2
        target_nK = torch.where(target_nK < MIN_TARGET, 0.0, target_nK)
        return -_times_log(target_nK, p_nK).sum(), sharpen(p_nK, sharpen_T).sum(dim=0)

    cross_entropy, sharpened_K = sum_of_soft_nearest_neighbours(z_ND, supports.z_SD, supports.labels, tau, sums)
    mean_K = mean_over_ranks(sharpened_K / num_anchors)
    return cross_entropy / num_anchors, _times_log(mean_K, mean_K).sum()


def _times_log(t: Tensor, p: Tensor) -> Tensor:
    """t·log p, finite with a finite gradient also at p = 0, where t = 0 gives 0 (xlogy's gradient there is NaN)."""
    return t * p.clamp_min(torch.finfo(p.dtype).tiny).log()


@torch.no_grad()
def diagnostics(
    h_GD: Tensor, h_support_SD: Tensor, labels: Labels, *, tau: float = 0.1, sharpen_T: float = 0.25
) -> dict[str, Tensor]:
    """How well projections tell images apart, and classes apart, and how sure the targets are: 0-dim tensors.

    instance_discrimination   mean cross-entropy of finding an image's other global view among those of all ranks, by
                              softmax over cosine / tau, in both directions
    support_classification    mean -log probability of a support's own class, by soft nearest neighbours among the
                              other supports of all ranks; infinite if some class has only one
    target_confidence         mean largest entry of the sharpened targets of the global views

    `h_GD` is this rank's as in `paws_loss`; supports and labels are those of all ranks, as `gather_supports` returns
    them. No gradients; every rank must call it, and all get the same numbers. All three are defined here, on the
    quantities the loss is made of; they are not taken from a published definition.
    """
    view1_BD, view2_BD = unit_rows(h_GD).chunk(2)
    own_B = (view1_BD * view2_BD).sum(dim=1) / tau
    all_view1_BD, all_view2_BD = gather_rows_together(view1_BD, view2_BD)
    among_2B = [
        torch.logsumexp(query_BD @ key_BD.T / tau, dim=1)
        for query_BD, key_BD in ((view1_BD, all_view2_BD), (view2_BD, all_view1_BD))
    ]
    instance = (torch.cat(among_2B) - own_B.repeat(2)).mean()

    class_S = labels.columns(h_GD.device)
    num_own = len(h_support_SD) // world_size()
    support_s = []
    for rows in chunks(num_own, len(h_support_SD)):
        own = slice(rank() * num_own + rows.start, rank() * num_own + rows.stop)
        logits_sS = h_support_SD[own] @ h_support_SD.T / tau
        logits_sS.diagonal(offset=own.start).fill_(-torch.inf)
        other_class_sS = class_S[own, None] != class_S
        among_all_s = torch.logsumexp(logits_sS, dim=1)
        support_s.append(among_all_s - torch.logsumexp(logits_sS.masked_fill_(other_class_sS, -torch.inf), dim=1))

    target_GK = sharpen(soft_nearest_neighbours(h_GD, h_support_SD, labels, tau), sharpen_T)
    return {
        "instance_discrimination": mean_over_ranks(instance),
        "support_classification": mean_over_ranks(torch.cat(support_s).mean()),
        "target_confidence": mean_over_ranks(target_GK.amax(dim=1).mean()),
    }


@dataclass(frozen=True)
class PawsConfig(Config):
    """PAWS's settings; the defaults are those of the paper's ImageNet runs."""

    encoder: Encoder = ResNet(50)
    out_features: int = 2048
    prediction: bool = True  # a prediction head after the projection head
    global_view: View = GLOBAL_VIEW
    small_view: View | None = SMALL_VIEW
    batch_global: int = 4096
    classes_global: int = 960  # 15 a GPU on 64 GPUs; keep it near 960 on fewer (suncet#11)
    images_per_class: int = 7
    support_views: int = 1
    label_smoothing: float = 0.1
    tau: float = 0.1  # paper, section 5
    sharpen_T: float = 0.25  # paper, section 5
    lr_start: float = 0.3
    lr_peak: float = 6.4
    lr_final: float = 0.064
    warmup: Span = Epochs(10)
    weight_decay: float = 1e-6
    lars_rule: Rule = "authors"  # the published numbers come from the code, which adapts the shortcuts' norms too

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau <= 0 or self.sharpen_T <= 0:
            raise ConfigError(f"tau {self.tau} and sharpen_T {self.sharpen_T}: both are temperatures, above zero")
        if not 0 <= self.label_smoothing <= 1:
            raise ConfigError(f"label_smoothing {self.label_smoothing}: a share between 0 and 1")

    def build(self, facts: Facts, inputs: Mapping[str, Artefact]) -> Method:
        return Paws(self, facts, inputs)


class PawsNet(nn.Module):
    """Trunk, projection head and prediction head."""

    def __init__(self, config: PawsConfig, channels: int):
        super().__init__()
        self.trunk = config.encoder.build(channels)
        self.projection = projection_head(self.trunk.num_features, config.out_features)
        self.prediction = prediction_head(config.out_features) if config.prediction else LockstepSequential()

    def forward(self, resolutions: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Images of each resolution -> h and z of each, [N, out_features] in full precision. Resolutions go through in
        lockstep, each with batch statistics of its own; the last one weighs most in the running statistics."""
        h = self.projection.lockstep(self.trunk.lockstep(resolutions))
        z = self.prediction.lockstep(h)
        return [in_full(each) for each in h], [in_full(each) for each in z]


class Paws(Method[PawsConfig, PawsNet]):
    """Predicting view assignments with support samples."""

    taps = ("backbone", "h", "z")

    def plan(self) -> Plan:
        c = self.config
        views = (c.global_view,) if c.small_view is None else (c.global_view, c.small_view)
        support_view = replace(c.global_view, name="support", copies=c.support_views)
        return Plan(
            streams=(
                Stream("unlabelled", "unlabelled", views, Shuffled(), c.batch_global),
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

    def optimizer(self, nets: Nets[PawsNet]) -> Lars:
        c = self.config
        return Lars(lars_groups(nets.online, c.lars_rule), lr=c.lr_start, weight_decay=c.weight_decay)

    def rates(self, step: int, horizon: Horizon) -> tuple[float, ...]:
        c = self.config
        rate = horizon.warmup_cosine(step, start=c.lr_start, peak=c.lr_peak, final=c.lr_final, warmup=c.warmup)
        return rate, rate

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
        cross_entropy, me_max = consistency(z_ND, h_GD, supports, tau=c.tau, sharpen_T=c.sharpen_T)
        self._seen = h_GD.detach(), supports.h_SD, labels
        return {"total": cross_entropy + me_max, "cross_entropy": cross_entropy, "me_max": me_max}

    def metrics(self, nets: Nets[PawsNet], batch: Batch, truth: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return diagnostics(*self._seen, tau=self.config.tau, sharpen_T=self.config.sharpen_T)

    def embed(self, nets: Nets[PawsNet], x: Tensor, tap: str) -> Tensor:
        net = nets.online
        layers = (net.trunk, net.projection, net.prediction)
        return through(layers[: 1 + self.taps.index(tap)], x, self.config.precision)
