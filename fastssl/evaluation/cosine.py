"""Cosine similarity of every query with every image of a bank, in pieces that fit any memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_ELEMENTS = 2**25  # of one block of similarities: 128 MiB in fp32
MAX_ROWS = 4096  # of the bank in one block, however few the queries


def cosine_blocks(
    queries_QD: Tensor, bank_ND: Tensor, labels_N: Tensor, device: torch.device | str
) -> Iterator[tuple[Tensor, Tensor]]:
    """(cosines [Q, n], labels [n]) for the bank's rows in order, n at a time, on `device`.

    The queries stay on the device, the bank passes by. Rows are L2-normalised with 1e-12 as the smallest norm.
    """
    q_QD = F.normalize(queries_QD.to(device), dim=1, eps=1e-12)
    rows = max(1, min(MAX_ROWS, MAX_ELEMENTS // len(q_QD)))
    for bank_nD, labels_n in zip(bank_ND.split(rows), labels_N.split(rows), strict=True):
        b_nD = F.normalize(bank_nD.to(device), dim=1, eps=1e-12)
        yield q_QD @ b_nD.T, labels_n.to(device)


@contextmanager
def full_fp32() -> Iterator[None]:
    """Matrix products without TF32, whatever training uses: it is off by up to 1e-3 in a cosine, 1e-2 in cos / tau."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
