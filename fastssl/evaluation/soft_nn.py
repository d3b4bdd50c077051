"""Soft nearest neighbours: PAWS-NN, classification without training anything.

A validation image's prediction is the mean label of the labelled images, weighted by softmax(cosine / tau) (PAWS,
arXiv 2104.13963, section 4; facebookresearch/suncet, snn_eval). As there: all labelled images, one central view each,
the last tap (after the prediction head, although training takes its targets before it), one-hot labels, fp32. The
paper's appendix A compares f(x), from before the prediction head: `--tap h`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl.evaluation import collapse
from fastssl.evaluation.accuracies import top5, top5_correct, wilson
from fastssl.evaluation.cosine import cosine_blocks, full_fp32
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
    correct = int((p_QK.argmax(dim=1) == validation.labels).sum())
    entropy = float(collapse.mean_prediction_entropy(p_QK))
    return {
        "soft_nn_top1": correct / len(p_QK),
        **top5("soft_nn", top5_correct(p_QK, validation.labels), len(p_QK), subject.num_classes),
        "prediction_confidence": float(collapse.prediction_confidence(p_QK)),
        "mean_prediction_entropy": entropy,
        "mean_prediction_entropy_share": collapse.share_of_uniform(entropy, subject.num_classes),
        "effective_rank": float(collapse.effective_rank(validation.values.to(subject.device))),
        "soft_nn": {"tap": tap, "tau": TAU, "images": len(p_QK), "top1_ci95": wilson(correct, len(p_QK))},
    }


def soft_nn(
    queries_QD: Tensor,
    support_ND: Tensor,
    labels_N: Tensor,
    num_classes: int,
    *,
    tau: float = TAU,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Class probabilities [Q, num_classes] on `device`: softmax(cos / tau) over the support, summed by label.

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
