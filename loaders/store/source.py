"""The interface behind which every store stands, and the two things built on it: arrays in memory, and joined sets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeGuard

import numpy as np

from loaders.errors import StoreError


class Source(Protocol):
    """A set of images with indices 0..N-1. Either an `ArraySource` or an `EncodedSource`."""

    @property
    def name(self) -> str:
        """What messages call it: a path, or `digits`."""

    @property
    def labels(self) -> np.ndarray:
        """int64 [N], -1 where unlabelled."""

    @property
    def sizes(self) -> np.ndarray:
        """int32 [N, 2], height and width in pixels of the upright images."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name a class; empty where nothing is labelled."""

    @property
    def num_classes(self) -> int: ...

    @property
    def channels(self) -> int:
        """Of the rendered pixels: 3 for encoded images, which are rendered as RGB."""

    def __len__(self) -> int: ...

    def name_of(self, i: int) -> str:
        """The file name of image `i`, below its class where it lies deeper; its index where images are not files."""

    def path_of(self, i: int) -> str:
        """Where image `i` lies in the data: its path from the data's folder, class and name, or its index."""

    def files(self) -> list[Path]:
        """The files that images are read from; none where they lie in memory."""

    def fingerprint(self) -> str:
        """sha256 over what identifies the data (labels, sizes, names or offsets), not over all pixels."""


class EncodedSource(Source, Protocol):
    """Images as files: JPEG, in image folders and archives also what else `loaders.store.images` reads."""

    @property
    def unreadable(self) -> Mapping[int, str]:
        """Images that are known not to be usable, before any is decoded, and why."""

    @property
    def num_bytes(self) -> np.ndarray:
        """int64 [N], of each image as it is stored."""

    def tail(self, i: int, size: int) -> bytes:
        """The last `size` bytes of image `i` as it is stored, all of it where it has fewer."""

    def jpeg(self, i: int) -> bytes:
        """The encoded bytes of image `i`, as stored. Safe to call from several threads."""


class DecodedSource(Protocol):
    """An encoded source of which some images are stored decoded."""

    def read_pixels(self, i: int, buffer: np.ndarray) -> np.ndarray | None:
        """Image `i`, uint8 [H, W, 3], read into `buffer`, uint8 [n], or into one of its own where that is too small;
        None where the image is stored encoded. Raises StoreError. Safe to call from several threads."""


def holds_pixels(source: object) -> TypeGuard[DecodedSource]:
    return hasattr(source, "read_pixels")


