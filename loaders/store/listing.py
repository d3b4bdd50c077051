"""The image files of one split: which there are, of what class, where their bytes lie, and what was left out.

A listing is made by whichever layout a path has (`loaders.store.layouts`), in a folder or in archives; nothing of an
image is read for it. Training in place and converting start from the same listing.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from loaders.errors import StoreError
from loaders.store.tars import Member, members

MAX_LISTED = 1000  # of things that were passed over; the rest is counted
MAX_KEPT_OPEN = 256  # archives of a set; more are opened for each read, lest a process run out of handles


class PassedOver:
    """What a source holds beside the set: the first MAX_LISTED of it (printable name, reason), and how many."""

    def __init__(self) -> None:
        self.listed: list[tuple[str, str]] = []
        self.count = 0

    def add(self, name: str, why: str) -> None:
        self.count += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append((ascii(name)[1:-1][:200], why))

    def update(self, other: PassedOver, folder: str = "") -> None:
        """Add what `other` has, as lying below `folder`."""
        for name, why in other.listed:
            self.add(folder + name, why)
        self.count += other.count - len(other.listed)


class Container(Protocol):
    """What holds the bytes of many images: an archive."""

    path: Path

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on, fewer where it ends. Raises OSError. Safe to call from several threads."""


class Archive:
    """A file that holds files, read with `pread`: threads share it. `keep_open`: while the object lives; else it is
    opened for each read."""

    def __init__(self, path: Path, keep_open: bool = True):
        self.path, self._fd = path, None
        try:
            if keep_open:
                self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                weakref.finalize(self, os.close, self._fd)
            self.length = os.stat(path).st_size
        except OSError as e:
            raise StoreError(f"{path}: cannot be read: {e.strerror}") from e

    def read(self, offset: int, size: int) -> bytes:
        if self._fd is not None:
            return os.pread(self._fd, size, offset)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(offset)
            return file.read(size)

    def members(self, outer: Member | None = None) -> Iterator[Member]:
        """Of the tar archive that this is, or of the one in it that `outer` is."""
        if outer is None:
            return members(self.read, 0, self.length, str(self.path))
        return members(self.read, outer.offset, outer.offset + outer.size, f"{self.path}: {outer.name}")


def archives_of(paths: list[Path]) -> tuple[Archive, ...]:
    return tuple(Archive(path, keep_open=len(paths) <= MAX_KEPT_OPEN) for path in paths)


class Row(NamedTuple):
    """One image file: its path below the split (or name in an archive), and where its bytes are.

    `time` is that of its last change (ns; s in archives); offset and container count in archives alone.
    """

    path: str
    num_bytes: int
    time: int
    offset: int = 0
    container: int = 0


@dataclass
class Listing:
    """The files of one split, in order; labels int64 [N], -1 where an image has none.

    names    below an image's class: what label lists name, and a `.beton` keeps
    paths    below `path`, or names in the archives: what files are read by, and messages name; None where they are the
             class and the name
    numbers  int64 [N, 4]: bytes, time of change, offset, and which of `containers` (none: in the folder `path`)
    """

    path: Path
    class_names: tuple[str, ...]
    labels: np.ndarray
    names: list[str]
    numbers: np.ndarray
    ignored: PassedOver
    containers: tuple[Container, ...] = ()
    paths: list[str] | None = None

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def sizes(self) -> np.ndarray:
        """int64 [N], bytes."""
        return self.numbers[:, 0]

    def __len__(self) -> int:
        return len(self.labels)

    def name_of(self, i: int) -> str:
        return self.names[i]

    def path_of(self, i: int) -> str:
        return self.where(i) if self.paths is None else self.paths[i]

    def class_of(self, i: int) -> str:
        """ "" of an image without a class."""
        return self.class_names[self.labels[i]] if self.labels[i] >= 0 else ""

    def where(self, i: int) -> str:
        """`n01440764/n01440764_10026.JPEG`: class and name, the same from wherever it comes."""
        c = self.class_of(i)
        return f"{c}/{self.names[i]}" if c else self.names[i]

    def is_repeated(self, i: int) -> bool:
        """Whether the listing has this name just before: only the first is used."""
        return i > 0 and self.names[i] == self.names[i - 1] and self.labels[i] == self.labels[i - 1]

    def read(self, i: int) -> bytes:
        """The file's bytes. Raises StoreError where it cannot be read, or is shorter than it was listed."""
        size, _, offset, container = self.numbers[i].tolist()
        try:
            if self.containers:
                data: bytes = self.containers[container].read(offset, size)
            else:
                with open(self.path / self.path_of(i), "rb", buffering=0) as file:
                    data = file.read()
        except OSError as e:
            raise StoreError(f"{self.path}: {self.path_of(i)} cannot be read: {e.strerror}") from e
        if self.containers and len(data) < size:
            raise StoreError(f"{self.path}: {self.path_of(i)}: its archive became shorter while it was read")
        return data

    def tail(self, i: int, size: int) -> bytes:
        """The file's last `size` bytes, or all it has. Raises OSError."""
        num_bytes, _, offset, container = self.numbers[i].tolist()
        skipped = max(0, num_bytes - size)
        if self.containers:
            end: bytes = self.containers[container].read(offset + skipped, num_bytes - skipped)
            return end
        with open(self.path / self.path_of(i), "rb", buffering=0) as file:
            file.seek(skipped)
            return file.read(size)

    def files(self) -> list[Path]:
        """The files that images are read from."""
        if self.containers:
            return [container.path for container in self.containers]
        return [self.path / self.path_of(i) for i in range(len(self))]

    def subset(self, ids: np.ndarray) -> Listing:
        """Only the images `ids`, in the order given; all classes stay."""
        paths, names = self.paths and [self.paths[i] for i in ids], [self.names[i] for i in ids]
        return replace(self, labels=self.labels[ids], paths=paths, names=names, numbers=self.numbers[ids])


def numbers_of(rows: list[Row]) -> np.ndarray:
    """`Listing.numbers` of some rows."""
    return np.array([row[1:] for row in rows], np.int64).reshape(-1, 4)


def by_class(
    path: Path,
    class_names: list[str],
    parts: list[list[Row]],
    ignored: PassedOver,
    containers: tuple[Container, ...] = (),
) -> Listing:
    """One listing out of each class's rows, whose names are those below their class; by class and then by name. A
    class without images is none, and is named among `ignored`."""
    for name, rows in zip(class_names, parts, strict=True):
        if not rows:
            ignored.add(f"{name}/", "a folder without images, so no class")
    kept = [(name, sorted(rows)) for name, rows in zip(class_names, parts, strict=True) if rows]
    labels = np.repeat(np.arange(len(kept)), [len(rows) for _, rows in kept]).astype(np.int64)
    names = [row.path for _, rows in kept for row in rows]
    numbers = np.concatenate([numbers_of(rows) for _, rows in kept]) if kept else numbers_of([])
    return Listing(path, tuple(name for name, _ in kept), labels, names, numbers, ignored, containers)
