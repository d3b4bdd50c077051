"""What the loader hands to a method: a `Batch` of `Part`s, one part a stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Part:
    """One stream's rows of one step on one rank: B images.

    x        view name -> float tensor [turns * copies * B, C, H, W], channels-last, turn-major then copy-major
    ids      int64 [B], index into the source
    labels   int64 [B], -1 where the label is hidden or unknown, so that a loss cannot cheat
    columns  int64 [B], the image's class column in this step's global batch (`Balanced` streams), else None
    keys     int64 [B], one well-mixed key an image, a function of (seed, stream, position): seeds device-side
             draws (noise, negatives) that must not depend on the number of ranks
    positions int64 [B], places in the endless stream
    """

    x: dict[str, Tensor]
    ids: Tensor
    labels: Tensor
    columns: Tensor | None
    keys: Tensor
    positions: Tensor


@dataclass
class Batch:
    """All streams of one step. `release()` gives the pixel buffers back to the loader; the tensors must not be
    used after that."""

    parts: dict[str, Part]
    step: Tensor  # int64, 0-dim, on the device
    release: Callable[[], None] = field(default=lambda: None)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device` (the batch itself where it is there already)."""
        if self.step.device == device:
            return self

        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device, non_blocking=True)

        parts = {
            name: Part(
                {view: x.to(device, non_blocking=True) for view, x in part.x.items()},
                *(move(t) for t in (part.ids, part.labels, part.columns, part.keys, part.positions)),  # type: ignore[arg-type]
            )
            for name, part in self.parts.items()
        }
        return Batch(parts, self.step.to(device, non_blocking=True), self.release)
