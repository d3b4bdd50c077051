"""Soft nearest neighbours: class probabilities from similarities to labelled supports, without the similarity matrix.

A query's probabilities are a softmax over its cosines / tau to all supports, applied to their labels. Queries pass in
chunks; backward computes a chunk's similarities again rather than keep them, and the gradient of a whole loss needs as
much memory as that of one chunk, however many queries there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

# Similarities of one chunk, 14 MiB in float32. A 1/64 share of PAWS's ImageNet batch (512 anchors, 6,720 supports) is
# one chunk, which forward keeps for backward: nothing is computed twice.
MAX_ELEMENTS = 7 * 2**19
MIN_NORM = 1e-12  # shorter rows are divided by this, as torch.nn.functional.normalize does

Head = Callable[[Tensor, slice], tuple[Tensor, ...]]


class Labels(Protocol):
    """Labels of S supports over K columns, as far as soft nearest neighbours need to know them."""

    def predictions(self, weight_nS: Tensor) -> Tensor:
        """weights @ labels, [n, K]; each row of weights sums to 1."""

    def logit_gradient(self, weight_nS: Tensor, p_nK: Tensor, gradient_nK: Tensor) -> Tensor:
        """Gradient [n, S] of the logits whose softmax are the weights, from that of their predictions `p_nK`."""

    def columns(self, device: torch.device) -> Tensor:
        """int64 [S]: each support's own column."""


@dataclass(frozen=True)
class DenseLabels:
    """Any label matrix [S, K], multiplied as such."""

    matrix_SK: Tensor

    def predictions(self, weight_nS: Tensor) -> Tensor:
        return weight_nS @ self.matrix_SK

    def logit_gradient(self, weight_nS: Tensor, p_nK: Tensor, gradient_nK: Tensor) -> Tensor:
        mean_n1 = (gradient_nK * p_nK).sum(dim=1, keepdim=True)  # of the weights' gradient, under the weights
        return (gradient_nK @ self.matrix_SK.T).sub_(mean_n1).mul_(weight_nS)

    def columns(self, device: torch.device) -> Tensor:
        return self.matrix_SK.argmax(dim=1)


