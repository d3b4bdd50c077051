"""The tensors and arrays of a pickle, torch's or a plain one, written as safetensors: `python -I unpickle.py SOURCE
TARGET`.

Opening a pickle runs whatever code it holds, so `tensor_files` starts this as a process of its own, and only
where the user asked for it. Names of nested dicts are joined by slashes. All that is neither is dropped.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn


def tensors_in(value: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in nested dicts and modules; each with memory of its own, as safetensors ask."""
    if isinstance(value, nn.Module):
        value = value.state_dict()
    elif hasattr(value, "__array__") and not isinstance(value, Tensor):  # NumPy's, JAX's
        array = np.asarray(value)
        value = torch.from_numpy(array.copy()) if array.dtype.kind in "fiub" and array.dtype != np.uint32 else None
    if isinstance(value, Tensor):
        yield name, value.detach().clone(memory_format=torch.contiguous_format)
    elif isinstance(value, Mapping):
        for key, each in value.items():
            inner = str(key).replace("/", ".")
            yield from tensors_in(each, f"{name}/{inner}" if name else inner)


def loaded(source: str) -> object:
    """What the pickle holds, whoever wrote it."""
    try:
        return torch.load(source, map_location="cpu", weights_only=False)
    except RuntimeError:  # no file of torch's
        with open(source, "rb") as file:
            return pickle.load(file)


if __name__ == "__main__":
    source, target = sys.argv[1:]
    save_file(dict(tensors_in(loaded(source))), target)
