"""SemPPL's objective on its three bases, as pure functions of tensors; `fastssl.methods.semppl` says what it is for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Relic:
    """ReLICv2: telling the target of one's own image from those of a few others, alike from every view."""

    tau: float = 0.2
    num_negatives: int = 10
    contrast_weight: float = 0.3
    invariance_weight: float = 5.0
    # What a small view's comparison is held to, which has no target of its own to be compared with: that of the large
    # view with its own target (ReLIC allows any two views), or nothing.
    small_kl: Literal["large", "none"] = "large"
    # What the comparison with a queued positive is held to. The paper's is the positive's online embedding, which a
    # queue does not hold: its stored target embedding in that place, or nothing.
    semantic_kl: Literal["stored", "none"] = "stored"


@dataclass(frozen=True)
class Byol:
    """BYOL: squared distances to targets; no negatives."""


@dataclass(frozen=True)
class SimClr:
    """SimCLR: telling one's own other view from the views of all other images, by one network without predictor."""

    tau: float = 0.1


Base = Relic | Byol | SimClr


@dataclass(frozen=True)
class Positives:
    """Queued embeddings of each image's class.

    z_BLPD   P from each of L queues, unit rows without gradient
    found_B  false where the queues hold none of the class: what stands there does not count
    """

    z_BLPD: Tensor
    found_B: Tensor


@dataclass(frozen=True)
class Terms:
    """[B, V, L]: of each image, online view and target view; semantic ones are summed over the P positives."""

    contrast: Tensor
    semantic: Tensor | None = None
    invariance: Tensor | None = None
    semantic_invariance: Tensor | None = None


def semppl_loss(
    z_VBD: Tensor,
    target_GLD: Tensor,
    row_B: Tensor,
    negative_BN: Tensor | None = None,
    positives: Positives | None = None,
    *,
    base: Base = Relic(),  # noqa: B008 (frozen)
    alpha: float = 0.2,  # paper, appendix D.1 and table 11
    alpha_on_kl: bool = False,
    same_view_pairs: bool = True,
    normaliser: int | None = None,
) -> dict[str, Tensor]:
    """SemPPL's objective on any base, as 0-dim tensors: "total" and the means of its parts, unweighted.

    z_VBD        [V, B, D] this rank's online embeddings, unit rows, the L large views first
    target_GLD   [G, L, D] target embeddings of the large views of all ranks' images, unit rows; with gradient for
                 SimCLR, whose targets are the online embeddings, otherwise without
    row_B        int64 [B], where this rank's images stand among the G
    negative_BN  int64 [B, N], rows among the G that are not the image's own; ReLICv2's alone
    positives    the semantic ones, or None to go without

    With A_ij the contrast of online view i with target view j, S_ij that with the positives of queue j in place of the
    own target, summed, and KA_ij, KS_ij the divergences that hold these comparisons to those of the other view,

        total = 1/N sum_ij [ c (A_ij + alpha S_ij) + lambda (KA_ij + KS_ij) ],

    each a mean over images. c and lambda are the base's, 1 and 0 but for ReLICv2; see `SempplConfig` for the settings.
    float32 or float64. A function of this rank's images and of the targets it is given: ranks need not agree on B.
    """
    own_BLD = target_GLD[row_B]
    match base:
        case Relic():
            assert negative_BN is not None
            terms = _relic_terms(z_VBD, own_BLD, target_GLD[negative_BN], positives, base)
            weights = base.contrast_weight, base.invariance_weight
        case Byol():
            terms, weights = _byol_terms(z_VBD, own_BLD, positives), (1.0, 0.0)
        case SimClr():
            terms, weights = _simclr_terms(z_VBD, target_GLD, row_B, positives, base.tau), (1.0, 0.0)

    num_views, num_images, num_large = len(z_VBD), z_VBD.shape[1], target_GLD.shape[1]
    kept_VL = torch.ones(num_views, num_large, dtype=z_VBD.dtype, device=z_VBD.device)
    num_pairs = num_views * num_large
    if not same_view_pairs:
        kept_VL -= torch.eye(num_views, num_large, dtype=z_VBD.dtype, device=z_VBD.device)
        num_pairs -= num_large

    def mean(terms_BVL: Tensor) -> Tensor:
        return (terms_BVL * kept_VL).sum() / (num_images * num_pairs)

    contrast_weight, invariance_weight = weights
    parts = {"contrast": mean(terms.contrast)}
    total, num_terms = contrast_weight * parts["contrast"], num_pairs
    if terms.invariance is not None:
        parts["invariance"] = mean(terms.invariance)
        total = total + invariance_weight * parts["invariance"]
    if positives is not None and terms.semantic is not None:
        num_positives = positives.z_BLPD.shape[2]
        num_terms = num_pairs * (1 + num_positives)
        found_B11 = positives.found_B.to(z_VBD.dtype)[:, None, None]
        semantic = mean(terms.semantic * found_B11)
        parts["semantic"] = semantic / num_positives
        total = total + contrast_weight * alpha * semantic
        if terms.semantic_invariance is not None:
            invariance = mean(terms.semantic_invariance * found_B11)
            parts["semantic_invariance"] = invariance / num_positives
            total = total + invariance_weight * (alpha if alpha_on_kl else 1.0) * invariance
    return {"total": total * (num_pairs / (normaliser or num_terms)), **parts}


