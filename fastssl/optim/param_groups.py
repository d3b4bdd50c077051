"""Which parameters an optimiser decays, and LARS adapts, and which take the raw gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

Rule = Literal["paper", "authors"]


def decayed_groups(parts: Sequence[Sequence[nn.Module]], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups a part: kernels, which are decayed, and the rest, which is not: see `kernel_names`."""
    groups = []
    for part in map(as_one, parts):
        names = kernel_names(part)
        named = [(name, p) for name, p in part.named_parameters() if p.requires_grad]
        groups.append({"params": [p for name, p in named if name in names], "weight_decay": weight_decay})
        groups.append({"params": [p for name, p in named if name not in names], "weight_decay": 0.0})
    return groups


def kernel_names(module: nn.Module) -> set[str]:
    """The parameters of two axes or more, but for those that a module within names in its `undecayed`, as a
    transformer its tokens and positions."""
    spared = {
        f"{name}.{own}".lstrip(".") for name, each in module.named_modules() for own in getattr(each, "undecayed", ())
    }
    return {name for name, p in module.named_parameters() if p.ndim > 1} - spared


def lars_groups(module: nn.Module, rule: Rule = "paper") -> list[dict[str, Any]]:
    """Two groups of `module`'s trainable parameters: [adapted and decayed, excluded], each in registration order.

    - ``"paper"``: all but `kernel_names` is excluded: every bias and every normalisation parameter.
    - ``"authors"``: excluded are the names that contain "bias" or "bn", which is the filter of PAWS's released code
      (facebookresearch/suncet). It leaves the scale of a projection shortcut's norm (``*.downsample.1.weight``, four
      in a ResNet-50) adapted and decayed, against the paper; the published numbers came from the code.

    Each group is ``{"params": [(name, parameter), …], "lars_exclude": bool}``, as torch's optimisers take it; a group
    may be empty, so that rates always come in twos. Raises ValueError for an unknown rule.
    """
    if rule not in ("paper", "authors"):
        raise ValueError(f"unknown rule {rule!r}; one of paper, authors")
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if rule == "paper":
        excluded = {name for name, _ in named} - kernel_names(module)
    else:
        excluded = {name for name, _ in named if "bias" in name or "bn" in name}
    return [
        {"params": [(name, p) for name, p in named if name not in excluded], "lars_exclude": False},
        {"params": [(name, p) for name, p in named if name in excluded], "lars_exclude": True},
    ]


def as_one(part: Sequence[nn.Module]) -> nn.Module:
    """The modules of a part as one, by whose names its parameters go."""
    return part[0] if len(part) == 1 else nn.ModuleList(part)
