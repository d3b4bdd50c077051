"""L2-regularised logistic regression to its optimum, on rows of which each rank holds a part."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl import dist
from fastssl.evaluation.heads import Heads, root_mean_square
from fastssl.evaluation.shards import BLOCK, totals, whole

MAX_ITERATIONS = 1000
_GRADIENT, _OBJECTIVE = 1e-4, 64 * float(np.finfo(float).eps)  # where scikit-learn's LogisticRegression stops, too
_LINE_SEARCH = 50

Sums = Callable[[np.ndarray], np.ndarray]  # parameters [P] -> the summed cross-entropy and its gradient, [1 + P]


def logistic_regression(
    train_ND: Tensor,
    labels_N: Tensor,
    num_classes: int,
    cs: Sequence[float],
    *,
    used_N: Tensor | None = None,
    max_iterations: int = MAX_ITERATIONS,
) -> Heads:
    """One head for each C of `cs`, ascending: scikit-learn's minimum of C x the summed cross-entropy + |weight|^2 / 2,
    by L-BFGS in float64, each begun at the one before. The bias is free; a class without images gets -inf. Of two
    classes, the difference of whose weights alone counts, it is that difference which is kept small. `used_N` (bool):
    the rows to learn from, where they are not all.

    Features are divided by their root mean square, so that a C means the same for any network; the heads returned take
    them as they are. Two classes at least must have images. Each rank sums over its own rows, and the first one, which
    decides what is tried next, over the ranks: by the order of these sums, heads differ in their last digits with the
    number of ranks.
    """
    rows_n = torch.arange(len(train_ND)) if used_N is None else used_N.nonzero()[:, 0]
    present_k = whole(labels_N[rows_n]).unique()
    scale, (count,) = root_mean_square(train_ND, used_N), totals(len(rows_n))
    column_K = torch.zeros(num_classes, dtype=torch.int64)
    column_K[present_k] = torch.arange(len(present_k))
    width, num_rows = train_ND.shape[1] + 1, 1 if len(present_k) == 2 else len(present_k)
    weight_SKD = torch.zeros(len(cs), num_classes, train_ND.shape[1], dtype=torch.float64)
    bias_SK = torch.full((len(cs), num_classes), -math.inf, dtype=torch.float64)

    def sums(parameters: np.ndarray) -> np.ndarray:
        return _sums(torch.from_numpy(parameters).view(num_rows, width), train_ND, column_K[labels_N], rows_n, scale)

    found = np.zeros(num_rows * width)
    for s, c in enumerate(cs):
        found = _minimum(sums, found, width, 1 / (c * count), count, max_iterations)
        head_kE = torch.from_numpy(found).view(num_rows, width)
        if num_rows == 1:
            head_kE = torch.cat([-head_kE, head_kE]) / 2
        weight_SKD[s, present_k], bias_SK[s, present_k] = head_kE[:, :-1] / scale, head_kE[:, -1]
    return Heads(weight_SKD, bias_SK)


def _sums(head_kE: Tensor, train_ND: Tensor, columns_N: Tensor, rows_n: Tensor, scale: float) -> np.ndarray:
    """Of this rank's rows, looked at a few at a time: their float64 copies would take twice the room of all."""
    loss, gradient_kE = torch.zeros((), dtype=torch.float64), torch.zeros_like(head_kE)
    for rows_b in rows_n.split(BLOCK):
        x_bE = F.pad(train_ND[rows_b].double() / scale, (0, 1), value=1.0)
        logits_bK = x_bE @ head_kE.T
        if len(head_kE) == 1:
            logits_bK = F.pad(logits_bK, (1, 0))
        loss += F.cross_entropy(logits_bK, columns_N[rows_b], reduction="sum")
        off_bK = logits_bK.softmax(dim=1)
        off_bK[torch.arange(len(rows_b)), columns_N[rows_b]] -= 1
        gradient_kE += off_bK[:, -len(head_kE) :].T @ x_bE
    return torch.cat([loss[None], gradient_kE.flatten()]).numpy()


def _minimum(sums: Sums, start: np.ndarray, width: int, decay: float, count: int, max_iterations: int) -> np.ndarray:
    """Where the mean cross-entropy + decay x |weight|^2 / 2 is least, the same on all ranks: the first asks them."""
    from scipy.optimize import minimize

    device = dist.message_device()

    def over_ranks(parameters: np.ndarray) -> np.ndarray | None:
        """The sums there, once the first rank has said where that is; None once it has found."""
        there = dist.broadcast(torch.from_numpy(parameters.copy()).to(device), source=0).cpu().numpy()
        if np.isnan(there[0]):
            return None
        parts_WP: np.ndarray = dist.gather_rows(torch.from_numpy(sums(there)).to(device)[None]).cpu().numpy()
        total: np.ndarray = parts_WP.sum(axis=0)
        return total

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        summed = over_ranks(parameters)
        assert summed is not None, "the search has left for where nothing is a number"
        weight = parameters.reshape(-1, width).copy()
        weight[:, -1] = 0
        value = summed[0] / count + decay * float((weight * weight).sum()) / 2
        return value, summed[1:] / count + decay * weight.ravel()

    found = start
    if dist.is_main():
        options = {"maxiter": max_iterations, "maxls": _LINE_SEARCH, "gtol": _GRADIENT, "ftol": _OBJECTIVE}
        # Where it stops early, at max_iterations, that is one more way to regularise.
        found = minimize(objective, start, method="L-BFGS-B", jac=True, options=options).x
        over_ranks(np.full_like(start, np.nan))
    else:
        while over_ranks(start) is not None:
            pass
    return dist.broadcast_object(found)