def is_encoded(source: Source) -> TypeGuard[EncodedSource]:
    return hasattr(source, "jpeg")


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images of one size in memory: `images` uint8 [N, H, W, C]."""

    name: str
    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        assert self.images.dtype == np.uint8 and self.images.ndim == 4 and self.labels.shape == self.images.shape[:1]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def sizes(self) -> np.ndarray:
        return np.broadcast_to(np.array(self.images.shape[1:3], np.int32), (len(self), 2))

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def channels(self) -> int:
        return int(self.images.shape[3])

    def name_of(self, i: int) -> str:
        return str(i)

    def path_of(self, i: int) -> str:
        return str(i)

    def files(self) -> list[Path]:
        return []

    def fingerprint(self) -> str:
        head = np.ascontiguousarray(self.images[:64])  # tells sets of equal labels apart
        return digest(self.class_names, self.images.shape, self.labels, head)


class Concatenated:
    """Several encoded sources, one after the other, as one set with the classes `class_names`.

    Labels are matched by class name. A class that `class_names` lacks becomes -1.
    """

    def __init__(self, sources: Sequence[EncodedSource], class_names: tuple[str, ...]):
        self.sources = tuple(sources)
        self.class_names = class_names
        self.name = joined_name(sources)
        self.labels = np.concatenate([relabelled(s, class_names) for s in sources])
        self.channels = 3
        self._ends = np.cumsum([len(s) for s in sources])

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def sizes(self) -> np.ndarray:
        return np.concatenate([s.sizes for s in self.sources])

    def _locate(self, i: int) -> tuple[EncodedSource, int]:
        k = int(np.searchsorted(self._ends, i, side="right"))
        return self.sources[k], int(i) - int(self._ends[k]) + len(self.sources[k])

    def read_pixels(self, i: int, buffer: np.ndarray) -> np.ndarray | None:
        source, j = self._locate(i)
        return source.read_pixels(j, buffer) if holds_pixels(source) else None

    def jpeg(self, i: int) -> bytes:
        source, j = self._locate(i)
        return source.jpeg(j)

    def name_of(self, i: int) -> str:
        source, j = self._locate(i)
        return source.name_of(j)

    def path_of(self, i: int) -> str:
        source, j = self._locate(i)
        return source.path_of(j)

    def files(self) -> list[Path]:
        return [path for source in self.sources for path in source.files()]

    @property
    def num_bytes(self) -> np.ndarray:
        return np.concatenate([s.num_bytes for s in self.sources])

    def tail(self, i: int, size: int) -> bytes:
        source, j = self._locate(i)
        return source.tail(j, size)

    @property
    def unreadable(self) -> dict[int, str]:
        starts = [0, *self._ends.tolist()]
        return {
            start + i: why for start, s in zip(starts, self.sources, strict=False) for i, why in s.unreadable.items()
        }

    def fingerprint(self) -> str:
        return digest(self.class_names, [s.fingerprint() for s in self.sources])


class Selected:
    """Some images of an encoded source, `ids` int64 [M] in the whole, ascending, as a set of their own; all classes
    stay."""

    channels = 3

    def __init__(self, whole: EncodedSource, ids: np.ndarray, name: str):
        self.whole, self.ids, self.name = whole, ids, name
        self.class_names, self.labels = whole.class_names, whole.labels[ids]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def sizes(self) -> np.ndarray:
        sizes: np.ndarray = self.whole.sizes[self.ids]
        return sizes

    @property
    def num_bytes(self) -> np.ndarray:
        return np.take(self.whole.num_bytes, self.ids)

    @cached_property
    def unreadable(self) -> dict[int, str]:
        lost = self.whole.unreadable
        _, at, _ = np.intersect1d(self.ids, np.fromiter(lost, np.int64, len(lost)), return_indices=True)
        return {i: lost[int(self.ids[i])] for i in at.tolist()}

    def jpeg(self, i: int) -> bytes:
        return self.whole.jpeg(int(self.ids[i]))

    def tail(self, i: int, size: int) -> bytes:
        return self.whole.tail(int(self.ids[i]), size)

    def read_pixels(self, i: int, buffer: np.ndarray) -> np.ndarray | None:
        return self.whole.read_pixels(int(self.ids[i]), buffer) if holds_pixels(self.whole) else None

    def name_of(self, i: int) -> str:
        return self.whole.name_of(int(self.ids[i]))

    def path_of(self, i: int) -> str:
        return self.whole.path_of(int(self.ids[i]))

    def files(self) -> list[Path]:
        return self.whole.files()

    def fingerprint(self) -> str:
        return digest([self.whole.fingerprint()], self.ids)


def concatenate(sources: Sequence[Source], class_names: tuple[str, ...] | None = None) -> Source:
    """One set out of several, with the classes `class_names` (default: those of all, in order of appearance)."""
    if class_names is None:
        class_names = tuple(dict.fromkeys(name for s in sources for name in s.class_names))
    if len(sources) == 1 and sources[0].class_names == class_names:
        return sources[0]
    encoded = [s for s in sources if is_encoded(s)]
    if len(encoded) == len(sources):
        return Concatenated(encoded, class_names)
    arrays = [s for s in sources if isinstance(s, ArraySource)]
    if len(arrays) < len(sources):
        raise StoreError(f"{joined_name(sources)}: image files and small arrays cannot be one set")
    shapes = {a.images.shape[1:] for a in arrays}
    if len(shapes) > 1:
        raise StoreError(f"{joined_name(sources)}: images of shapes {sorted(shapes)} cannot be one set")
    images = arrays[0].images if len(arrays) == 1 else np.concatenate([a.images for a in arrays])
    labels = np.concatenate([relabelled(a, class_names) for a in arrays])
    return ArraySource(joined_name(sources), images, labels, class_names)


def relabelled(source: Source, class_names: tuple[str, ...]) -> np.ndarray:
    """Labels int64 [N] as indices into `class_names`, matched by name; -1 for classes it lacks."""
    if source.class_names == class_names:
        return source.labels
    column = {name: c for c, name in enumerate(class_names)}
    table = np.array([column.get(name, -1) for name in source.class_names] + [-1], np.int64)  # -1 picks the last
    labels: np.ndarray = table[source.labels]
    return labels


def joined_name(sources: Iterable[Source]) -> str:
    return " + ".join(s.name for s in sources)


def digest(*parts: np.ndarray | Iterable[object]) -> str:
    """sha256 of arrays (bytes, shape and type) and of plain sequences (their repr), in order."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            sha.update(f"{part.shape}{part.dtype}".encode())
            sha.update(np.ascontiguousarray(part).data)
        else:
            sha.update(repr(list(part)).encode())
        sha.update(b"\0")
    return sha.hexdigest()
