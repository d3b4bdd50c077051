"""What a device can do."""

from __future__ import annotations

import torch


def runs_triton(device: torch.device) -> bool:
    """Whether it is a GPU of compute capability 8.0 or more, the least that Triton supports: not a V100."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
