"""An image folder read in place: `root/<class>/*.JPEG`, or images straight in `root`, without classes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from loaders.errors import StoreError
from loaders.store.images import ImageError, open_image
from loaders.store.source import digest

SUFFIXES = (".jpeg", ".jpg", ".png")


def images_in(folder: Path) -> list[str]:
    """Names of the image files straight in `folder`, sorted; hidden files are no images."""
    with os.scandir(folder) as entries:
        return sorted(
            e.name for e in entries if e.name.lower().endswith(SUFFIXES) and e.name[0] != "." and e.is_file()
        )


def folders_in(folder: Path) -> list[str]:
    """Names of the folders straight in `folder`, sorted; hidden ones are left out."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.name[0] != "." and e.is_dir())


class FolderSource:
    """Classes are the sorted sub-folders, empty ones too; every header is read once, for the sizes.

    Raises StoreError where there are no images, where images lie both beside and inside class folders, and where a
    header cannot be read.
    """

    channels = 3

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.name = str(root)
        try:
            self._list()
        except OSError as e:
            raise StoreError(f"{e.filename or root}: cannot be read: {e.strerror}") from e
        self.sizes = np.array([self._size(path) for path in self._paths], np.int32)

    def __len__(self) -> int:
        return len(self._paths)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def jpeg(self, i: int) -> bytes:
        """The file's bytes: a JPEG's or a PNG's."""
        try:
            return (self.root / self._paths[i]).read_bytes()
        except OSError as e:
            raise StoreError(f"{self.root / self._paths[i]}: cannot be read: {e.strerror}") from e

    def name_of(self, i: int) -> str:
        return self._paths[i].rpartition("/")[2]

    def fingerprint(self) -> str:
        return digest(self._paths, self.class_names, self.labels, self.sizes)

    def _list(self) -> None:
        flat, classes = images_in(self.root), folders_in(self.root)
        inside = [(c, name, file) for c, name in enumerate(classes) for file in images_in(self.root / name)]
        if flat and inside:
            raise StoreError(f"{self.root}: images lie both beside and inside its folders, e.g. {flat[0]}")
        if not flat and not inside:
            raise StoreError(f"{self.root}: no images; looked for *.JPEG, *.jpg and *.png there and one folder down")
        self._paths = flat or [f"{name}/{file}" for _, name, file in inside]
        self.class_names = () if flat else tuple(classes)
        self.labels = np.full(len(flat), -1, np.int64) if flat else np.array([c for c, _, _ in inside], np.int64)

    def _size(self, path: str) -> tuple[int, int]:
        try:
            with open_image(self.root / path) as image:
                return image.height, image.width
        except ImageError as e:
            raise StoreError(f"{self.root / path}: {e}") from e
