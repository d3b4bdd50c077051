"""Weighted k nearest neighbours on backbone features (Wu et al., arXiv 1805.01978; k and temperature as in DINOv2).

Each of the k labelled images nearest in cosine votes for its class with weight exp(cosine / 0.07).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastssl.evaluation.accuracies import top5, top5_correct, wilson
from fastssl.evaluation.cosine import cosine_blocks, full_fp32
from fastssl.evaluation.shards import totals
from fastssl.evaluation.subject import Roles, Subject

TEMPERATURE = 0.07
KS = (10, 20, 100, 200)
DEFAULT_K = 20  # fixed beforehand: taking the best k would be choosing on the validation images


def check(roles: Roles) -> None:
    """Raises ConfigError where labelled or validation images lack labels, or are the same."""
    roles.check_apart()


def evaluate(subject: Subject) -> dict[str, Any]:
    """`knn_top1` and `knn_top5` at k = 20, and `knn_top1_k10`, ... for each k, which is clipped to the number of
    labelled images."""
    tap, num_classes = subject.chosen_tap(subject.method.taps[0]), subject.num_classes
    labelled, validation = subject.labelled_and_validation(tap)
    label_Q = validation.labels.to(subject.device)
    own, own_among_five = dict.fromkeys(KS, 0), 0
    banks = validation.values, labelled.values, labelled.labels
    for k, votes_QK in knn_votes(*banks, num_classes, ks=KS, device=subject.device):
        own[k] = int((votes_QK.argmax(dim=1) == label_Q).sum())
        if k == DEFAULT_K:
            own_among_five = top5_correct(votes_QK, label_Q)
    images, num_labelled, among_five, *right = totals(len(label_Q), len(labelled.labels), own_among_five, *own.values())
    correct = dict(zip(own, right, strict=True))
    return {
        "knn_top1": correct[DEFAULT_K] / images,
        **top5("knn", among_five, images, num_classes),
        **{f"knn_top1_k{k}": correct[k] / images for k in KS},
        "knn": {
            "tap": tap,
            "temperature": TEMPERATURE,
            "k": DEFAULT_K,
            "k_used": {str(k): min(k, num_labelled) for k in KS},
            "images": images,
            "top1_ci95": wilson(correct[DEFAULT_K], images),
        },
    }


def knn(
    queries_QD: Tensor,
    bank_ND: Tensor,
    labels_N: Tensor,
    num_classes: int,
    *,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    device: torch.device | str = "cpu",
) -> dict[int, Tensor]:
    """Predicted classes [Q] for each k of `ks`; where k exceeds the bank, all of it votes."""
    asked = queries_QD, bank_ND, labels_N, num_classes
    votes = knn_votes(*asked, ks=ks, temperature=temperature, device=device)
    return {k: votes_QK.argmax(dim=1) for k, votes_QK in votes}


def knn_votes(
    queries_QD: Tensor,
    bank_ND: Tensor,
    labels_N: Tensor,
    num_classes: int,
    *,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[int, Tensor]]:
    """(k, votes [Q, num_classes]) for each k of `ks` in ascending order; the votes are the generator's own and grow
    with k. Of several ranks each gives its own queries and its part of the bank, and gets the votes of all of it; of
    equally near images those with the smaller row numbers count as nearer, however many ranks there are."""
    most = min(max(ks), *totals(len(bank_ND)))
    cosine_Qk = queries_QD.new_empty(len(queries_QD), 0, device=device)
    labels_Qk = labels_N.new_empty(len(queries_QD), 0, device=device)
    with full_fp32():
        for cosine_Qn, labels_n in cosine_blocks(queries_QD, bank_ND, labels_N, device):
            cosine_Qm = torch.cat([cosine_Qk, cosine_Qn], dim=1)
            labels_Qm = torch.cat([labels_Qk, labels_n.expand(len(cosine_Qn), -1)], dim=1)
            kept_Qk = nearest(cosine_Qm, most)
            cosine_Qk, labels_Qk = cosine_Qm.gather(1, kept_Qk), labels_Qm.gather(1, kept_Qk)
    weight_Qk = ((cosine_Qk - 1) / temperature).exp()
    votes_QK = queries_QD.new_zeros(len(queries_QD), num_classes, device=device)
    # Nearest first, one neighbour a row at a time: every k falls out of one pass, and no two additions race.
    for count in range(1, most + 1):
        votes_QK.scatter_add_(1, labels_Qk[:, count - 1 : count], weight_Qk[:, count - 1 : count])
        yield from ((k, votes_QK) for k in ks if min(k, most) == count)


def nearest(cosine_Qm: Tensor, most: int) -> Tensor:
    """The columns of the `most` largest of each row, or all, the largest first; of equal ones the first column first,
    which torch's topk does not promise."""
    if cosine_Qm.shape[1] <= most:
        return cosine_Qm.sort(dim=1, descending=True, stable=True).indices
    one_more = cosine_Qm.topk(most + 1, dim=1)
    columns_Qk = one_more.indices[:, :most].sort(dim=1).values
    tied_Q = one_more.values[:, most - 1] == one_more.values[:, most]
    if tied_Q.any():  # which of those as near as the last are kept
        columns_Qk[tied_Q] = (
            cosine_Qm[tied_Q].sort(dim=1, descending=True, stable=True).indices[:, :most].sort(dim=1).values
        )
    order_Qk = cosine_Qm.gather(1, columns_Qk).sort(dim=1, descending=True, stable=True).indices
    return columns_Qk.gather(1, order_Qk)
