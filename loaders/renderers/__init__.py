"""Pixels from ids and boxes: each renderer turns a step's rows into uint8 NHWC crops."""

from collections.abc import Mapping
from typing import Any, Protocol

from loaders.plan.plan import Rows


class Renderer(Protocol):
    """What the loader asks of each. `device_id`: the GPU whose torch tensors it fills; None: it fills NumPy arrays."""

    device_id: int | None

    def render(self, rows: Rows, out: Mapping[str, Any]) -> None:
        """Fill out[view name], uint8 [copies * B, S, S, C], with the crops that `rows` describes, copy-major."""
