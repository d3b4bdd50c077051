"""PAWS's loss as pure functions of tensors, its label matrix, and what to watch while it trains.

Source: Assran et al. 2021, arXiv 2104.13963, and the authors' code (facebookresearch/suncet at 731547d), whose
behaviour the published numbers came from; where the two differ, this follows the code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.dist import gather_rows, mean_over_ranks

MIN_TARGET = 1e-4  # suncet: smaller target entries become 0, and the row is not renormalised


def label_matrix(columns_S: Tensor, num_columns: int, smoothing: float) -> Tensor:
    """Smoothed one-hot rows, float32 [S, K]: 1 - smoothing + smoothing/K at a row's column, smoothing/K elsewhere.

    `columns_S` is int64 [S]: the global class column of each support row, a position in the step's set of classes and
    not a class of the data set. Rows sum to 1.
    """
    off = smoothing / num_columns
    labels_SK = torch.full((len(columns_S), num_columns), off, dtype=torch.float32, device=columns_S.device)
    return labels_SK.scatter_(1, columns_S[:, None], 1.0 - smoothing + off)


def soft_nearest_neighbours(query_ND: Tensor, support_SD: Tensor, labels_SK: Tensor, tau: float) -> Tensor:
    """Class probabilities [N, K] of unit queries: a softmax over cosines / tau to unit supports, applied to labels."""
    return torch.softmax(query_ND @ support_SD.T / tau, dim=1) @ labels_SK


def sharpen(p_NK: Tensor, temperature: float) -> Tensor:
    """Rows raised to the power 1/temperature and rescaled to sum 1."""
    powers_NK = p_NK.pow(1.0 / temperature)
    return powers_NK / powers_NK.sum(dim=1, keepdim=True)


def paws_loss(
    z_ND: Tensor,
    z_support_SD: Tensor,
    labels_SK: Tensor,
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
    labels_SK       [S, K] this rank's rows over the columns of all ranks (see `label_matrix`); gathered here
    h_GD            [2·B, D'] projections of the two global views, in the order of z (swapped here); detached here
    h_support_SD    [S, D'] projections of the supports; detached here

    float32 or float64; under autocast the caller casts and switches autocast off. Differentiable in z_ND and
    z_support_SD. Every rank must call it: it gathers rows and averages over ranks. `cross_entropy` is the mean over
    this rank's anchors, `me_max` = Σ ā log ā, ā the sharpened anchor predictions (crops included) averaged over all
    ranks; averaging the parameter gradients over ranks gives exactly the gradient of the global batch.

    A class without any support has probability 0 everywhere and contributes 0 to value and gradient. Where a target
    is positive but the prediction is 0 (only an underflow of the softmax can do that), the prediction counts as the
    dtype's smallest normal number: a large, finite loss without gradient.

    Raises ValueError if the rows of z are not two or more whole views of the images of h.
    """
    images = len(h_GD) // 2
    if len(h_GD) % 2 or not images or len(z_ND) < 2 * images or len(z_ND) % images:
        raise ValueError(f"{len(z_ND)} anchors are not two or more whole views of the {len(h_GD)}/2 images of h")
    with torch.no_grad():
        labels_SK = gather_rows(labels_SK.to(z_ND.dtype))
        swapped_GD = F.normalize(h_GD.roll(images, dims=0), dim=1, eps=1e-12)
        h_support_SD = gather_rows(F.normalize(h_support_SD, dim=1, eps=1e-12))
        target_GK = sharpen(soft_nearest_neighbours(swapped_GD, h_support_SD, labels_SK, tau), sharpen_T)
        crop_BK = (target_GK[:images] + target_GK[images:]) / 2
        target_NK = torch.cat([target_GK, crop_BK.repeat(len(z_ND) // images - 2, 1)])
        target_NK = torch.where(target_NK < MIN_TARGET, 0.0, target_NK)

    anchor_ND = F.normalize(z_ND, dim=1, eps=1e-12)
    z_support_SD = gather_rows(F.normalize(z_support_SD, dim=1, eps=1e-12))
    p_NK = soft_nearest_neighbours(anchor_ND, z_support_SD, labels_SK, tau)
    cross_entropy = -_times_log(target_NK, p_NK).sum(dim=1).mean()
    mean_K = mean_over_ranks(sharpen(p_NK, sharpen_T).mean(dim=0))
    return cross_entropy, _times_log(mean_K, mean_K).sum()


def _times_log(t: Tensor, p: Tensor) -> Tensor:
    """t·log p, finite with a finite gradient also at p = 0, where t = 0 gives 0 (xlogy's gradient there is NaN)."""
    return t * p.clamp_min(torch.finfo(p.dtype).tiny).log()


@torch.no_grad()
def diagnostics(
    h_GD: Tensor, h_support_SD: Tensor, labels_SK: Tensor, *, tau: float = 0.1, sharpen_T: float = 0.25
) -> dict[str, Tensor]:
    """How well projections tell images apart, and classes apart, and how sure the targets are: 0-dim tensors.

    instance_discrimination   mean cross-entropy of finding an image's other global view among those of all ranks, by
                              softmax over cosine / tau, in both directions
    support_classification    mean -log probability of a support's own class, by soft nearest neighbours among the
                              other supports of all ranks; infinite if some class has only one
    target_confidence         mean largest entry of the sharpened targets of the global views

    Arguments as in `paws_loss`; no gradients; every rank must call it, and all get the same numbers. All three are
    defined here, on the quantities the loss is made of; they are not taken from a published definition.
    """
    h_GD = F.normalize(h_GD, dim=1, eps=1e-12)
    supports_SD = gather_rows(F.normalize(h_support_SD, dim=1, eps=1e-12))
    labels_SK = gather_rows(labels_SK.to(h_GD.dtype))

    view1_BD, view2_BD = h_GD.chunk(2)
    own_B = (view1_BD * view2_BD).sum(dim=1) / tau
    among_2B = [
        torch.logsumexp(query_BD @ gather_rows(key_BD).T / tau, dim=1)
        for query_BD, key_BD in ((view1_BD, view2_BD), (view2_BD, view1_BD))
    ]
    instance = (torch.cat(among_2B) - own_B.repeat(2)).mean()

    logits_SS = (supports_SD @ supports_SD.T / tau).fill_diagonal_(-torch.inf)
    own_class_S = labels_SK.argmax(dim=1)
    same_SS = own_class_S[:, None] == own_class_S[None, :]
    support = torch.logsumexp(logits_SS, dim=1) - torch.logsumexp(logits_SS.masked_fill(~same_SS, -torch.inf), dim=1)

    target_GK = sharpen(soft_nearest_neighbours(h_GD, supports_SD, labels_SK, tau), sharpen_T)
    return {
        "instance_discrimination": mean_over_ranks(instance),
        "support_classification": support.mean(),
        "target_confidence": mean_over_ranks(target_GK.amax(dim=1).mean()),
    }
