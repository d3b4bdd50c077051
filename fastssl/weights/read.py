"""Weights from elsewhere: other runs, exported files, published checkpoints; one form for all.

Our names for a network's parts, which every method's online module keeps: `trunk`, `projection` (whose first three
layers are linear, norm, ReLU), `prediction`; in a fine-tuned network `first`, the first projection layer, and `fc`, a
classifier on that or on the trunk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastssl.weights import layouts
from fastssl.weights.tensor_files import WeightsError, read_tensors
from fastssl.weights.transformers import why_not, with_positions
from loaders.files import sha256_of

BACKBONE, HEADS, CONFIG = "backbone.safetensors", "heads.safetensors", "config.json"  # an exported folder
MAX_LEFT = 12  # entries named in a message
COUNTER = "num_batches_tracked"  # of batch norms: nothing reads it, and files from before 2018 lack it


@dataclass(frozen=True)
class Weights:
    """Networks as tensors by name, on the CPU.

    nets    module ("online", "target") -> its state dict, in our names
    about   plain facts of who made them, as `Method.about` gives them; empty where nobody said
    source  where they are from, for messages
    layout  which kind of file that is, for messages
    entry   of the file, that they were taken from; empty where the file is nothing else
    left    the file's other entries
    """

    nets: Mapping[str, Mapping[str, Tensor]]
    about: Mapping[str, Any]
    source: str
    layout: str = layouts.CHECKPOINT
    entry: str = ""
    left: tuple[str, ...] = ()

    def __str__(self) -> str:
        """What was found, and what was not taken, in one line."""
        taken = f", its `{self.entry}`" if self.entry else ""
        more = f" and {len(self.left) - MAX_LEFT} more" if len(self.left) > MAX_LEFT else ""
        left = f"; left alone: {', '.join(self.left[:MAX_LEFT])}{more}" if self.left else ""
        return f"weights from {self.source}: {self.layout}{taken}{left}"

    def load_whole(self, module: nn.Module, name: str) -> None:
        """Load all of `name` into `module`. Raises WeightsError where a tensor is missing, left over or of another
        shape; then nothing is loaded."""
        load_whole(module, self.nets[name], self.source)

    def part(self, prefix: str, name: str = "online") -> dict[str, Tensor]:
        """The tensors of the part `prefix` ("trunk", "projection"), without it in their names; empty where there is no
        such part."""
        dotted = f"{prefix}."
        return {key.removeprefix(dotted): t for key, t in self.nets[name].items() if key.startswith(dotted)}

    def shared_parts(self, module: nn.Module, name: str = "online") -> dict[str, Tensor]:
        """The tensors of `name` in those parts that `module` has too, by the module's names. Raises WeightsError where
        one of these parts does not fit whole, or where there is none."""
        shared = parts_of(module.state_dict()) & parts_of(self.nets[name])
        if not shared:
            theirs, own = (", ".join(sorted(parts_of(t))) for t in (self.nets[name], module.state_dict()))
            raise WeightsError(f"{self.source} has no part of this network: it has {theirs}, and this one {own}")
        own_tensors = {key: t for key, t in module.state_dict().items() if _part(key) in shared}
        return fitting(own_tensors, {key: t for key, t in self.nets[name].items() if _part(key) in shared}, self.source)


def parts_of(tensors: Mapping[str, Tensor]) -> set[str]:
    """The parts of a network that hold tensors, from a state dict."""
    return {_part(key) for key in tensors}


def _part(key: str) -> str:
    return key.partition(".")[0]


def load_whole(module: nn.Module, theirs: Mapping[str, Tensor], source: str) -> None:
    """Load the tensors `theirs` into `module`, all or none. Raises WeightsError, which names what does not fit."""
    module.load_state_dict(fitting(module.state_dict(), theirs, source))


def fitting(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """`theirs`, to be loaded where `own` are; counters that they lack stay our own, and a transformer's positions are
    interpolated. Raises WeightsError, which lists what is missing, left over or of another shape."""
    if differs := why_not(own, theirs):
        raise WeightsError(f"{source} is another vision transformer than this recipe's: {differs}; nothing loaded")
    found = {key: t for key, t in own.items() if key.endswith(COUNTER)} | with_positions(own, theirs)
    wrong = []
    for key in sorted(found.keys() | own.keys()):
        if key not in found:
            wrong.append(f"{key} is missing")
        elif key not in own:
            wrong.append(f"{key} is left over")
        elif found[key].shape != own[key].shape:
            wrong.append(f"{key} is {list(found[key].shape)}, not {list(own[key].shape)}")
    if wrong:
        listed = "; ".join(wrong[:3]) + ("; ..." if len(wrong) > 3 else "")
        raise WeightsError(f"{source}: {len(wrong)} tensors do not fit ({listed}); nothing loaded")
    return found


def read_weights(path: Path, unsafe_pickle: bool = False) -> Weights:
    """The networks in the file `path`, or in an exported folder, its layout recognised: a checkpoint or export of
    ours, a checkpoint of PAWS's or SemPPL's authors, a ResNet of torchvision's or timm's, or a checkpoint of one, from
    timm's training script, torchvision's or pytorch/examples', or a vision transformer of timm's, DINOv2's or DINOv3's,
    or another network of timm's. `unsafe_pickle` as in `read_tensors`. Raises WeightsError where it holds none."""
    state, metadata = read_tensors(path / BACKBONE if path.is_dir() else path, unsafe_pickle)
    if metadata.get("layout") == layouts.EXPORT:
        return _exported(path if path.is_dir() else path.parent)
    found = layouts.recognise(state)
    if found is None:
        raise WeightsError(f"{path} has no layout that is known; {_first_keys(state)}")
    about = state.get("about", {}) if found.layout == layouts.CHECKPOINT else {}
    return Weights(found.nets, about, str(path), found.layout, found.entry, found.left)


def _first_keys(state: Mapping[str, Any]) -> str:
    def listed(keys: Mapping[str, Any]) -> str:
        return ", ".join(map(str, list(keys)[:5])) or "none"

    entry = layouts.entry_of(state)
    inside = f"; those of its `{entry}`, which is no ResNet: {listed(state[entry])}" if entry else ""
    return f"its first keys: {listed(state)}{inside}"


def _exported(folder: Path) -> Weights:
    """The networks that `fastssl.export` wrote. Files that are gone lack their parts; those that are there must be what
    was written, for `config.json` says what they are."""
    config = folder / CONFIG
    try:
        described = json.loads(config.read_text())
        digests, about = dict(described["files"]), dict(described["about"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise WeightsError(f"{config}, which says what is beside it, is not there or damaged: export again") from error
    online: dict[str, Tensor] = {}
    for name, prefix in ((BACKBONE, "trunk."), (HEADS, "")):
        path = folder / name
        if path.exists():
            if sha256_of(path) != digests.get(name):
                raise WeightsError(f"{path} is not the file that {CONFIG} describes: export again")
            online |= {f"{prefix}{key}": tensor for key, tensor in read_tensors(path)[0].items()}
    return Weights({"online": online}, about, str(folder), layouts.EXPORT)
