"""Vision transformers."""

from __future__ import annotations

from dataclasses import dataclass

from fastssl.nn.encoders.encoder import Encoder, Likeness
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.nn.trunks.stem import Norm
from fastssl.nn.trunks.vit import VitTrunk

_NAMES = {(192, 12, 3): "Ti", (384, 12, 6): "S", (768, 12, 12): "B", (1024, 24, 16): "L"}
_OF_TIMM = {"Ti": "tiny", "S": "small", "B": "base", "L": "large"}


@dataclass(frozen=True)
class ViT(Encoder):
    """timm's `vit_*_patch*_224`; by default ViT-S/16. `size` is that of the images whose positions are learned: other
    crops have theirs interpolated. There is no batch norm in it.

    layer_scale and registers are DINOv2's: `ViT(518,14,384,12,6,layer_scale=1e-5,registers=4)` takes its ViT-S/14 with
    registers.
    """

    size: int = 224
    patch: int = 16
    width: int = 384
    depth: int = 12
    heads: int = 6
    registers: int = 0
    layer_scale: float | None = None

    def __post_init__(self) -> None:
        if min(self.size, self.patch, self.width, self.depth, self.heads) < 1 or self.registers < 0:
            raise ValueError("size, patch, width, depth and heads must be 1 at least, registers 0")
        if self.size % self.patch:
            raise ValueError(f"patches of {self.patch} pixels do not fill images of {self.size}")
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads cannot share a width of {self.width}")

    @property
    def name(self) -> str:
        """`ViT-S/16`; `ViT/2 of width 64, depth 6, 4 heads` where the field has no letter for it."""
        letter = _NAMES.get((self.width, self.depth, self.heads))
        if letter is None:
            return f"ViT/{self.patch} of width {self.width}, depth {self.depth}, {self.heads} heads"
        return f"ViT-{letter}/{self.patch}"

    def build(self, in_channels: int = 3, norm: Norm = GlobalBatchNorm) -> VitTrunk:
        return VitTrunk(
            self.size, self.patch, self.width, self.depth, self.heads, in_channels,
            registers=self.registers, layer_scale=self.layer_scale,
        )  # fmt: skip

    def refused_size(self, size: int) -> str:
        return f"no multiple of its patches' {self.patch} pixels" if size % self.patch else ""

    def from_torchvision(self, channels: int) -> Likeness:
        letter = _NAMES.get((self.width, self.depth, self.heads))
        plain = self.registers == 0 and self.layer_scale is None and channels == 3
        known = plain and letter is not None and (self.size, self.patch) == (224, 16)
        timm = f"vit_{_OF_TIMM[letter]}_patch16_224" if letter and known else None
        return Likeness((f"a vision transformer with timm's names: {self.name}",), timm=timm, resizes=True)
