"""What files of rows share, of which each holds an image and a label under some name: how both are found, and how
images and classes are named and numbered."""

from __future__ import annotations

from typing import Any

import numpy as np

from loaders.errors import StoreError

IMAGES = ("image", "img", "jpg", "png")  # columns, the first that is there
LABELS = ("label", "labels", "fine_label", "class", "class_label", "cls", "target", "category")


def numbered(labels: list[Any], names: tuple[str, ...]) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names, of classes that have images, and each row's number among them, int64; -1 of rows without label."""
    known = {label for label in labels if label is not None and label != -1}
    if names and any(not isinstance(label, int) or not 0 <= label < len(names) for label in known):
        raise StoreError(f"labels beyond the {len(names)} classes that the files name")
    numbers = all(isinstance(label, int) for label in known)
    order = sorted(known, key=lambda label: label if numbers else str(label))
    number = {label: c for c, label in enumerate(order)}
    found = np.array([number.get(label, -1) for label in labels], np.int64)
    return tuple(names[label] if names else str(label) for label in order), found


def own_names(paths: list[str | None], stems: list[str], file_of: list[int]) -> list[str]:
    """Base names of the images' own `paths` where all have one, each another; else the stem of its file, of those in
    `file_of`, and its row there."""
    own = [path.rpartition("/")[2] for path in paths if path]
    if len(own) == len(paths) == len(set(own)):
        return own
    first = {k: file_of.index(k) for k in set(file_of)}
    return [f"{stems[k]}-{i - first[k]:07d}" for i, k in enumerate(file_of)]
