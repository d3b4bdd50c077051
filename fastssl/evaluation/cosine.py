"""Cosine similarity of every query with every image of a bank, in pieces that fit any memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl.evaluation.shards import BLOCK, passing, totals

MAX_ELEMENTS = 2**25  # of one block of similarities, of all ranks' queries: 128 MiB in fp32


def cosine_blocks(
    queries_QD: Tensor, bank_ND: Tensor, labels_N: Tensor, device: torch.device | str
) -> Iterator[tuple[Tensor, Tensor]]:
    """(cosines [Q, n], labels [n]) for the bank's rows in order, n at a time, on `device`.

    Of several ranks each has queries of its own and its part of the bank, and meets the parts of all in their order.
    The queries stay on the device, the bank passes by. Rows are L2-normalised with 1e-12 as the smallest norm.
    """
    (num_queries,) = totals(len(queries_QD))
    rows = max(1, min(BLOCK, MAX_ELEMENTS // max(1, num_queries)))
    q_QD = F.normalize(queries_QD.to(device), dim=1, eps=1e-12)
    for bank_nD, labels_n in passing(bank_ND, labels_N, block=rows, device=device):
        yield q_QD @ F.normalize(bank_nD, dim=1, eps=1e-12).T, labels_n


@contextmanager
def full_fp32() -> Iterator[None]:
    """Matrix products without TF32, whatever training uses: it is off by up to 1e-3 in a cosine, 1e-2 in cos / tau."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
