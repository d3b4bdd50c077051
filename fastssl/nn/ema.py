"""Exponential moving averages of a network's parameters: targets, momentum encoders, Polyak averages."""

import copy
import math
from typing import TypeVar

import torch
from torch import nn

Net = TypeVar("Net", bound=nn.Module)


def copy_of(online: Net) -> Net:
    """A second network with the same weights, which gets no gradient."""
    # deepcopy's own copies of tensors need memory that those of a dry run do not have
    tensors: dict[int, torch.Tensor] = {id(b): b.clone() for b in online.buffers()}
    tensors |= {id(p): nn.Parameter(p.detach().clone(), requires_grad=False) for p in online.parameters()}
    return copy.deepcopy(online, tensors)


@torch.no_grad()
def follow(target: nn.Module, online: nn.Module, decay: float) -> None:
    """target <- decay · target + (1 - decay) · online. Parameters only: each network keeps its own running statistics.

    Both have the same parameters in the same order. Never waits for the device.
    """
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), 1.0 - decay)


def cosine_decay(step: int, total_steps: int, start: float) -> float:
    """BYOL's: from `start` at step 0 along half a cosine up to 1 at `total_steps`."""
    return 1.0 - (1.0 - start) * (math.cos(math.pi * step / total_steps) + 1.0) / 2.0
