"""Nearest neighbours in a large bank, and what they vote for, without the matrix of similarities.

Nothing here has a gradient or waits for the device.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

MAX_ELEMENTS = 2**23  # similarities of one tile: 32 MiB in float32

Ties = Literal["similarity", "lowest"]


@torch.no_grad()
def nearest(query_ND: Tensor, bank_CD: Tensor, usable_C: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """The k rows of the bank with the largest products with each query: (products [N, k], nearest first, rows [N, k]).

    Rows where `usable_C` is false are passed over; where fewer than k are usable, the rest have product -inf. The bank
    passes in tiles of MAX_ELEMENTS products.
    """
    assert k <= len(bank_CD)
    # Added within the product itself: masking afterwards would be another pass over every tile.
    bias_C = torch.zeros(len(bank_CD), dtype=query_ND.dtype, device=query_ND.device)
    bias_C = bias_C.masked_fill(~usable_C, -torch.inf)
    similarity_Nk = query_ND.new_empty(len(query_ND), 0)
    row_Nk = torch.empty(len(query_ND), 0, dtype=torch.int64, device=query_ND.device)
    tile = max(k, MAX_ELEMENTS // max(1, len(query_ND)))
    for start in range(0, len(bank_CD), tile):
        rows = slice(start, start + tile)
        found, at = _largest(torch.addmm(bias_C[rows], query_ND, bank_CD[rows].T), k)
        found, at = torch.cat([similarity_Nk, found], dim=1), torch.cat([row_Nk, at + start], dim=1)
        similarity_Nk, best = _largest(found, k)
        row_Nk = at.gather(1, best)
    return similarity_Nk, row_Nk


def _largest(x_NC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, or all where it has fewer, with their columns."""
    if k == 1:
        values_N1, at_N1 = x_NC.max(dim=1, keepdim=True)
        return values_N1, at_N1
    values_Nk, at_Nk = x_NC.topk(min(k, x_NC.shape[1]), dim=1)
    return values_Nk, at_Nk


class Majority(NamedTuple):
    """What most votes are for, how many they are and their summed similarity; -1, 0 and -inf where nobody votes."""

    label_N: Tensor
    votes_N: Tensor
    similarity_N: Tensor


@torch.no_grad()
def majority(label_NV: Tensor, similarity_NV: Tensor, ties: Ties = "similarity") -> Majority:
    """The label with most of V votes. A vote of similarity -inf does not count.

    Of several labels with as many votes wins the one of highest summed similarity, of these the lowest ("similarity"),
    or straight away the lowest ("lowest").
    """
    counts_NV = similarity_NV > -torch.inf
    alike_NVV = (label_NV[:, :, None] == label_NV[:, None, :]) & counts_NV[:, None, :]
    votes_NV = alike_NVV.sum(dim=2) * counts_NV
    # The votes for one label add up the same numbers in the same order: their sums are equal to the bit.
    similarity_NV = torch.where(alike_NVV, similarity_NV[:, None, :], 0.0).sum(dim=2)
    votes_N1 = votes_NV.amax(dim=1, keepdim=True)
    leads_NV = counts_NV & (votes_NV == votes_N1)
    if ties == "similarity":
        sums_NV = similarity_NV.masked_fill(~leads_NV, -torch.inf)
        leads_NV = leads_NV & (sums_NV == sums_NV.amax(dim=1, keepdim=True))
    unreached = torch.iinfo(label_NV.dtype).max
    label_N, at_N = torch.where(leads_NV, label_NV, unreached).min(dim=1)
    votes_N, similarity_N = votes_N1[:, 0], similarity_NV.gather(1, at_N[:, None])[:, 0]
    nobody_N = votes_N == 0
    return Majority(label_N.masked_fill(nobody_N, -1), votes_N, similarity_N.masked_fill(nobody_N, -torch.inf))
