"""Image files read in place: a listing of them as a source, those that somebody lists, and how folders are walked."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np

from loaders.errors import StoreError
from loaders.store.images import FORMATS, SUFFIXES, Header, ImageError, decode, header_of, header_of_bytes
from loaders.store.listing import Listing, PassedOver, Row, by_class, numbers_of
from loaders.store.source import digest

NO_CLASSES = ("@eaDir", "__MACOSX", "lost+found")  # what systems leave in folders, thumbnails among it
_HEADERS_A_TASK = 64
_HEAD_BYTES = 1 << 13


def images_in(folder: Path) -> list[str]:
    """Names of the image files straight in `folder`, sorted; hidden files are no images."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.name.lower().endswith(SUFFIXES) and e.name[0] != "." and e.is_file())


def folders_in(folder: Path) -> list[str]:
    """Names of the folders straight in `folder`, sorted; hidden ones, and those that systems leave, are left out."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.name[0] != "." and e.name not in NO_CLASSES and e.is_dir())


def files_below(folder: Path, ignored: PassedOver, deep: bool = True, root: Path | None = None) -> list[Row]:
    """The image files in `folder` and, where `deep`, in the folders below, in no particular order; what else is there
    is added to `ignored`. A link to a folder that it lies in, up to `root`, is not followed. Raises OSError."""
    return list(_walked(folder, "", ignored, deep, frozenset({_identity(folder), _identity(root or folder)})))


def _walked(
    folder: Path, below: str, ignored: PassedOver, deep: bool, above: frozenset[tuple[int, int]]
) -> Iterator[Row]:
    inner, strange = [], []
    with os.scandir(folder) as entries:
        for e in entries:
            if e.is_dir():
                inner.append(e.name)
            elif e.name[0] == "." or not e.name.lower().endswith(SUFFIXES):
                strange.append((e.name, "not named as an image"))
            elif not e.is_file():
                strange.append((e.name, "a link to nothing, or no regular file"))
            else:
                stat = e.stat()
                yield Row(below + e.name, stat.st_size, stat.st_mtime_ns)
    for name, why in sorted(strange):
        ignored.add(below + name, why)
    for name in sorted(inner) if deep else ():
        if name in NO_CLASSES or name[0] == ".":
            ignored.add(f"{below}{name}/", "not a folder of images by its name")
        elif (identity := _identity(folder / name)) in above:
            ignored.add(f"{below}{name}/", "a link to a folder that it lies in")
        else:
            yield from _walked(folder / name, f"{below}{name}/", ignored, deep, above | {identity})


def _identity(folder: Path) -> tuple[int, int]:
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def list_folder(root: Path) -> Listing:
    """An image folder: `root/<class>/**`, the classes sorted, or images straight in `root` without classes.

    Raises StoreError where there are no images, and where images lie both beside and inside class folders; OSError.
    """
    ignored, classes = PassedOver(), folders_in(root)
    flat = files_below(root, ignored, deep=False)
    for name in NO_CLASSES:
        if (root / name).is_dir():
            ignored.add(f"{name}/", "not a folder of images by its name")
    asides = [PassedOver() for _ in classes]
    with ThreadPoolExecutor(min(32, 4 * _num_cpus())) as pool:  # on network file systems each answer takes its time
        parts = list(pool.map(lambda name, aside: files_below(root / name, aside, root=root), classes, asides))
    for name, aside in zip(classes, asides, strict=True):
        ignored.update(aside, f"{name}/")
    if flat and any(parts):
        raise StoreError(f"{root}: images lie both beside and inside its folders, e.g. {min(flat).path}")
    if flat:
        flat.sort()
        for name in classes:
            ignored.add(f"{name}/", "a folder without images")
        return Listing(
            root, (), np.full(len(flat), -1, np.int64), [row.path for row in flat], numbers_of(flat), ignored
        )
    if not any(parts):
        raise StoreError(f"{root}: no images; looked for {', '.join('*' + s for s in SUFFIXES)} there and below")
    return by_class(root, classes, parts, ignored)


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0))


class ListedSource:
    """A listing as an encoded source: bytes are the files' own, sizes those of the upright images, read from every
    header when they are first asked for."""

    channels = 3

    def __init__(self, listing: Listing):
        self.listing = listing
        self.labels, self.class_names = listing.labels, listing.class_names
        self.name = listing.name

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def sizes(self) -> np.ndarray:
        return self._headers[0]

    @property
    def unreadable(self) -> dict[int, str]:
        """Images that cannot be used by their header, and why; their size is that of the first one that can."""
        return self._headers[1]

    def jpeg(self, i: int) -> bytes:
        """The file's bytes, of whichever format."""
        return self.listing.read(i)

    @property
    def num_bytes(self) -> np.ndarray:
        return self.listing.sizes

    def tail(self, i: int, size: int) -> bytes:
        return self.listing.tail(i, size)

    def name_of(self, i: int) -> str:
        return self.listing.names[i]

    def path_of(self, i: int) -> str:
        return self.listing.path_of(i)

    def files(self) -> list[Path]:
        return self.listing.files()

    def fingerprint(self) -> str:
        turned = np.flatnonzero(self._headers[2] > 1)
        more = [turned, self._headers[2][turned]] if len(turned) else []
        return digest([self.path_of(i) for i in range(len(self))], self.class_names, self.labels, self.sizes, *more)

    @property
    def orientations(self) -> np.ndarray:
        """uint8 [N], as EXIF has them; 1 of what cannot be read."""
        return self._headers[2]

    @property
    def forms(self) -> np.ndarray:
        """Names of formats, str [N]; "" of what cannot be read."""
        return np.take(np.array(["", *FORMATS]), self._headers[3])

    @cached_property
    def _headers(self) -> tuple[np.ndarray, dict[int, str], np.ndarray, np.ndarray]:
        """Sizes int32 [N, 2], what cannot be read, EXIF orientations and numbers of formats, both uint8 [N]."""
        sizes, orientations = np.zeros((len(self), 2), np.int32), np.ones(len(self), np.uint8)
        forms, number = np.zeros(len(self), np.uint8), {form: k for k, form in enumerate(FORMATS, 1)}
        unreadable: dict[int, str] = {}

        def read(begin: int) -> None:
            for i in range(begin, min(begin + _HEADERS_A_TASK, len(self))):
                try:
                    height, width, orientations[i], form = self._header(i)
                    sizes[i], forms[i] = (height, width), number.get(form, 0)
                except (ImageError, StoreError) as e:
                    unreadable[i] = str(e)

        with ThreadPoolExecutor(2 * _num_cpus()) as pool:
            list(pool.map(read, range(0, len(self), _HEADERS_A_TASK)))
        if len(unreadable) == len(self):
            i = min(unreadable)
            raise StoreError(f"{self.name}: none of its {len(self)} images can be used, e.g. {self.path_of(i)}: "
                             f"{unreadable[i]}")  # fmt: skip
        if unreadable:
            sizes[list(unreadable)] = sizes[next(i for i in range(len(self)) if i not in unreadable)]
        return sizes, dict(sorted(unreadable.items())), orientations, forms

    def _header(self, i: int) -> Header:
        if not self.listing.containers:
            return header_of(self.listing.path / self.path_of(i))
        size, _, offset, container = self.listing.numbers[i].tolist()
        try:
            head = self.listing.containers[container].read(offset, min(size, _HEAD_BYTES))
        except OSError as e:
            raise StoreError(f"cannot be read: {e.strerror}") from e
        return header_of_bytes(head, lambda: self.listing.read(i))


