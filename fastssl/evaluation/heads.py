"""Linear classifiers of the same features."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastssl.evaluation.cosine import full_fp32
from fastssl.evaluation.shards import BLOCK, totals, whole


@dataclass(frozen=True)
class Heads:
    """S linear classifiers of the same D features: logits are `x @ weight.T + bias`.

    weight_SKD  [S, K, D]
    bias_SK     [S, K], -inf for a class that no labelled image had, where the solver leaves such classes out
    """

    weight_SKD: Tensor
    bias_SK: Tensor

    def logits(self, x_QD: Tensor) -> Tensor:
        """[S, Q, K], in the heads' dtype and on their device."""
        with full_fp32():
            return torch.einsum("qd,skd->sqk", x_QD.to(self.weight_SKD), self.weight_SKD) + self.bias_SK[:, None]

    def classes(self, x_QD: Tensor) -> Tensor:
        """The class of each head's largest logit, int64 [S, Q] on the CPU; -1 for a head that has diverged."""
        whole_S = self.weight_SKD.isfinite().all(dim=(1, 2)) & ~self.bias_SK.isnan().any(dim=1)
        classes_SQ = torch.cat([self.logits(x_qD).argmax(dim=2) for x_qD in x_QD.split(BLOCK)], dim=1)
        return torch.where(whole_S[:, None], classes_SQ, -1).cpu()

    def cpu(self) -> Heads:
        return Heads(self.weight_SKD.cpu(), self.bias_SK.cpu())


def root_mean_square(x_ND: Tensor, used_N: Tensor | None = None) -> float:
    """Of all ranks' rows, or those of them that are `used_N`; 1 for features that are all 0."""
    squares_N = torch.cat([rows_nD.double().square().sum(dim=1) for rows_nD in x_ND.split(BLOCK)])
    squares_N = squares_N if used_N is None else squares_N[used_N]
    (count,) = totals(len(squares_N) * x_ND.shape[1])
    # fsum's answer is the exact sum, rounded: it does not depend on who holds which rows.
    return math.sqrt(math.fsum(whole(squares_N).tolist()) / count) or 1.0
