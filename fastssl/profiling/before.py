"""What a profile knows before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastssl.costs.cost import StepCost


@dataclass(frozen=True)
class Before:
    """What is known before anything is measured.

    cost, headline  of the step that is run (None where it cannot be traced), and of the 64-GPU job
    batch_global    images of the epoch's stream in the step that is run; images_recipe in the recipe's own
    per_image       images of each stream a step, in the recipe as it stands
    recurring       streams whose images come back, which a cache of decoded images serves
    files_bytes     of some images as they are stored, and decoded_bytes of the same ones decoded; of arrays none
    """

    identity: Mapping[str, Any]
    cost: StepCost | None
    headline: StepCost
    device: str
    world: int
    epoch_of: str
    batch_global: int
    streams: Mapping[str, int]
    recurring: tuple[str, ...]
    files_bytes: Sequence[int]
    decoded_bytes: Sequence[int]
    in_memory: bool
    notes: tuple[str, ...] = ()
