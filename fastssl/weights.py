"""Weights from elsewhere: other runs, exported files, published checkpoints; one form for all.

Our names for a network's parts, which every method's online module keeps: `trunk`, `projection` (whose first three
layers are linear, norm, ReLU), `prediction`, `fc` (a classifier on the trunk or on the first projection layer).
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.config import FastsslError


class WeightsError(FastsslError):
    """Weights that cannot be read, or that do not fit."""


@dataclass(frozen=True)
class Weights:
    """Networks as tensors by name, on the CPU.

    nets    module ("online", "target") -> its state dict, in our names
    about   plain facts of who made them, as `Method.about` gives them; empty where nobody said
    source  where they are from, for messages
    """

    nets: Mapping[str, Mapping[str, Tensor]]
    about: Mapping[str, Any]
    source: str

    def load_whole(self, module: nn.Module, name: str) -> None:
        """Load all of `name` into `module`. Raises WeightsError where a tensor is missing, left over or of another
        shape; then nothing is loaded."""
        load_whole(module, self.nets[name], self.source)

    def part(self, prefix: str, name: str = "online") -> dict[str, Tensor]:
        """The tensors of the part `prefix` ("trunk", "projection"), without it in their names; empty where there is no
        such part."""
        dotted = f"{prefix}."
        return {key.removeprefix(dotted): t for key, t in self.nets[name].items() if key.startswith(dotted)}


def load_whole(module: nn.Module, theirs: Mapping[str, Tensor], source: str) -> None:
    """Load the tensors `theirs` into `module`, all or none. Raises WeightsError, which names what does not fit."""
    own = module.state_dict()
    wrong = [key for key in sorted(theirs.keys() | own.keys()) if key not in theirs or key not in own]
    wrong += [key for key in sorted(theirs.keys() & own.keys()) if theirs[key].shape != own[key].shape]
    if wrong:
        raise WeightsError(f"{source}: {len(wrong)} tensors do not fit, the first {wrong[0]}; nothing loaded")
    module.load_state_dict(theirs)


def read_weights(path: Path) -> Weights:
    """The networks in the file `path`: a checkpoint's state. Raises WeightsError where it holds none."""
    if not zipfile.is_zipfile(path):
        raise WeightsError(f"{path} is {'no checkpoint' if path.exists() else 'not there'}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise WeightsError(f"{path} is no checkpoint that can be read") from error
    if not isinstance(state, dict) or "nets" not in state:
        raise WeightsError(f"{path} is no checkpoint of fastssl")
    return Weights(state["nets"], state.get("about", {}), str(path))
