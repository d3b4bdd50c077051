"""Files of vision transformers, in timm's names: timm's own, and those that DINOv2 and DINOv3 publish.

What only their training had is left out by name: the mask token, and of DINOv3 what its code computes anew (the periods
of its rotary positions, the mask of its biases) and biases that are zero. Positions are interpolated for a network that
has another number of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

TIMM_VIT, DINOV2, DINOV3 = "timm's vision transformer", "DINOv2's vision transformer", "DINOv3's vision transformer"
_POSITIONS = "pos_embed"


def is_transformer(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the names of a vision transformer of timm's, DINOv2's or DINOv3's."""
    return {"cls_token", "patch_embed.proj.weight", "blocks.0.norm1.weight"} <= tensors.keys()


def in_timms_names(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor], tuple[str, ...]]:
    """(whose layout it is, the tensors in timm's names, what was left out)."""
    if "storage_tokens" in tensors:
        return DINOV3, *_of_dinov3(tensors)
    left = tuple(key for key in tensors if key == "mask_token")
    kept = {key: t for key, t in tensors.items() if key not in left}
    if "register_tokens" in kept:
        # There the class token's position is added before the registers come; timm adds it once and for all.
        kept["reg_token"] = kept.pop("register_tokens")
        kept["cls_token"] = kept["cls_token"] + kept[_POSITIONS][:, :1]
        kept[_POSITIONS] = kept[_POSITIONS][:, 1:]
    return DINOV2 if left or "reg_token" in kept.keys() - tensors.keys() else TIMM_VIT, kept, left


def _of_dinov3(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    kept: dict[str, Tensor] = {}
    for key, t in tensors.items():
        block = key.removesuffix("qkv.bias")
        if key == "mask_token" or key.endswith((".periods", ".bias_mask")):
            continue
        if block == key:
            kept[re.sub(r"ls([12])\.gamma$", r"gamma_\1", key).replace("storage_tokens", "reg_token")] = t
        elif t.any():  # of query, key and value; the key's is held at zero
            kept[f"{block}q_bias"], _, kept[f"{block}v_bias"] = t.chunk(3)
    zero = tuple(key for key, t in tensors.items() if key.endswith("qkv.bias") and not t.any())
    dropped = tuple(k for k in tensors if k == "mask_token" or k.endswith((".periods", ".bias_mask")))
    return kept, dropped + zero


# -------------------------------------------------------------------------------------------------------- what it is


def why_not(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str:
    """In what a transformer among `theirs` differs from one among `own` of the same prefix; empty where both are alike,
    or are none. `patches of 14 pixels, not 16; 24 blocks, not 12`."""
    ours, found = _facts(own), _facts(theirs)
    if not ours or not found:
        return ""
    told = {"patch": "patches of {} pixels", "width": "width {}", "depth": "{} blocks", "registers": "{} registers",
            "scales": "{} scales a block", "positions": "{} table of positions"}  # fmt: skip
    return "; ".join(f"{told[k].format(found[k])}, not {ours[k]}" for k in told if found[k] != ours[k])


def _facts(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    key = next((key for key in tensors if key.endswith("patch_embed.proj.weight")), None)
    if key is None or tensors[key].dim() != 4:
        return {}
    prefix = key.removesuffix("patch_embed.proj.weight")
    inside = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    blocks = {name.split(".")[1] for name in inside if re.match(r"blocks\.\d+\.", name)}
    registers = inside.get("reg_token")
    scales = [name for name in inside if re.match(r"blocks\.0\.(ls\d\.gamma|gamma_\d)$", name)]
    return {
        "patch": tensors[key].shape[-1],
        "width": tensors[key].shape[0],
        "depth": len(blocks),
        "registers": 0 if registers is None else registers.shape[1],
        "scales": len(scales),
        "positions": int(_POSITIONS in inside),
    }


# -------------------------------------------------------------------------------------------------------- positions


def with_positions(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`theirs`, its positions interpolated to as many as `own` has; both are a square's, behind those of as many tokens
    before it (one or none)."""
    found = dict(theirs)
    for key, target in own.items():
        if key.endswith(_POSITIONS) and key in theirs and _can_be_resized(theirs[key], target):
            found[key] = _resized(theirs[key], target.shape[1])
    return found


def _can_be_resized(t: Tensor, target: Tensor) -> bool:
    if not t.dim() == target.dim() == 3 or t.shape[::2] != target.shape[::2] or t.shape == target.shape:
        return False
    return _num_first(t.shape[1]) == _num_first(target.shape[1]) is not None


def _num_first(num: int) -> int | None:
    """Positions before those of a square: one or none; None where `num` is neither a square nor one more."""
    return next((first for first in (0, 1) if math.isqrt(num - first) ** 2 == num - first), None)


def _resized(t: Tensor, num: int) -> Tensor:
    """As timm resizes them: bicubic, with antialias."""
    first = _num_first(num) or 0
    side, target = math.isqrt(t.shape[1] - first), math.isqrt(num - first)
    grid = t[:, first:].float().unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (target, target), mode="bicubic", antialias=True).permute(0, 2, 3, 1).flatten(1, 2)
    resized: Tensor = t.new_empty(1, num, t.shape[2])
    resized[:, :first], resized[:, first:] = t[:, :first], grid
    return resized
