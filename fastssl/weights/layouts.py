"""The layouts of files of weights: recognised by their keys, and put in our names.

A network of ours names its parts `trunk`, `projection`, `prediction`, `first` and `fc`: see `fastssl.weights.read`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Nets = dict[str, Mapping[str, Tensor]]  # "online", "target" -> a state dict in our names

CHECKPOINT, EXPORT = "fastssl checkpoint", "fastssl export"  # the latter is recognised by its metadata
PAWS, TORCHVISION = "checkpoint of PAWS's authors", "torchvision's or timm's ResNet"


def recognise(state: Mapping[str, Any]) -> tuple[str, Nets] | None:
    """The name of the layout of `state`, what a file held, and its networks; None where no layout fits."""
    for layout, in_our_names in _LAYOUTS.items():
        nets = in_our_names(state)
        if nets is not None:
            return layout, nets
    return None


def _of_checkpoint(state: Mapping[str, Any]) -> Nets | None:
    nets = state.get("nets")
    return nets if isinstance(nets, dict) and all(_is_state_dict(net) for net in nets.values()) else None


def _of_paws(state: Mapping[str, Any]) -> Nets | None:
    """facebookresearch/suncet: under `encoder`, trunk and heads in one module, `module.` before each name where several
    GPUs trained it. The projection head is `fc` (fc1, bn1, fc2, bn2, fc3) and the prediction head `pred`. A fine-tuned
    network has the first projection layer in `fc.fc1` and `fc.bn1`, and its classifier in `fc.fc2`. A Wide ResNet has
    a shortcut's convolution in a sequence of one."""
    encoder: Mapping[str, Tensor] = state.get("encoder", {})
    if not _is_state_dict(encoder):
        return None
    encoder = {key.removeprefix("module."): tensor for key, tensor in encoder.items()}
    if not _has_trunk(encoder):
        return None
    heads = {"fc.": "projection.", "pred.": "prediction."}
    if "fc.fc3.weight" not in encoder:
        heads = {"fc.fc2.": "fc.", "fc.": "first."}
    return {"online": {_in_parts(key, heads): tensor for key, tensor in encoder.items()}}


def _of_torchvision(state: Mapping[str, Any]) -> Nets | None:
    """One flat state dict; the classifier is `fc`."""
    if not _is_state_dict(state) or not _has_trunk(state):
        return None
    return {"online": {_in_parts(key, {"fc.": "fc."}): tensor for key, tensor in state.items()}}


_LAYOUTS: dict[str, Callable[[Mapping[str, Any]], Nets | None]] = {
    CHECKPOINT: _of_checkpoint,
    PAWS: _of_paws,
    TORCHVISION: _of_torchvision,
}


def _in_parts(key: str, heads: Mapping[str, str]) -> str:
    """Our name for `key`: that of the first of `heads` that it begins with, else the trunk's."""
    for theirs, ours in heads.items():
        if key.startswith(theirs):
            return ours + key.removeprefix(theirs)
    return f"trunk.{key.replace('.shortcut.0.', '.shortcut.')}"


def _is_state_dict(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(k, str) and isinstance(t, Tensor) for k, t in value.items())


def _has_trunk(tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are the names of a ResNet of torchvision's or PAWS's."""
    return {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight"} <= tensors.keys()
