"""The layouts of files of weights: recognised by their keys, and put in our names.

A network of ours names its parts `trunk`, `projection`, `prediction`, `first` and `fc`: see `fastssl.weights.read`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fastssl.weights import transformers

Tensors = dict[str, Mapping[str, Tensor]]  # "online", "target" -> a state dict in our names

CHECKPOINT, EXPORT = "fastssl checkpoint", "fastssl export"  # the latter is recognised by its metadata
PAWS, TORCHVISION = "checkpoint of PAWS's authors", "torchvision's or timm's ResNet"
SEMPPL = "checkpoint of SemPPL's authors"
TIMM = "timm's network"

# Where training scripts keep a network's weights, the average first, as timm's own loading prefers it: timm
# (state_dict_ema, state_dict), torchvision's references (model_ema, model), pytorch/examples (state_dict).
ENTRIES = ("state_dict_ema", "model_ema", "state_dict", "model")
AVERAGE_COUNTER = "n_averaged"  # of torch.optim.swa_utils.AveragedModel


@dataclass(frozen=True)
class Recognised:
    """What a file turned out to hold.

    layout  its name
    nets    the networks
    entry   of the file, that they were taken from; empty where the file is nothing else
    left    the file's other entries
    """

    layout: str
    nets: Tensors
    entry: str = ""
    left: tuple[str, ...] = ()


def recognise(state: Mapping[str, Any]) -> Recognised | None:
    """What `state`, the content of a file, holds; None where no layout fits."""
    return next(filter(None, (in_our_names(state) for in_our_names in _LAYOUTS.values())), None)


def entry_of(state: Mapping[str, Any]) -> str:
    """The entry under which a training script's checkpoint keeps a network; empty where there is none."""
    return next((key for key in ENTRIES if _is_state_dict(state.get(key))), "")


def _of_checkpoint(state: Mapping[str, Any]) -> Recognised | None:
    nets = state.get("nets")
    if not isinstance(nets, dict) or not all(_is_state_dict(net) for net in nets.values()):
        return None
    return Recognised(CHECKPOINT, nets)


def _of_paws(state: Mapping[str, Any]) -> Recognised | None:
    """facebookresearch/suncet: under `encoder`, trunk and heads in one module, `module.` before each name where several
    GPUs trained it. The projection head is `fc` (fc1, bn1, fc2, bn2, fc3) and the prediction head `pred`. A fine-tuned
    network has the first projection layer in `fc.fc1` and `fc.bn1`, and its classifier in `fc.fc2`. A Wide ResNet has
    a shortcut's convolution in a sequence of one."""
    encoder = _unwrapped(state.get("encoder"))
    if encoder is None:
        return None
    heads = {"fc.": "projection.", "pred.": "prediction."}
    if "fc.fc3.weight" not in encoder:
        heads = {"fc.fc2.": "fc.", "fc.": "first."}
    return _found(PAWS, encoder, heads, "encoder", state)


def _of_transformer(state: Mapping[str, Any]) -> Recognised | None:
    """One flat state dict, or a training script's checkpoint around it; the classifier is `head`."""
    entry = entry_of(state)
    net = _without_wrappers(state[entry] if entry else state)
    if net is None or not transformers.is_transformer(net):
        return None
    layout, tensors, left = transformers.in_timms_names(net)
    found = _found(layout, tensors, {"head.": "fc."}, entry, state)
    return replace(found, left=(*left, *found.left))


def _of_timm(state: Mapping[str, Any]) -> Recognised | None:
    """As `_of_transformer`, a convolutional network that timm names its own way."""
    entry = entry_of(state)
    net = _without_wrappers(state[entry] if entry else state)
    if net is None or not net.keys() & {"conv_stem.weight", "stem.conv.weight", "stem.0.weight"}:
        return None
    return _found(TIMM, net, {"head.fc.": "fc.", "classifier.": "fc."}, entry, state)


