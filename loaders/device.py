"""Of a GPU what a loader must know: its number, the one stream on which this process copies to it, what it can run."""

from __future__ import annotations

import functools

import torch


def numbered(device: torch.device | str) -> torch.device:
    """`device`, a GPU with its number: the current one's where none is given, as many of torch's calls must be told."""
    device = torch.device(device)
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Where all loaders of this process copy to `device` and finish. Memory that torch has got for one stream it gives
    to no other, so that a stream for each loader would keep what one evaluation took from the next."""
    return torch.cuda.Stream(device)


@functools.cache
def runs_triton(device: torch.device) -> bool:
    """Whether it is a GPU of compute capability 8.0 or more, the least that Triton supports: not a V100."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