def _relic_terms(
    z_VBD: Tensor, own_BLD: Tensor, negative_BNLD: Tensor, positives: Positives | None, base: Relic
) -> Terms:
    """A comparison is a distribution over 1 + N outcomes: the positive, then the negatives."""
    num_large = own_BLD.shape[1]
    z_BVD = z_VBD.transpose(0, 1)
    candidate_BLKD = torch.cat([own_BLD[:, :, None], negative_BNLD.transpose(1, 2)], dim=2)
    logit_BVLK = _products(z_BVD, candidate_BLKD) / base.tau
    log_p_BVLK = logit_BVLK.log_softmax(dim=3)
    invariance_BVL = _divergence(log_p_BVLK, _of_the_other_view(log_p_BVLK[:, :num_large], log_p_BVLK.shape[1]))
    terms = Terms(-log_p_BVLK[..., 0], invariance=_of_large(invariance_BVL, num_large, base))
    if positives is None:
        return terms

    first_BVLP1 = _products(z_BVD, positives.z_BLPD)[..., None] / base.tau
    rest_BVLPN = logit_BVLK[:, :, :, None, 1:].expand(*first_BVLP1.shape[:4], -1)
    log_q_BVLPK = torch.cat([first_BVLP1, rest_BVLPN], dim=4).log_softmax(dim=4)
    terms = replace(terms, semantic=-log_q_BVLPK[..., 0].sum(dim=3))
    if base.semantic_kl == "none":
        return terms
    with torch.no_grad():  # queued embeddings and targets are constants
        # of positive s from queue j, compared with the own targets of view i: [B, j, s, i, K] -> [B, s, j, i, K]
        log_r_BLPLK = (_products(positives.z_BLPD.flatten(1, 2), candidate_BLKD) / base.tau).log_softmax(dim=3)
        log_r_BPLLK = log_r_BLPLK.unflatten(1, positives.z_BLPD.shape[1:3]).transpose(1, 2)
        held_to = torch.stack([_of_the_other_view(r, log_p_BVLK.shape[1]) for r in log_r_BPLLK.unbind(1)], dim=3)
    invariance_BVL = _divergence(log_q_BVLPK, held_to).sum(dim=3)
    return replace(terms, semantic_invariance=_of_large(invariance_BVL, num_large, base))


def _of_the_other_view(log_p_BLLK: Tensor, num_views: int) -> Tensor:
    """[B, anchor j, targets i, K] -> [B, i, j, K], what online view i's comparison with target view j is held to: for
    large i that of j with the targets of i; for the small views after them that of j with its own."""
    num_small = num_views - log_p_BLLK.shape[1]
    own_BLK = log_p_BLLK.diagonal(dim1=1, dim2=2).transpose(1, 2)
    return torch.cat([log_p_BLLK.transpose(1, 2), own_BLK[:, None].expand(-1, num_small, -1, -1)], dim=1)


def _of_large(terms_BVL: Tensor, num_large: int, base: Relic) -> Tensor:
    """The terms, or those of large views alone where the base says so."""
    if base.small_kl == "large":
        return terms_BVL
    return F.pad(terms_BVL[:, :num_large], (0, 0, 0, terms_BVL.shape[1] - num_large))


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) over the last axis. Gradient reaches p and q through the cross-entropy; the entropy is detached."""
    p = log_p.exp()
    return (p * log_p).sum(dim=-1).detach() - (p * log_q).sum(dim=-1)


def _byol_terms(z_VBD: Tensor, own_BLD: Tensor, positives: Positives | None) -> Terms:
    """Squared distances of unit vectors."""
    z_BVD = z_VBD.transpose(0, 1)
    terms = Terms(2 - 2 * _products(z_BVD, own_BLD[:, :, None])[..., 0])
    if positives is None:
        return terms
    return replace(terms, semantic=(2 - 2 * _products(z_BVD, positives.z_BLPD)).sum(dim=3))


def _simclr_terms(z_VBD: Tensor, target_GLD: Tensor, row_B: Tensor, positives: Positives | None, tau: float) -> Terms:
    """NT-Xent: of view i with view j, among all views of all other images. A semantic positive takes j's place."""
    z_BVD, num_images = z_VBD.transpose(0, 1), len(target_GLD)
    logit_BVGL = (z_BVD @ target_GLD.flatten(0, 1).T / tau).unflatten(2, target_GLD.shape[:2])
    own_BG = row_B[:, None] == torch.arange(num_images, device=row_B.device)
    others_BV1 = logit_BVGL.masked_fill(own_BG[:, None, :, None], -torch.inf).logsumexp(dim=(2, 3))[:, :, None]
    own_BVL = _products(z_BVD, target_GLD[row_B][:, :, None])[..., 0] / tau
    terms = Terms(F.softplus(others_BV1 - own_BVL))
    if positives is None:
        return terms
    semantic_BVLP = F.softplus(others_BV1[..., None] - _products(z_BVD, positives.z_BLPD) / tau)
    return replace(terms, semantic=semantic_BVLP.sum(dim=3))


def _products(a_BVD: Tensor, b_BLKD: Tensor) -> Tensor:
    """Inner products of each image's rows: [B, V, L, K]."""
    products_BVLK: Tensor = (a_BVD @ b_BLKD.flatten(1, 2).transpose(1, 2)).unflatten(2, b_BLKD.shape[1:3])
    return products_BVLK