def _of_semppl(state: Mapping[str, Any]) -> Recognised | None:
    """google-deepmind/semppl: Haiku's parameters and state by module, `res_net50/~/block_group_0/~/block_0/~/conv_0`,
    under `experiment_state`. Kernels are stored height, width, in, out; statistics as averages of `mean_ema` and
    `var_ema`; the arrays of some files have an axis of devices before all others. The names of its networks with
    selective kernels were not released. Stride-2 convolutions pad the far end more there, here both ends alike: the
    same weights give features that differ a little."""
    experiment = state.get("experiment_state")
    if not isinstance(experiment, Mapping) or not isinstance(experiment.get("online_params"), Mapping):
        return None
    net: dict[str, Tensor] = {}
    for module, tensors in [*experiment["online_params"].items(), *experiment.get("online_state", {}).items()]:
        name = _haiku_name(module)
        for key, tensor in tensors.items() if name else ():
            net |= _haiku_tensor(name, key, tensor)
    left = tuple(f"experiment_state.{key}" for key in experiment if key not in ("online_params", "online_state"))
    return Recognised(SEMPPL, {"online": net}, "online_params", left)


def _haiku_name(module: str) -> str:
    """Our name of one of its modules; empty for what no network of ours has, a probe's classifier."""
    parts = [part for part in re.split(r"[./]", module) if part not in ("~", "mean_ema", "var_ema")]
    statistics = {"mean_ema": ".running_mean", "var_ema": ".running_var"}.get(re.split(r"[./]", module)[-1], "")
    if parts[0] in ("projector", "predictor"):
        layer = {"linear": "fc1", "batch_norm": "bn1", "linear_1": "fc2"}.get(parts[-1])
        return f"{parts[0][:-2]}ion.{layer}{statistics}" if layer else ""
    first = {"initial_conv": "conv1", "initial_batchnorm": "bn1"}
    if parts[-1] in first:
        return f"trunk.{first[parts[-1]]}{statistics}"
    block = re.fullmatch(r"block_group_(\d+) block_(\d+) (conv|batchnorm|shortcut_conv|shortcut_batchnorm)_?(\d*)",
                         " ".join(parts[1:]))  # fmt: skip
    if block is None:
        return ""
    group, number, kind, index = block.groups()
    layers = {"conv": "conv", "batchnorm": "bn", "shortcut_conv": "downsample.0", "shortcut_batchnorm": "downsample.1"}
    return f"trunk.layer{int(group) + 1}.{number}.{layers[kind]}{int(index) + 1 if index else ''}{statistics}"


def _haiku_tensor(name: str, key: str, tensor: Tensor) -> dict[str, Tensor]:
    """By our name; empty for what running statistics are made of but their average."""
    if name.endswith(("running_mean", "running_var")):
        return {name: tensor.flatten()} if key == "average" else {}
    if key == "w":
        kernel = tensor.squeeze(0) if tensor.ndim in (3, 5) else tensor  # of the first of one device
        return {f"{name}.weight": kernel.permute(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T}
    return {f"{name}.{'weight' if key == 'scale' else 'bias'}": tensor.flatten()}


def _of_torchvision(state: Mapping[str, Any]) -> Recognised | None:
    """One flat state dict, or a training script's checkpoint around it; the classifier is `fc`."""
    entry = entry_of(state)
    net = _unwrapped(state[entry] if entry else state)
    return None if net is None else _found(TORCHVISION, net, {"fc.": "fc."}, entry, state)


_LAYOUTS: dict[str, Callable[[Mapping[str, Any]], Recognised | None]] = {
    CHECKPOINT: _of_checkpoint,
    PAWS: _of_paws,
    SEMPPL: _of_semppl,
    TORCHVISION: _of_torchvision,
    transformers.TIMM_VIT: _of_transformer,
    TIMM: _of_timm,
}


def _found(
    layout: str, net: Mapping[str, Tensor], heads: Mapping[str, str], entry: str, state: Mapping[str, Any]
) -> Recognised:
    left = tuple(str(key) for key in state if key != entry) if entry else ()
    return Recognised(layout, {"online": {_in_parts(key, heads): tensor for key, tensor in net.items()}}, entry, left)


def _unwrapped(net: object) -> Mapping[str, Tensor] | None:
    """A state dict without what wrappers put into its names: DataParallel, DistributedDataParallel and AveragedModel
    `module.`, torch.compile `_orig_mod.`. None where it is none, or none of a ResNet."""
    bare = _without_wrappers(net)
    return bare if bare is not None and _has_trunk(bare) else None


def _without_wrappers(net: object) -> Mapping[str, Tensor] | None:
    if not isinstance(net, Mapping) or not _is_state_dict(net):
        return None
    return {
        re.sub(r"^(module\.)+", "", key.replace("_orig_mod.", "")): tensor
        for key, tensor in net.items()
        if key != AVERAGE_COUNTER
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
