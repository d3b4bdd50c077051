"""Rows of which each rank holds a part: a rank's own follow those of the rank before. Alone, a rank holds them all.

What is computed from them is the same on any number of ranks, to the last bit where rows are looked at block by block
in their order, for the parts end where blocks do. All ranks must call these functions in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastssl import dist

BLOCK = 256  # rows


def totals(*counts: int) -> list[int]:
    """Each of the counts over all ranks."""
    return [sum(of_ranks) for of_ranks in zip(*dist.gather_objects(counts), strict=True)]


def share(count: int) -> tuple[int, int]:
    """Of `count` things in order, this rank's: from the first up to the second number."""
    rank, world = dist.rank(), dist.world_size()
    return count * rank // world, count * (rank + 1) // world


def first_row(count: int) -> int:
    """The number of this rank's first row among all, of which it holds `count`."""
    return sum(dist.gather_objects(count)[: dist.rank()])


def whole(x_ND: Tensor) -> Tensor:
    """The rows of all ranks, on the CPU of each: for what is small beside features."""
    return dist.gather_ragged(x_ND.to(dist.message_device())).cpu()


def passing(*rows: Tensor, block: int = BLOCK, device: torch.device | str) -> Iterator[tuple[Tensor, ...]]:
    """The rows of all ranks on `device`, at most `block` of them at a time, the same on each rank; of tensors of equal
    length, which lie beside each other."""
    for owner, count in enumerate(dist.gather_objects(len(rows[0]))):
        for at in range(0, count, block):
            if owner == dist.rank():
                some = [x[at : at + block].to(device).contiguous() for x in rows]
            else:
                some = [x.new_empty(min(block, count - at), *x.shape[1:], device=device) for x in rows]
            yield tuple(dist.broadcast(x, owner) for x in some)


class Rows:
    """Rows of all ranks by their number; where `used_N` (bool, of this rank's) is given, these alone are counted."""

    def __init__(self, x_ND: Tensor, used_N: Tensor | None = None):
        self._x_ND, self._at_n = x_ND, None if used_N is None else used_N.nonzero()[:, 0]
        counts = dist.gather_objects(len(x_ND) if self._at_n is None else len(self._at_n))
        self._ends_W = torch.tensor(counts).cumsum(0)
        self._first = sum(counts[: dist.rank()])

    def __len__(self) -> int:
        return int(self._ends_W[-1])

    @property
    def width(self) -> int:
        return self._x_ND.shape[1]

    def __getitem__(self, numbers_B: Tensor) -> Tensor:
        """The rows of these numbers that are this rank's own, [b, D]."""
        own_b = numbers_B - self._first
        return self._x_ND[own_b if self._at_n is None else self._at_n[own_b]]

    def gathered(self, numbers_B: Tensor, device: torch.device | str) -> Tensor:
        """The rows of these numbers, of whichever ranks, in their order, on `device` of every rank."""
        owner_B = torch.searchsorted(self._ends_W, numbers_B, right=True)
        rows_BD = dist.gather_ragged(self[numbers_B[owner_B == dist.rank()]].to(device))
        came_B = owner_B.argsort(stable=True)  # whose row is the first that arrived, ...
        return rows_BD[came_B.argsort().to(device)] if dist.world_size() > 1 else rows_BD
