"""RoPAWS: targets that know what they do not know (arXiv 2302.14483, ICLR 2023).

Class probabilities spread from the labelled supports over the unlabelled images of a batch, whose neighbours count as
well; what reaches an image from no support is the probability that it is of none of the classes. For one view with M
images and N supports over all ranks, A and B their cosines to supports and to each other:

    w_i = exp((max_j A_ij - 1) / prior_tau)                     how likely an image is of any class, at first sight
    C   = w * softmax([A / tau + log r, B / tau], dim=1)        r = label_ratio * M / N; B's diagonal left out
    P   = (I - C_U)^-1 C_L Y                                    C_L, C_U: C's columns of supports and of images

Rows of P sum to p_in <= 1. Only the rows of this rank's images are wanted, so the system is solved from the left, for
as many right sides as these: beside the products with the supports, which every rank does for its own images, a rank
computes 2 M^2 D + 2/3 M^3 for each view, and its memory holds two M x M matrices.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastssl.dist import gather_rows, gather_rows_together, rank
from fastssl.losses.similarity import Labels, chunks, unit_rows


@torch.no_grad()
def in_domain_targets(
    h_GD: Tensor,
    h_support_SD: Tensor,
    labels: Labels,
    *,
    tau: float = 0.1,  # PAWS's
    prior_tau: float = 3.0,  # the authors' released code, as the next
    label_ratio: float = 5.0,
    num_global: int = 2,
) -> tuple[Tensor, Tensor]:
    """(p_GK, p_in_B): class probabilities of this rank's images, and how likely each is of any class.

    h_GD           [V·B, D] projections of the V = `num_global` global views, view-major, this rank's; any rows
    h_support_SD   [S, D] unit vectors, those of all ranks, with their labels
    p_GK           rows sum to 1: what is missing, 1 - p_in, is spread evenly over the classes; not sharpened
    p_in_B         the mean over the views

    float32 or float64, without gradient. Every rank must call it, with as many images: it gathers rows.
    """
    views = unit_rows(h_GD).chunk(num_global)
    everyones = gather_rows_together(*views)
    found = [
        _of_one_view(own_BD, all_MD, h_support_SD, labels, tau, prior_tau, label_ratio)
        for own_BD, all_MD in zip(views, everyones, strict=True)
    ]
    p_in_GV = torch.stack([p_BK.sum(dim=1) for p_BK in found], dim=1)
    spread = [p_BK + (1 - p_BK.sum(dim=1, keepdim=True)) / p_BK.shape[1] for p_BK in found]
    return torch.cat(spread), p_in_GV.mean(dim=1)


def _of_one_view(
    own_BD: Tensor, all_MD: Tensor, h_support_SD: Tensor, labels: Labels, tau: float, prior_tau: float, ratio: float
) -> Tensor:
    """P's rows [B, K] of this rank's images."""
    num_own, num_all = len(own_BD), len(all_MD)
    log_ratio = math.log(ratio * num_all / len(h_support_SD))
    first = rank() * num_own
    parts = [
        _row_parts(own_BD[rows], first + rows.start, all_MD, h_support_SD, labels, tau, prior_tau, log_ratio)
        for rows in chunks(num_own, num_all + len(h_support_SD))
    ]
    direct_MK, log_scale_M1 = gather_rows(torch.cat(parts)).tensor_split([-1], dim=1)
    system_MM = torch.addmm(log_scale_M1.expand(-1, num_all), all_MD, all_MD.T, alpha=1 / tau).exp_().neg_()
    system_MM.fill_diagonal_(1.0)
    own_columns_MB = torch.zeros(num_all, num_own, dtype=own_BD.dtype, device=own_BD.device)
    own_columns_MB[first : first + num_own].fill_diagonal_(1.0)
    solved_BK: Tensor = torch.linalg.solve(system_MM.T, own_columns_MB).T @ direct_MK
    return solved_BK


def _row_parts(
    own_nD: Tensor,
    first: int,
    all_MD: Tensor,
    h_support_SD: Tensor,
    labels: Labels,
    tau: float,
    prior_tau: float,
    log_ratio: float,
) -> Tensor:
    """[n, K + 1]: C_L Y, and log(w / Z), which makes C_U's row of exp(B / tau). Row i is image `first` + i of all."""
    cosine_nS = own_nD @ h_support_SD.T
    log_prior_n1 = (cosine_nS.amax(dim=1, keepdim=True) - 1) / prior_tau
    support_nS = cosine_nS.div_(tau).add_(log_ratio)
    image_nM = own_nD @ all_MD.T / tau
    image_nM.diagonal(offset=first).fill_(-torch.inf)
    of_supports_n1 = torch.logsumexp(support_nS, dim=1, keepdim=True)
    log_Z_n1 = torch.logaddexp(of_supports_n1, torch.logsumexp(image_nM, dim=1, keepdim=True))
    share_n1 = (log_prior_n1 + of_supports_n1 - log_Z_n1).exp_()
    return torch.cat([labels.predictions(torch.softmax(support_nS, dim=1)) * share_n1, log_prior_n1 - log_Z_n1], dim=1)
