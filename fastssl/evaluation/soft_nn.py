"""Soft nearest neighbours: PAWS-NN, classification without training anything.

A validation image's prediction is the mean label of the labelled images, weighted by softmax(cosine / tau) (PAWS,
arXiv 2104.13963, section 4; facebookresearch/suncet, snn_eval). As there: all labelled images, one central view each,
the last tap (after the prediction head, although training takes its targets before it), one-hot labels, fp32. The
paper's appendix A compares f(x), from before the prediction head: `--tap h`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl import dist
from fastssl.evaluation import collapse
from fastssl.evaluation.accuracies import top5, top5_correct, wilson
from fastssl.evaluation.cosine import cosine_blocks, full_fp32
from fastssl.evaluation.shards import BLOCK, totals, whole
from fastssl.evaluation.subject import Roles, Subject

TAU = 0.1  # as in training


def check(roles: Roles) -> None:
    """Raises ConfigError where labelled or validation images lack labels, or are the same."""
    roles.check_apart()


def evaluate(subject: Subject) -> dict[str, Any]:
    """`soft_nn_top1` and `_top5`, and what tells a collapse: of the predictions (entropy of their mean in nats and as a
    share of ln K, mean confidence) and of the validation embeddings (effective rank)."""
    tap = subject.chosen_tap(subject.method.taps[-1])
    labelled, validation = subject.labelled_and_validation(tap)
    p_QK = soft_nn(
        validation.values, labelled.values, labelled.labels, subject.num_classes, device=subject.device
    ).cpu()
    correct, among_five, images = totals(
        int((p_QK.argmax(dim=1) == validation.labels).sum()), top5_correct(p_QK, validation.labels), len(p_QK)
    )
    entropy, confidence = _of_predictions(p_QK)
    return {
        "soft_nn_top1": correct / images,
        **top5("soft_nn", among_five, images, subject.num_classes),
        "prediction_confidence": confidence,
        "mean_prediction_entropy": entropy,
        "mean_prediction_entropy_share": collapse.share_of_uniform(entropy, subject.num_classes),
        "effective_rank": _effective_rank(validation.values, images, subject.device),
        "soft_nn": {"tap": tap, "tau": TAU, "images": images, "top1_ci95": wilson(correct, images)},
    }


def _of_predictions(p_QK: Tensor) -> tuple[float, float]:
    """Entropy of the mean of all ranks' predictions, and their mean confidence. Summed block by block, in float64, so
    that it does not matter who has which."""
    sums_bK = torch.stack([p_qK.sum(dim=0, dtype=torch.float64) for p_qK in p_QK.split(BLOCK)])
    confidence_Q = whole(p_QK.amax(dim=1).double())
    mean_K = whole(sums_bK[: -(-len(p_QK) // BLOCK)]).sum(dim=0) / len(confidence_Q)
    return float(collapse.mean_prediction_entropy(mean_K[None])), math.fsum(confidence_Q.tolist()) / len(confidence_Q)


def _effective_rank(values_ND: Tensor, count: int, device: torch.device) -> float:
    """Of all ranks' rows, which are `count`. Its last digits depend on the number of ranks whose sums are added."""
    if count < values_ND.shape[1]:
        return float(collapse.effective_rank(whole(values_ND).to(device)))
    return float(collapse.rank_of_gram(dist.sum_over_ranks(collapse.gram(values_ND.to(device)))))


def soft_nn(
    queries_QD: Tensor,
    support_ND: Tensor,
    labels_N: Tensor,
    num_classes: int,
    *,
    tau: float = TAU,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Class probabilities [Q, num_classes] on `device`: softmax(cos / tau) over the support, summed by label. Of
    several ranks each gives its own queries and its part of the support, and gets what all of it says of its queries.

    Keeps the dtype. Holds Q rows of queries, of probabilities and of a block of similarities, never [Q, N].
    """
    # A cosine is at most 1, so exp((cos - 1) / tau) needs no running maximum; in fp32 it stays above zero down to
    # cos = -1 for tau > 0.025.
    mass_QK = torch.zeros(len(queries_QD), num_classes, dtype=queries_QD.dtype, device=device)
    with full_fp32():
        for cosine_Qn, labels_n in cosine_blocks(queries_QD, support_ND, labels_N, device):
            weight_Qn = ((cosine_Qn - 1) / tau).exp()
            mass_QK += weight_Qn @ F.one_hot(labels_n, num_classes).to(weight_Qn.dtype)
    return mass_QK / mass_QK.sum(dim=1, keepdim=True)
