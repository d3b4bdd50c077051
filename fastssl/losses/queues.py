"""Queues of embeddings of labelled images, one for each view, that all ranks hold alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastssl.losses.keyed_draws import below


class LabelledQueues(nn.Module):
    """L ring buffers of `capacity` embeddings, which take the same images at the same time: one set of labels, one
    write position. A slot whose label is -1 is empty.

    With `random_start`, slots begin as unit Gaussian directions with uniform labels below `num_classes`, drawn from
    torch's generator; else empty.

    z_LCD    float32 [L, capacity, width], as put in
    label_C  int64 [capacity]
    next     int64, 0-dim: where the next labelled image goes
    """

    z_LCD: Tensor
    label_C: Tensor
    next: Tensor

    def __init__(
        self, num_queues: int, capacity: int, width: int, num_classes: int, random_start: bool = False
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        shape = num_queues, capacity, width
        unit_LCD = nn.functional.normalize(torch.randn(shape), dim=2) if random_start else torch.zeros(shape)
        label_C = torch.randint(num_classes, (capacity,)) if random_start else torch.full((capacity,), -1)
        self.register_buffer("z_LCD", unit_LCD)
        self.register_buffer("label_C", label_C)
        self.register_buffer("next", torch.zeros((), dtype=torch.int64))

    @property
    def used_C(self) -> Tensor:
        """Whether a slot holds an image."""
        return self.label_C >= 0

    @torch.no_grad()
    def put(self, z_NLD: Tensor, label_N: Tensor) -> Tensor:
        """Write the rows whose label is not -1, over the oldest entries; N is at most the capacity. Returns each row's
        slot [N], -1 for rows left out.

        To be given the same rows on every rank. How many are labelled is never asked: every row gets a slot of its own,
        and those of the others are written back as they were.
        """
        capacity = len(self.label_C)
        assert len(label_N) <= capacity
        labelled_N = label_N >= 0
        number_N = labelled_N.cumsum(0)
        num_labelled = number_N[-1]
        place_N = torch.where(labelled_N, number_N - 1, num_labelled + (~labelled_N).cumsum(0) - 1)
        slot_N = (self.next + place_N) % capacity
        z_LND = torch.where(labelled_N[:, None], z_NLD.transpose(0, 1).to(self.z_LCD.dtype), self.z_LCD[:, slot_N])
        self.label_C.index_copy_(0, slot_N, torch.where(labelled_N, label_N, self.label_C[slot_N]))
        self.z_LCD.index_copy_(1, slot_N, z_LND)
        self.next.copy_((self.next + num_labelled) % capacity)
        return torch.where(labelled_N, slot_N, -1)

    @torch.no_grad()
    def draw(self, label_B: Tensor, bits_BM: Tensor, without_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Slots of entries of each row's label, uniform and with replacement: (slot [B, M], whether there is one [B]).

        bits_BM    draws of `fastssl.losses.keyed_draws.random_bits`
        without_B  a slot of the row's label that is left out, -1 for none

        Where a label has no entry, or is -1, slots are of any kind.
        """
        key_C = torch.where(self.used_C, self.label_C, self.num_classes)
        slot_C = key_C.argsort(stable=True)
        count_K = torch.zeros(self.num_classes + 1, dtype=torch.int64, device=key_C.device)
        count_K.index_add_(0, key_C, torch.ones_like(key_C))
        first_K = count_K.cumsum(0) - count_K
        label_or_0_B = label_B.clamp_min(0)
        first_B, count_B = first_K[label_or_0_B], count_K[label_or_0_B] * (label_B >= 0)
        if without_B is None:
            place_BM = below(bits_BM, count_B[:, None])
        else:
            # The entries after the one left out move up by one.
            place_C = torch.empty_like(slot_C).index_copy_(0, slot_C, torch.arange(len(slot_C), device=slot_C.device))
            left_out_B = without_B >= 0
            count_B = count_B - left_out_B.to(torch.int64)
            place_BM = below(bits_BM, count_B[:, None])
            own_B1 = (place_C[without_B.clamp_min(0)] - first_B)[:, None]
            place_BM = place_BM + (left_out_B[:, None] & (place_BM >= own_B1)).to(torch.int64)
        slot_BM = slot_C[(first_B[:, None] + place_BM).clamp(max=len(slot_C) - 1)]
        return slot_BM, count_B > 0