@dataclass(frozen=True)
class BalancedLabels:
    """Smoothed one-hot labels of a class-balanced batch, known from its layout: sums over runs of rows, no matrix.

    num_columns   K; the label is 1 - smoothing + smoothing/K at a support's column and smoothing/K elsewhere
    per_column    supports of each column, one copy counted
    copies        views of each support
    ranks         that share the batch in equal parts

    All ranks' rows are `ranks` blocks of `copies` times one part; the parts in rank order are class-major (what
    `loaders.plan` draws for `Balanced` streams), so row r of one whole copy has column r // per_column. A part may
    begin and end in the middle of a column.
    """

    num_columns: int
    per_column: int
    copies: int = 1
    ranks: int = 1
    smoothing: float = 0.0

    def predictions(self, weight_nS: Tensor) -> Tensor:
        mass_nR = weight_nS.view(-1, *self._shape).sum(dim=(2, 4)).flatten(1)
        mass_nK = mass_nR.view(len(mass_nR), self.num_columns, -1).sum(dim=2)
        return mass_nK.mul_(1 - self.smoothing).add_(self.smoothing / self.num_columns)

    def logit_gradient(self, weight_nS: Tensor, p_nK: Tensor, gradient_nK: Tensor) -> Tensor:
        # smoothing gives all weights of a row the same gradient, and softmax ignores what is the same for all
        mean_n1 = (gradient_nK * (p_nK - self.smoothing / self.num_columns)).sum(dim=1, keepdim=True)
        centred_nK = (gradient_nK * (1 - self.smoothing)).sub_(mean_n1)
        ranks, _, runs, run = self._shape
        of_run = centred_nK[:, :, None].expand(-1, -1, ranks * runs // self.num_columns).reshape(-1, ranks, 1, runs, 1)
        return (weight_nS.view(-1, *self._shape) * of_run).view_as(weight_nS)

    def columns(self, device: torch.device) -> Tensor:
        part = torch.arange(self.num_columns * self.per_column, device=device).view(self.ranks, 1, -1)
        return part.expand(-1, self.copies, -1).flatten() // self.per_column

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        """Ranks, copies, runs of one column in a part, rows of a run: equal runs even where a part breaks a column."""
        part = self.num_columns * self.per_column // self.ranks
        run = math.gcd(part, self.per_column)
        return self.ranks, self.copies, part // run, run


def chunks(num_queries: int, num_supports: int) -> Iterator[slice]:
    """Slices of the queries, equal but for the last, of at most MAX_ELEMENTS similarities (or of one query)."""
    count = max(1, -(-num_queries * num_supports // MAX_ELEMENTS))
    rows = max(1, -(-num_queries // count))
    return (slice(start, min(start + rows, num_queries)) for start in range(0, num_queries, rows))


def unit_rows(x_ND: Tensor) -> Tensor:
    """Rows divided by their Euclidean norms. As torch.nn.functional.normalize, but keeps one [N, D] tensor for backward
    and makes one there."""
    unit_ND: Tensor = _UnitRows.apply(x_ND)  # type: ignore[no-untyped-call]
    return unit_ND


@torch.no_grad()
def soft_nearest_neighbours(query_ND: Tensor, support_SD: Tensor, labels: Labels, tau: float) -> Tensor:
    """Class probabilities [N, K] of `query_ND`, any rows; rows of `support_SD` are unit vectors. No gradient."""
    unit_ND, _ = _unit(query_ND)
    rows = chunks(len(unit_ND), len(support_SD))
    return torch.cat([labels.predictions(_weights(unit_ND[n], support_SD, tau)) for n in rows])


def sum_of_soft_nearest_neighbours(
    query_ND: Tensor, support_SD: Tensor, labels: Labels, tau: float, head: Head
) -> tuple[Tensor, ...]:
    """Sum over chunks of `head(p_nK, rows)`: tensors made of the class probabilities of the queries `rows`.

    query_ND     [N, D] any rows; normalised here
    support_SD   [S, D] unit vectors
    head         differentiable in p_nK and in nothing else; a sum over its rows, of one shape for all chunks. It is
                 called again in backward.

    Differentiable once, in query_ND and support_SD. Beyond [N, D] and [S, D] tensors (the normalised queries and the
    gradients) it needs two tensors of MAX_ELEMENTS (a third for DenseLabels, which has a product with the matrix) and
    what `head` makes.
    """
    sums: tuple[Tensor, ...]
    sums = _SumOfSoftNearestNeighbours.apply(query_ND, support_SD, labels, tau, head)  # type: ignore[no-untyped-call]
    return sums


class _SumOfSoftNearestNeighbours(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_ND: Tensor, support_SD: Tensor, labels: Labels, tau: float, head: Head
    ) -> tuple[Tensor, ...]:
        unit_ND, norm_N1 = _unit(query_ND)
        sums: tuple[Tensor, ...] = ()
        for rows in chunks(len(unit_ND), len(support_SD)):
            weight_nS = _weights(unit_ND[rows], support_SD, tau)
            terms = head(labels.predictions(weight_nS), rows)
            sums = tuple(a + b for a, b in zip(sums, terms, strict=True)) if sums else terms
        kept = [weight_nS] if len(weight_nS) == len(unit_ND) else []
        ctx.save_for_backward(unit_ND, norm_N1, support_SD, *kept)
        ctx.labels, ctx.tau, ctx.head = labels, tau, head
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        unit_ND, norm_N1, support_SD, *kept = ctx.saved_tensors
        query_gradient_ND, support_gradient_SD = torch.empty_like(unit_ND), torch.zeros_like(support_SD)
        for rows in chunks(len(unit_ND), len(support_SD)):
            weight_nS = kept[0] if kept else _weights(unit_ND[rows], support_SD, ctx.tau)
            p_nK = ctx.labels.predictions(weight_nS).requires_grad_()
            with torch.enable_grad():
                terms = ctx.head(p_nK, rows)
            (gradient_nK,) = torch.autograd.grad(terms, p_nK, gradients)
            logit_gradient_nS = ctx.labels.logit_gradient(weight_nS, p_nK.detach(), gradient_nK)
            del weight_nS
            scale = {"alpha": 1 / ctx.tau}
            query_gradient_nD = query_gradient_ND[rows]
            torch.addmm(query_gradient_nD, logit_gradient_nS, support_SD, beta=0, **scale, out=query_gradient_nD)
            _through_unit(query_gradient_nD, unit_ND[rows], norm_N1[rows])
            support_gradient_SD.addmm_(logit_gradient_nS.T, unit_ND[rows], **scale)
        return query_gradient_ND, support_gradient_SD, None, None, None


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor) -> Tensor:
        unit_ND, norm_N1 = _unit(x_ND)
        ctx.save_for_backward(unit_ND, norm_N1)
        return unit_ND

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient_ND: Tensor) -> Tensor:
        return _through_unit(gradient_ND.clone(), *ctx.saved_tensors)


def _weights(unit_nD: Tensor, support_SD: Tensor, tau: float) -> Tensor:
    """softmax(cosines / tau), [n, S]; the division is the product's own factor, not a pass over its result."""
    logits_nS = unit_nD.new_empty(len(unit_nD), len(support_SD))
    torch.addmm(logits_nS, unit_nD, support_SD.T, beta=0, alpha=1 / tau, out=logits_nS)
    return torch.softmax(logits_nS, dim=1)


def _unit(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows and their norms [N, 1]."""
    norm_N1 = torch.linalg.vector_norm(x_ND, dim=1, keepdim=True).clamp_min_(MIN_NORM)
    return x_ND / norm_N1, norm_N1


def _through_unit(gradient_ND: Tensor, unit_ND: Tensor, norm_N1: Tensor) -> Tensor:
    """The gradient of unit rows becomes, in place, that of the rows they came from: its part across each, over its
    norm."""
    along_N1 = torch.linalg.vecdot(gradient_ND, unit_ND)[:, None]
    return gradient_ND.addcmul_(unit_ND, along_N1, value=-1).div_(norm_N1)
