"""PAWS's objective: consistency with soft nearest neighbours' predictions, mean-entropy maximisation, and diagnostics.

Paper: arXiv 2104.13963; code: facebookresearch/suncet at 731547d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.dist import gather_rows, gather_rows_together, mean_over_ranks, rank, world_size
from fastssl.losses.ropaws import in_domain_targets
from fastssl.losses.similarity import (
    BalancedLabels,
    DenseLabels,
    Labels,
    chunks,
    soft_nearest_neighbours,
    sum_of_soft_nearest_neighbours,
    unit_rows,
)

MIN_TARGET = 1e-4  # suncet: smaller target entries become 0, and the row is not renormalised


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
    num_global: int = 2,
) -> tuple[Tensor, Tensor]:
    """PAWS's consistency term and its mean-entropy maximisation: (cross_entropy, me_max), two 0-dim tensors.

    The objective is their sum. Each view predicts class probabilities from its similarity to the labelled supports;
    its target is the mean of the sharpened predictions of the image's *other* global views (section 3.2), for small
    crops of all of them. Target entries below MIN_TARGET become 0, as in the authors' code; the paper keeps them.

    z_ND            [(V+M)·B, D] this rank's anchors, view-major, the V = `num_global` global views first, then M small
                    crops
    z_support_SD    [S, D] this rank's supports; gathered over ranks here
    labels_SK       the supports' labels: `BalancedLabels` of all ranks, or a matrix [S, K] of this rank's rows over the
                    columns of all ranks, gathered here
    h_GD            [V·B, D'] projections of the global views, in the order of z (paired here); detached here
    h_support_SD    [S, D'] projections of the supports; detached here

    float32 or float64; under autocast the caller casts and switches autocast off. Differentiable once, in z_ND and
    z_support_SD. Every rank must call it: it gathers rows and averages over ranks. `cross_entropy` is the mean over
    this rank's anchors, `me_max` = Σ ā log ā, ā the sharpened anchor predictions (crops included) averaged over all
    ranks; averaging the parameter gradients over ranks gives exactly the gradient of the global batch.

    A class without any support has probability 0 everywhere and contributes 0 to value and gradient. Where a target
    is positive but the prediction is 0 (only an underflow of the softmax can do that), the prediction counts as the
    dtype's smallest normal number: a large, finite loss without gradient.

    Raises ValueError if the rows of z are not whole views of the images of h, the global ones among them.
    """
    supports = gather_supports(z_support_SD, h_support_SD, labels_SK)
    targets = sharpened_targets(h_GD, supports, tau=tau, sharpen_T=sharpen_T, num_global=num_global)
    terms = consistency(z_ND, targets, supports, tau=tau, sharpen_T=sharpen_T)
    return terms.cross_entropy, terms.me_max


@dataclass(frozen=True)
class Targets:
    """What the anchors of B images are drawn towards; no gradient.

    p_GK        sharpened class probabilities of the global views, view-major
    num_global  how many these are; two at least
    weight_B    how much each image's cross-entropy counts; None: all alike
    column_B    int64, the class column of an image whose label is its target (appendix D.1), -1 where it has none; None
                where no image has one
    """

    p_GK: Tensor
    num_global: int = 2
    weight_B: Tensor | None = None
    column_B: Tensor | None = None

    @property
    def num_images(self) -> int:
        return len(self.p_GK) // self.num_global

    def of_anchors(self, row_n: Tensor) -> Tensor:
        """The targets [n, K] of the anchors that are rows `row_n` of z."""
        view_n, image_n = row_n // self.num_images, row_n % self.num_images
        num_others_n = torch.where(view_n < self.num_global, self.num_global - 1, self.num_global)
        target_nK = torch.zeros_like(self.p_GK[:1])
        for view in range(self.num_global):
            share_n = torch.where(view_n == view, 0.0, 1.0 / num_others_n.to(self.p_GK.dtype))
            target_nK = target_nK + share_n[:, None] * self.p_GK[view * self.num_images + image_n]
        target_nK = torch.where(target_nK < MIN_TARGET, 0.0, target_nK)
        if self.column_B is not None:
            column_n1 = self.column_B[image_n, None]
            one_hot_nK = torch.zeros_like(target_nK).scatter_(1, column_n1.clamp_min(0), 1.0)
            target_nK = torch.where(column_n1 < 0, target_nK, one_hot_nK)
        return target_nK


def sharpened_targets(
    h_GD: Tensor, supports: Supports, *, tau: float, sharpen_T: float, num_global: int = 2
) -> Targets:
    """The global views' own predictions, sharpened. Raises ValueError where h is not two or more whole views."""
    _check_views(len(h_GD), num_global)
    with torch.no_grad():
        p_GK = soft_nearest_neighbours(h_GD, supports.h_SD, supports.labels, tau)
        return Targets(sharpen(p_GK, sharpen_T), num_global)


def _check_views(num_rows: int, num_global: int) -> None:
    if num_global < 2 or not num_rows or num_rows % num_global:
        raise ValueError(f"{num_rows} rows of h are not {num_global} whole views; two are the least")


def ropaws_targets(
    h_GD: Tensor,
    h_support_SD: Tensor,
    labels_SK: Tensor | BalancedLabels,
    *,
    tau: float = 0.1,
    prior_tau: float = 3.0,
    label_ratio: float = 5.0,
    num_global: int = 2,
) -> tuple[Tensor, Tensor]:
    """RoPAWS's class probabilities of the global views [V·B, K], before sharpening, and how likely each image is of any
    of the classes, [B]: see `fastssl.losses.ropaws`. Arguments as in `paws_loss`: this rank's rows, gathered here. No
    gradient."""
    (h_SD,) = gather_rows_together(unit_rows(h_support_SD.detach()))
    labels = labels_SK if isinstance(labels_SK, BalancedLabels) else DenseLabels(gather_rows(labels_SK.to(h_SD.dtype)))
    settings = {"tau": tau, "prior_tau": prior_tau, "label_ratio": label_ratio}
    return in_domain_targets(h_GD, h_SD, labels, num_global=num_global, **settings)


class Consistency(NamedTuple):
    """The terms of the objective, 0-dim. `entropy`, where it was asked for, is the mean entropy of the anchors'
    predictions, which are not sharpened for it (appendix D.2)."""

    cross_entropy: Tensor
    me_max: Tensor
    entropy: Tensor | None


def consistency(
    z_ND: Tensor, targets: Targets, supports: Supports, *, tau: float, sharpen_T: float, entropy: bool = False
) -> Consistency:
    """`paws_loss` towards given targets, of supports that were gathered before.

    Neither similarities nor the targets of small crops are stored: beside rows of features, memory holds the
    predictions of the global views and one chunk's similarities (see fastssl/losses/similarity.py).
    """
    images, num_anchors = targets.num_images, len(z_ND)
    if num_anchors < targets.num_global * images or num_anchors % images:
        raise ValueError(f"{num_anchors} anchors are not {targets.num_global} or more whole views of {images} images")
    row_N = torch.arange(num_anchors, device=z_ND.device)

    def sums(p_nK: Tensor, rows: slice) -> tuple[Tensor, ...]:
        """Cross-entropy, sharpened predictions and, where asked for, entropy, each summed over anchors."""
        of_each_nK = _times_log(targets.of_anchors(row_N[rows]), p_nK)
        if targets.weight_B is not None:
            of_each_nK = of_each_nK * targets.weight_B[row_N[rows] % images, None]
        found = -of_each_nK.sum(), sharpen(p_nK, sharpen_T).sum(dim=0)
        return (*found, -_times_log(p_nK, p_nK).sum()) if entropy else found

    cross_entropy, sharpened_K, *more = sum_of_soft_nearest_neighbours(z_ND, supports.z_SD, supports.labels, tau, sums)
    mean_K = mean_over_ranks(sharpened_K / num_anchors)
    me_max = _times_log(mean_K, mean_K).sum()
    return Consistency(cross_entropy / num_anchors, me_max, more[0] / num_anchors if more else None)


def _times_log(t: Tensor, p: Tensor) -> Tensor:
    """t·log p, finite with a finite gradient also at p = 0, where t = 0 gives 0 (xlogy's gradient there is NaN)."""
    return t * p.clamp_min(torch.finfo(p.dtype).tiny).log()


@torch.no_grad()
def diagnostics(
    h_GD: Tensor,
    h_support_SD: Tensor,
    labels: Labels,
    *,
    tau: float = 0.1,
    sharpen_T: float = 0.25,
    num_global: int = 2,
) -> dict[str, Tensor]:
    """How well projections tell images apart, and classes apart, and how sure the targets are: 0-dim tensors.

    instance_discrimination   SimCLR's NT-Xent of the first two global views (figure 4b, top), a mean over views: each
                              looks for the image's other one among all ranks' 2N - 1 others
    support_classification    mean -log probability of a support's own class, by soft nearest neighbours among the
                              other supports of all ranks (figure 4b, bottom); infinite if some class has only one
    target_confidence         mean largest entry of the sharpened predictions of the global views (figure 4c)

    `h_GD` is this rank's as in `paws_loss`; supports and labels are those of all ranks, as `gather_supports` returns
    them. No gradients; every rank must call it, and all get the same numbers. Figure 4a is the loss's own
    cross-entropy. The paper does not say from which layer and at which temperature these are taken: here from what
    targets are made of.
    """
    images = len(h_GD) // num_global
    view1_BD, view2_BD = unit_rows(h_GD[: 2 * images]).chunk(2)
    own_B = (view1_BD * view2_BD).sum(dim=1) / tau
    everyones_KD = torch.cat(gather_rows_together(view1_BD, view2_BD))
    among_2B = []
    for view, query_BD in enumerate((view1_BD, view2_BD)):
        logits_BK = query_BD @ everyones_KD.T / tau
        logits_BK.diagonal(offset=(view * world_size() + rank()) * images).fill_(-torch.inf)  # itself
        among_2B.append(torch.logsumexp(logits_BK, dim=1))
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


@torch.no_grad()
def label_columns(labels_B: Tensor, support_labels_S: Tensor, support_columns_S: Tensor, num_columns: int) -> Tensor:
    """int64 [B]: the column in this step's support batch, of all ranks, of each image's label; -1 where the label is
    hidden (-1) or its class not among the supports. Arguments are this rank's rows, int64."""
    class_K = torch.full((num_columns,), -1, device=labels_B.device)
    class_K = class_K.scatter_(0, support_columns_S, support_labels_S)
    class_K = gather_rows(class_K[None]).amax(dim=0)  # a class may stand on other ranks alone
    same_BK = (labels_B[:, None] == class_K) & (labels_B[:, None] >= 0)
    return torch.where(same_BK.any(dim=1), same_BK.int().argmax(dim=1), -1)


@torch.no_grad()
def p_in_auroc(p_in_B: Tensor, known_B: Tensor) -> Tensor:
    """How well p_in tells images of the labelled classes (`known_B`) from strangers: the share of pairs, one of each,
    in which it is larger for the first, over all ranks' images; 0.5 where there are only images of one kind."""
    p_in_N, known_N = gather_rows_together(p_in_B[:, None], known_B[:, None].to(p_in_B.dtype))
    larger_NN = (p_in_N > p_in_N.T).to(p_in_N.dtype) + (p_in_N == p_in_N.T).to(p_in_N.dtype) / 2
    pairs_NN = known_N * (1 - known_N).T
    num_pairs = pairs_NN.sum()
    return torch.where(num_pairs > 0, (larger_NN * pairs_NN).sum() / num_pairs.clamp_min(1), 0.5)
