"""Which images a stream may use, or may see the labels of: published lists, keyed splits and complements, hashed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from loaders.errors import StoreError
from loaders.labels.published import PUBLISHED, entries_of, read_file, read_published
from loaders.plan.draws import mix
from loaders.plan.views import All, Complement, Listed, PerClass, Subset
from loaders.store.source import Selected, Source

LISTS_VARIABLE = "FASTSSL_LISTS"


class NotAmong(StoreError):
    """`names` on a list that its source does not have."""

    def __init__(self, message: str, names: Iterable[str] = ()):
        super().__init__(message)
        self.names = frozenset(names)


class Named(Protocol):
    """A set of images with names: any source."""

    @property
    def name(self) -> str: ...

    @property
    def labels(self) -> np.ndarray: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def name_of(self, i: int) -> str: ...


@dataclass(frozen=True)
class Resolved:
    """A subset of one source: `ids` int64, ascending, None for all images. `sha256` is of the list file where there
    is one, else of the ids."""

    ids: np.ndarray | None
    name: str
    sha256: str
    count: int


def resolve(subset: Subset, source: Source, search: Iterable[Path] = ()) -> Resolved:
    """The images of `source` that `subset` describes.

    Lists are looked for as paths, then in the folders `search` (those of the data) and in those that the environment
    variable FASTSSL_LISTS names; published ones are else fetched. Raises StoreError in the user's words: list missing,
    names unknown, class too small.
    """
    match subset:
        case All():
            return Resolved(None, "all", _sha256(np.arange(len(source))), len(source))
        case PerClass(count, split_seed, of):
            among = resolve(of, source, search)
            name = f"{count}-per-class-split-{split_seed}" + ("" if among.ids is None else f"-of-{among.name}")
            return _of_ids(_per_class(source, among.ids, count, split_seed), name)
        case Listed(name):
            return listed(source, name, tuple(search))
        case Complement(of):
            inner = resolve(of, source, search)
            everything = np.arange(len(source))
            ids = everything[:0] if inner.ids is None else np.setdiff1d(everything, inner.ids, assume_unique=True)
            return _of_ids(ids, f"all-but-{inner.name}")


def _of_ids(ids: np.ndarray, name: str) -> Resolved:
    return Resolved(ids, name, _sha256(ids), len(ids))


def _sha256(ids: np.ndarray) -> str:
    return hashlib.sha256(ids.astype("<i8").data).hexdigest()


def _per_class(source: Source, among: np.ndarray | None, count: int, split_seed: int) -> np.ndarray:
    """The `count` ids of smallest key in every class, of those `among` (ascending; None: of all); the key is a function
    of (split_seed, class, id) alone."""
    if not source.num_classes:
        raise StoreError(f"{source.name}: {count} images of every class were asked for, but it has no labels")
    chosen = []
    for c, class_name in enumerate(source.class_names):
        ids = np.flatnonzero(source.labels == c) if among is None else among[source.labels[among] == c]
        if len(ids) < count:
            left = "" if among is None else " left"
            raise StoreError(f"{source.name}: class {class_name!r} has {len(ids)} images{left}, {count} were asked for")
        chosen.append(ids[np.argsort(mix(split_seed, c, ids), kind="stable")[:count]])
    return np.sort(np.concatenate(chosen))


def listed(source: Named, name: str, search: tuple[Path, ...]) -> Resolved:
    """The images of `source` on the list `name`, a path or a name; see `resolve`."""
    path, data = _read_list(name, search)
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        entries = entries_of(data)
    except UnicodeDecodeError:
        raise StoreError(f"{path}: not a text file") from None
    except ValueError as error:
        raise StoreError(f'{path}: neither names one a line nor JSON with names under "values" ({error})') from None
    if not entries:
        raise StoreError(f"{path}: the list is empty")
    numbers = all(e.isascii() and e.isdigit() for e in entries)
    ids = _ids_of_indices(source, path, entries) if numbers else _ids_of_names(source, path, entries)
    unique = np.unique(ids)
    if len(unique) < len(ids):
        raise StoreError(f"{path}: {len(ids) - len(unique)} of its {len(ids)} lines name an image twice")
    return Resolved(unique, Path(name).stem if "/" in name else name, sha256, len(unique))


def _read_list(name: str, search: tuple[Path, ...]) -> tuple[Path, bytes]:
    folders = [*search, *(Path(f) for f in os.environ.get(LISTS_VARIABLE, "").split(os.pathsep) if f)]
    if name in PUBLISHED and not Path(name).is_file():
        return read_published(name, folders)
    for candidate in [Path(name), *(folder / file for folder in folders for file in (name, f"{name}.txt"))]:
        if candidate.is_file():
            return candidate, read_file(candidate)
    places = ", ".join(str(f) for f in folders) or "no folder"
    raise StoreError(
        f"label list {name!r} was not found: no such file, and nothing called {name} or {name}.txt in {places}; "
        f"put it beside the data or name its folder in {LISTS_VARIABLE}; published lists: {', '.join(PUBLISHED)}"
    )


def _ids_of_indices(source: Named, path: Path, entries: list[str]) -> np.ndarray:
    """Indices count the images of the data as it lies there, also where some of them are held out."""
    if isinstance(source, Selected):
        wanted = _ids_of_indices(source.whole, path, entries)
        held = np.setdiff1d(wanted, source.ids)
        if len(held):
            names = [source.whole.name_of(int(i)) for i in held]
            raise NotAmong(
                f"{path}: {len(held)} of its {len(entries)} images are not in {source.name}, first {held[0]}", names
            )
        return np.searchsorted(source.ids, wanted)
    beyond = [e for e in entries if int(e) >= len(source)]
    if beyond:
        raise StoreError(
            f"{path}: {len(beyond)} of its indices are beyond the {len(source)} images of {source.name}, "
            f"first {beyond[0]}"
        )
    return np.array([int(e) for e in entries], np.int64)


def _ids_of_names(source: Named, path: Path, entries: list[str]) -> np.ndarray:
    """File names, with or without folders: where an entry or an image has folders, the shorter of the two paths must be
    the end of the longer one."""
    whole: dict[str, list[int]] = {entry: [] for entry in entries}  # images whose path ends with the entry
    ends: dict[str, list[int]] = {end: [] for entry in entries for end in _ends(entry)}  # whose path is its end
    for i in range(len(source)):
        own = _own_path(source, i)
        for end in (own, *_ends(own)):
            if end in whole:
                whole[end].append(i)
        if own in ends:
            ends[own].append(i)
    fitting = [
        [*whole[entry], *(i for end in _ends(entry) for i in ends[end] if not _is_of_another_class(entry, source, i))]
        for entry in entries
    ]
    missing = [entry for entry, ids in zip(entries, fitting, strict=True) if not ids]
    ambiguous = [entry for entry, ids in zip(entries, fitting, strict=True) if len(ids) > 1]
    if missing:
        raise NotAmong(
            f"{path}: {len(missing)} of its {len(entries)} images are not in {source.name}, first {missing[0]}",
            [entry.rpartition("/")[2] for entry in missing],
        )
    if ambiguous:
        raise StoreError(
            f"{path}: {source.name} has several images called {ambiguous[0]}: which is meant? Write class/name"
        )
    return np.array([ids[0] for ids in fitting], np.int64)


def _own_path(source: Named, i: int) -> str:
    """Class and name. Classes that are but numbers, as files without class names have them, need be no folders that a
    list would name."""
    label, name = int(source.labels[i]), source.name_of(i)
    class_name = source.class_names[label] if label >= 0 else ""
    return f"{class_name}/{name}" if class_name and not class_name.isdecimal() else name


def _is_of_another_class(entry: str, source: Named, i: int) -> bool:
    """Whether `entry`, whose end is the name of image `i`, says that it lies in the folder of another number than its
    class."""
    label, folder = int(source.labels[i]), entry.removesuffix(source.name_of(i)).rstrip("/").rpartition("/")[2]
    return label >= 0 and folder.isdecimal() and source.class_names[label] != folder


def _ends(path: str) -> list[str]:
    """`b/c`, `c` of `a/b/c`."""
    parts = path.split("/")
    return ["/".join(parts[k:]) for k in range(1, len(parts))]
