"""Vision transformers (Dosovitskiy et al. 2021; DeiT, Touvron et al. 2021): timm's layout and key names, the class
token out, no classifier.

Norm before each half of a block, and once at the end. Positions are learned for one size of image, and interpolated for
others as timm does it: bicubic, with antialias.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastssl.nn.norm.lockstep import Lockstep
from fastssl.nn.recompute import Blocks
from fastssl.nn.trunks.trunk import Trunk

EPS = 1e-6  # of all norms
STD = 0.02  # of first weights and positions


class PatchEmbed(nn.Module):
    """[N, C, H, W] -> [N, H / patch, W / patch, width], by a convolution whose stride is its size."""

    def __init__(self, in_channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        patches: Tensor = self.proj(x).permute(0, 2, 3, 1)
        return patches


class Attention(nn.Module):
    """Every token looks at all tokens of its image: [N, T, width] -> [N, T, width]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        with _with_forward_mode():
            seen = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(seen.transpose(1, 2).flatten(2))
        return out


def _with_forward_mode() -> AbstractContextManager[None]:
    """The one way of attention that has forward-mode derivatives, where they are asked for."""
    return sdpa_kernel(SDPBackend.MATH) if forward_ad._current_level >= 0 else nullcontext()


class Mlp(nn.Module):
    """Linear to `ratio` times the width, GELU, linear back."""

    def __init__(self, width: int, ratio: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, ratio * width)
        self.fc2 = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class LayerScale(nn.Module):
    """Each channel times a weight of its own."""

    def __init__(self, width: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class VitBlock(Lockstep):
    """Attention, then an MLP over each token, each on a norm of its input and added to it."""

    def __init__(self, width: int, heads: int, layer_scale: float | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, EPS)
        self.attn = Attention(width, heads)
        self.ls1 = _layer_scale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, EPS)
        self.mlp = Mlp(width)
        self.ls2 = _layer_scale(width, layer_scale)

    def lockstep(self, xs: Sequence[Tensor]) -> list[Tensor]:
        return [self._one(x) for x in xs]

    def _one(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


def _layer_scale(width: int, start: float | None) -> nn.Module:
    return nn.Identity() if start is None else LayerScale(width, start)


class VitTrunk(Trunk):
    """[N, in_channels, H, W] -> [N, width]: the class token behind the last norm. H and W are multiples of `patch`.

    size         pixels a side for which there are positions
    registers    tokens that stand beside the class token, without positions (Darcet et al. 2024)
    layer_scale  where the weights begin by which each half of a block is scaled; None: it is not
    """

    def __init__(
        self,
        size: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        in_channels: int = 3,
        *,
        registers: int = 0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.patch, self.num_features = patch, width
        self.undecayed = frozenset({"cls_token", "pos_embed", "reg_token"})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.reg_token = nn.Parameter(torch.zeros(1, registers, width)) if registers else None
        self.pos_embed = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + (not registers), width))
        self.patch_embed = PatchEmbed(in_channels, patch, width)
        self.blocks = Blocks(*(VitBlock(width, heads, layer_scale) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, EPS)
        _initialise(self)

    def lockstep(self, xs: Sequence[Tensor]) -> list[Tensor]:
        xs = self.blocks.lockstep([self._tokens(x) for x in xs])
        return [self.norm(x[:, 0]) for x in xs]

    def _tokens(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, T, width]: class token, registers, patches row by row."""
        patches = self.patch_embed(x)
        height, width = patches.shape[1:3]
        first: Tensor = self.cls_token
        positions: Tensor = self.pos_embed
        if self.reg_token is None:
            first, positions = first + positions[:, :1], positions[:, 1:]
        else:
            first = torch.cat([first, self.reg_token], 1)
        # Under autocast what blocks add to stays in float32, as the positions are.
        patches = patches.flatten(1, 2) + interpolated(positions, (height, width))
        return torch.cat([first.expand(len(x), -1, -1), patches], 1)


def interpolated(positions_1TD: Tensor, sides: tuple[int, int]) -> Tensor:
    """Positions of a square of patches, for one of these sides: [1, T, D] -> [1, sides[0] * sides[1], D]."""
    side = math.isqrt(positions_1TD.shape[1])
    if sides == (side, side):
        return positions_1TD
    grid = positions_1TD.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    wide = grid.to(torch.promote_types(grid.dtype, torch.float32))
    found = F.interpolate(wide, sides, mode="bicubic", antialias=True)
    return found.permute(0, 2, 3, 1).flatten(1, 2).to(positions_1TD.dtype)


@torch.no_grad()
def _initialise(trunk: VitTrunk) -> None:
    """As timm draws it: linear layers and positions from a normal distribution (which timm cuts at a hundred standard
    deviations), biases zero, the patches' convolution as torch does."""
    for layer in trunk.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=STD)
            nn.init.zeros_(layer.bias)
    nn.init.normal_(trunk.pos_embed, std=STD)
    for token in (trunk.cls_token, trunk.reg_token):
        if token is not None:
            nn.init.normal_(token, std=1e-6)
