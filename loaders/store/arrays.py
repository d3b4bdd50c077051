"""Images and labels as two `.npy` files in a folder, read where they lie: ranks share the pages."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from loaders.errors import StoreError
from loaders.files import whole_folder
from loaders.store.source import ArraySource

IMAGES, LABELS = "images.npy", "labels.npy"


def holds_arrays(path: Path) -> bool:
    return (path / IMAGES).is_file()


def open_arrays(path: Path) -> ArraySource:
    """`images.npy` uint8 [N, H, W, 1 or 3] and `labels.npy` [N] in the folder `path`: numbers, -1 for none, or names,
    empty for none; classes are numbered in their order. Raises StoreError."""
    try:
        images, labels = np.load(path / IMAGES, mmap_mode="r"), np.load(path / LABELS)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: {IMAGES} and {LABELS} cannot be read: {error}") from None
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or len(images) != len(labels):
        raise StoreError(
            f"{path}: {IMAGES} is {images.dtype} {list(images.shape)} beside {len(labels)} labels, not uint8 [N, H, W, "
            "1 or 3] with a label each"
        )
    known = labels != "" if labels.dtype.kind == "U" else labels >= 0
    classes, numbers = np.unique(labels[known], return_inverse=True)
    numbered = np.full(len(labels), -1, np.int64)
    numbered[known] = numbers
    return ArraySource(str(path), images, numbered, tuple(map(str, classes)))


def write_arrays(images: np.ndarray, labels: np.ndarray, folder: Path) -> Path:
    """Write both into a folder of `folder`'s that is named by their content, unless they are there; its path."""
    digest = hashlib.sha256(str((images.shape, labels.dtype)).encode())
    digest.update(np.ascontiguousarray(images).data)
    digest.update(labels.tobytes())
    path = folder / digest.hexdigest()[:16]
    if not holds_arrays(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_folder(path) as new:
                np.save(new / IMAGES, images, allow_pickle=False)
                np.save(new / LABELS, labels, allow_pickle=False)
        except OSError as error:
            raise StoreError(f"{path} cannot be written: {error.strerror}") from error
    return path
