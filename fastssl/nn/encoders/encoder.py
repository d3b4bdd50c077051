"""What an encoder is to methods, exports and the command line.

A new one is a file in this folder: a frozen dataclass and, in it or among the trunks, its module. `--set encoder=...`
finds it by its name; nothing is registered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.nn.trunks.stem import Norm
from fastssl.nn.trunks.trunk import Trunk


@dataclass(frozen=True)
class Likeness:
    """How a trunk is like torchvision's ResNets: what differs, in words, and lines of Python that make one of these
    into it, none where there are no such lines. `timm` names timm's model where that is the same; `resizes` says that
    it takes images of other sizes than it was made for where it is made with dynamic_img_size=True, and only there."""

    differs: tuple[str, ...]
    lines: tuple[str, ...] = ()
    timm: str | None = None
    resizes: bool = False


@dataclass(frozen=True)
class Encoder(ABC):
    """A trunk as configuration."""

    @abstractmethod
    def build(self, in_channels: int = 3, norm: Norm = GlobalBatchNorm) -> Trunk:
        """Its module, freshly drawn by torch's generator: [N, in_channels, H, W] -> [N, num_features]."""

    @property
    @abstractmethod
    def name(self) -> str:
        """As papers would call it: `ResNet-50`."""

    def num_features(self, channels: int = 3) -> int:
        """How wide the features are of what it builds; by shapes alone, nothing is drawn."""
        with unset_fake_temporarily(), torch.device("meta"):
            return self.build(channels).num_features

    def refused_size(self, size: int) -> str:
        """Why images of `size` pixels a side cannot be its input; empty where they can."""
        return ""

    def from_torchvision(self, channels: int) -> Likeness:
        """What those who have torchvision must know to build it, for images of `channels`."""
        return Likeness((f"another network than its ResNets: {self.name}",))