class FolderSource(ListedSource):
    """An image folder: classes are its sorted sub-folders that hold images. Raises StoreError as `list_folder` does."""

    def __init__(self, root: str | Path):
        try:
            super().__init__(list_folder(Path(root)))
        except OSError as e:
            raise StoreError(f"{e.filename or root}: cannot be read: {e.strerror}") from e


class ImageFiles(ListedSource):
    """Image files `root/<path>` with the labels they are given, int64 [N], -1 for none; `border_px` are cut off on
    every side. Raises StoreError where a header cannot be read."""

    def __init__(
        self, root: Path, paths: Sequence[str], labels: np.ndarray, class_names: tuple[str, ...], border_px: int = 0
    ):
        names = [path.rpartition("/")[2] for path in paths]
        numbers = np.zeros((len(paths), 4), np.int64)
        super().__init__(Listing(root, class_names, labels, names, numbers, PassedOver(), paths=list(paths)))
        self._border_px = border_px
        refuse_unreadable(self)

    def jpeg(self, i: int) -> bytes:
        """The file's bytes where nothing is to be cut off, else a PNG's."""
        data = super().jpeg(i)
        if not self._border_px:
            return data
        try:
            image, px, cut = decode(data), self._border_px, io.BytesIO()
            inner = image.crop((px, px, image.width - px, image.height - px))
            inner.save(cut, "PNG", compress_level=0)  # to be decoded again at once
            return cut.getvalue()
        except ImageError as e:
            raise StoreError(f"{self.listing.path / self.path_of(i)}: {e}") from e

    def _header(self, i: int) -> Header:
        header, px = super()._header(i), self._border_px
        if px and min(header[:2]) <= 2 * px:
            raise ImageError(f"nothing is left of it without its border of {px} pixels")
        return header._replace(height=header.height - 2 * px, width=header.width - 2 * px)


def refuse_unreadable(source: ListedSource) -> None:
    """Raises StoreError where images of `source` cannot be used by their headers: how many, and the first."""
    if source.unreadable:
        i, why = next(iter(source.unreadable.items()))
        count = f"{len(source.unreadable)} of {len(source)} images cannot be used, first " if len(source) > 1 else ""
        raise StoreError(f"{count}{source.listing.path / source.path_of(i)}: {why}")


def images_below(root: Path) -> ImageFiles | None:
    """Every image file in `root` and below, sorted by its path, without labels; None where there is none. Raises
    StoreError where one cannot be read."""
    try:
        paths = sorted(row.path for row in files_below(root, PassedOver()))
    except OSError as e:
        raise StoreError(f"{e.filename or root}: cannot be read: {e.strerror}") from e
    return ImageFiles(root, paths, np.full(len(paths), -1, np.int64), ()) if paths else None
