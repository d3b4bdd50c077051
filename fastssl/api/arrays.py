"""What users give as data from Python, as `[KEY=]PATH` values: arrays are written where every rank finds them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastssl.errors import ConfigError
from loaders.store.arrays import write_arrays

ARRAYS = "arrays"  # of a run directory: the arrays that it was given, each in a folder named by its content


def specs_of(data: Any, labels: Any, out: Path) -> tuple[str, ...]:
    """`data`: a path; uint8 images [N, H, W, C] (then `labels` [N] are theirs), or a pair of images and labels; or a
    mapping from the keys of `--data` to any of these. Raises ConfigError that says in one line what is wrong."""
    if data is None:
        return ()
    if isinstance(data, Mapping):
        return tuple(f"{key}={_path_of(each, None, out, f'data[{key!r}]')}" for key, each in data.items())
    return (_path_of(data, labels, out, "data"),)


def _path_of(data: Any, labels: Any, out: Path, name: str) -> str:
    if isinstance(data, str | Path):
        return str(data)
    if isinstance(data, tuple) and len(data) == 2:
        data, labels = data
    images = images_of(data, name)
    labels = np.full(len(images), -1) if labels is None else _labels_of(labels, len(images))
    return str(write_arrays(images, labels, out / ARRAYS))


def images_of(data: Any, name: str) -> np.ndarray:
    """uint8 [N, H, W, C] with 1 or 3 channels. Raises ConfigError."""
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 4 or data.shape[3] not in (1, 3):
        raise ConfigError(
            f"{name} is {_described(data)}: give a path, or images as a uint8 array [N, height, width, 1 or 3]"
        )
    if not len(data):
        raise ConfigError(f"{name} holds no image")
    return data


def _labels_of(labels: Any, num_images: int) -> np.ndarray:
    found = np.asarray(labels)
    if found.shape != (num_images,) or found.dtype.kind not in "iuU":
        raise ConfigError(
            f"labels are {_described(found)}: give a whole number or a name for each of {num_images:,} images "
            "(-1 or '': none)"
        )
    return found


def _described(data: Any) -> str:
    """`a float64 array of shape (3, 4)`, `a DataFrame`."""
    if isinstance(data, np.ndarray):
        return f"a {data.dtype} array of shape {data.shape}"
    return f"a {type(data).__name__}"
