"""Image files read in place: a folder of them, `root/<class>/*.JPEG` or images straight in `root` without classes, or
those that somebody lists."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loaders.errors import StoreError
from loaders.store.images import FORMATS, ImageError, open_image
from loaders.store.source import digest

SUFFIXES = (".jpeg", ".jpg", ".png")
_READABLE = (*FORMATS, "GIF", "BMP")
_SIGNATURES = (b"\xff\xd8", b"\x89PNG")


def images_in(folder: Path) -> list[str]:
    """Names of the image files straight in `folder`, sorted; hidden files are no images."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.name.lower().endswith(SUFFIXES) and e.name[0] != "." and e.is_file())


def folders_in(folder: Path) -> list[str]:
    """Names of the folders straight in `folder`, sorted; hidden ones are left out."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.name[0] != "." and e.is_dir())


class ImageFiles:
    """Image files `root/<path>` with the labels they are given, int64 [N], -1 for none; every header is read once, for
    the sizes. Raises StoreError where one cannot be read."""

    channels = 3

    def __init__(self, root: Path, paths: Sequence[str], labels: np.ndarray, class_names: tuple[str, ...]):
        self.root, self.name = root, str(root)
        self.labels, self.class_names = labels, class_names
        self._paths = paths
        self.sizes = np.array([self._size(root / path) for path in paths], np.int32)

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

    def _size(self, path: Path) -> tuple[int, int]:
        try:
            with open_image(path) as image:
                return image.height, image.width
        except ImageError as e:
            raise StoreError(f"{path}: {e}") from e


class ConvertedFiles(ImageFiles):
    """Image files of which some are to be changed: `border_px` are cut off on every side, and what is neither JPEG nor
    PNG, whatever it is called, is handed out as PNG. GIF (its first frame) and BMP are read besides."""

    def __init__(
        self, root: Path, paths: Sequence[str], labels: np.ndarray, class_names: tuple[str, ...], border_px: int = 0
    ):
        self._border_px = border_px
        super().__init__(root, paths, labels, class_names)

    def jpeg(self, i: int) -> bytes:
        """The file's bytes where nothing is to be changed, else a PNG's."""
        data = super().jpeg(i)
        if not self._border_px and data.startswith(_SIGNATURES):
            return data
        try:
            with open_image(io.BytesIO(data), _READABLE) as image:
                px, converted = self._border_px, io.BytesIO()
                inner = image.convert("RGB").crop((px, px, image.width - px, image.height - px))
            inner.save(converted, "PNG", compress_level=0)  # to be decoded again at once
            return converted.getvalue()
        except (ImageError, OSError, SyntaxError, ValueError) as e:
            raise StoreError(f"{self.root / self._paths[i]}: {e}") from e

    def _size(self, path: Path) -> tuple[int, int]:
        try:
            with open_image(path, _READABLE) as image:
                height, width = image.height - 2 * self._border_px, image.width - 2 * self._border_px
        except ImageError as e:
            raise StoreError(f"{path}: {e}") from e
        if min(height, width) < 1:
            raise StoreError(f"{path}: nothing is left of it without its border of {self._border_px} pixels")
        return height, width


class FolderSource(ImageFiles):
    """Classes are the sorted sub-folders, empty ones too.

    Raises StoreError where there are no images, where images lie both beside and inside class folders, and where a
    header cannot be read.
    """

    def __init__(self, root: str | Path):
        try:
            super().__init__(Path(root), *_listed(Path(root)))
        except OSError as e:
            raise StoreError(f"{e.filename or root}: cannot be read: {e.strerror}") from e
        self.name = str(root)


def _listed(root: Path) -> tuple[list[str], np.ndarray, tuple[str, ...]]:
    """Paths, labels and class names of an image folder."""
    flat, classes = images_in(root), folders_in(root)
    inside = [(c, name, file) for c, name in enumerate(classes) for file in images_in(root / name)]
    if flat and inside:
        raise StoreError(f"{root}: images lie both beside and inside its folders, e.g. {flat[0]}")
    if flat:
        return flat, np.full(len(flat), -1, np.int64), ()
    if not inside:
        raise StoreError(f"{root}: no images; looked for *.JPEG, *.jpg and *.png there and one folder down")
    labels = np.array([c for c, _, _ in inside], np.int64)
    return [f"{name}/{file}" for _, name, file in inside], labels, tuple(classes)
