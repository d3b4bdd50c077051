"""The image files that a conversion starts from: a split's names, classes and sizes, and how to read each.

Two kinds of source: folders `train/<class>/*` and `val/<class>/*` (or classes alone, which are a training set), and
ImageNet's official archives. Nothing of an image is read here but its size.
"""

from __future__ import annotations

import gzip
import os
import re
import weakref
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from loaders.errors import StoreError
from loaders.store.folder import SUFFIXES, folders_in
from loaders.store.matlab import structs
from loaders.store.tars import Member, members

TRAIN, VAL = "train", "val"
TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
MAX_LISTED = 1000  # of things that were passed over; the rest is counted

_CLASS_TAR = re.compile(r"(?:\./)?(n\d{8})\.tar", re.ASCII)
_TRAIN_IMAGE = re.compile(r"(?:\./)?(n\d{8})_\d+\.JPEG", re.ASCII)
_VAL_IMAGE = re.compile(r"(?:\./)?ILSVRC2012_val_(\d{8})\.JPEG", re.ASCII)
_META = re.compile(r"(?:\./)?[\w.-]+/data/meta\.mat", re.ASCII)
_TRUTH = re.compile(r"(?:\./)?[\w.-]+/data/ILSVRC2012_validation_ground_truth\.txt", re.ASCII)
_MAX_DEVKIT_BYTES = 1 << 28


class PassedOver:
    """What a source holds beside the set: the first MAX_LISTED of it (printable name, reason), and how many."""

    def __init__(self) -> None:
        self.listed: list[tuple[str, str]] = []
        self.count = 0

    def add(self, name: str, why: str) -> None:
        self.count += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append((ascii(name)[1:-1][:200], why))


class Archive:
    """A tar file, read with `pread`: threads share it."""

    def __init__(self, path: Path):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise StoreError(f"{path}: cannot be read: {e.strerror}") from e
        weakref.finalize(self, os.close, fd)
        self._fd, self.path, self.length = fd, path, os.fstat(fd).st_size

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._fd, size, offset)

    def members(self, outer: Member | None = None) -> Iterator[Member]:
        """Of the archive, or of the archive in it that `outer` is."""
        if outer is None:
            return members(self.read, 0, self.length, str(self.path))
        return members(self.read, outer.offset, outer.offset + outer.size, f"{self.path}: {outer.name}")


class Files(NamedTuple):
    """Images by name: `numbers` int64 [N, 3] are bytes, time of change (ns; s in archives), offset in the archive."""

    names: list[str]
    numbers: np.ndarray

    @classmethod
    def of(cls, rows: list[tuple[str, int, int, int]]) -> Files:
        rows.sort()
        return cls([row[0] for row in rows], np.array([row[1:] for row in rows], np.int64).reshape(-1, 3))


@dataclass
class Listing:
    """The files of one split, by class and then by name; labels int64 [N], -1 where there are no classes.

    They lie in `archive`, or else in the folder `path`.
    """

    path: Path
    class_names: tuple[str, ...]
    labels: np.ndarray
    files: Files
    ignored: PassedOver
    archive: Archive | None = None

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def sizes(self) -> np.ndarray:
        """int64 [N], bytes."""
        return self.files.numbers[:, 0]

    def __len__(self) -> int:
        return len(self.labels)

    def name_of(self, i: int) -> str:
        return self.files.names[i]

    def where(self, i: int) -> str:
        """`n01440764/n01440764_10026.JPEG`: class and name, the same for both kinds of source."""
        name = self.files.names[i]
        return f"{self.class_names[self.labels[i]]}/{name}" if self.labels[i] >= 0 else name

    def is_repeated(self, i: int) -> bool:
        """Whether the archive has this name before: only the first is used."""
        names = self.files.names
        return i > 0 and names[i] == names[i - 1] and self.labels[i] == self.labels[i - 1]

    def read(self, i: int) -> bytes:
        """The file's bytes. Raises StoreError where it cannot be read or is no longer as long as it was listed."""
        size, _, offset = self.files.numbers[i].tolist()
        try:
            if self.archive is not None:
                data = self.archive.read(offset, size)
            else:
                with open(self.path / self.where(i), "rb", buffering=0) as file:
                    data = file.read(size + 1)
        except OSError as e:
            raise StoreError(f"{self.path}: {self.where(i)} cannot be read: {e.strerror}") from e
        if len(data) != size:
            raise StoreError(f"{self.path}: {self.where(i)} changed while it was converted; run the same command again")
        return data

    def subset(self, ids: np.ndarray) -> Listing:
        """Only the images `ids`, in ascending order; all classes stay."""
        files = Files([self.files.names[i] for i in ids], self.files.numbers[ids])
        return replace(self, labels=self.labels[ids], files=files)


def find(source: Path, num_threads: int) -> dict[str, Listing]:
    """`train` and `val` as far as `source` has them, with the same classes. Raises StoreError saying what is missing.

    Where official archives lie, they are the source, even beside extracted folders.
    """
    try:
        if not source.is_dir():
            raise StoreError(f"{source}: no such folder; it should hold train/ and val/, or ImageNet's archives")
        if (source / TRAIN_TAR).is_file() or (source / VAL_TAR).is_file():
            found = _archives(source)
        else:
            found = {s: _folder(source / s, num_threads) for s in (TRAIN, VAL) if (source / s).is_dir()}
            found = found or {TRAIN: _folder(source, num_threads)}
    except OSError as e:
        raise StoreError(f"{e.filename or source}: cannot be read: {e.strerror}") from e
    if TRAIN in found and VAL in found:
        _number_classes(found[VAL], found[TRAIN].class_names)
    return found


def _number_classes(val: Listing, class_names: tuple[str, ...]) -> None:
    """Number the validation split's classes as the training set does. An order by class stays one: both are sorted."""
    if class_names and not val.class_names:
        raise StoreError(f"{val.path}: no class folders; put each image into the folder of its class")
    unknown = sorted(set(val.class_names) - set(class_names))
    if unknown:
        raise StoreError(f"{val.path}: class {unknown[0]!r} is not among those of the training set")
    number = np.array([class_names.index(name) for name in val.class_names], np.int64)
    if len(number):
        val.labels, val.class_names = number[val.labels], class_names


# Folders


def _folder(root: Path, num_threads: int) -> Listing:
    classes = folders_in(root)
    with ThreadPoolExecutor(num_threads) as pool:  # on network file systems each answer takes its time
        inside = list(pool.map(lambda name: _files(root / name), classes))
    flat, strange = _files(root)
    num_inside = [len(files.names) for files, _ in inside]
    if flat.names and any(num_inside):
        raise StoreError(f"{root}: images lie both beside and inside its folders, e.g. {flat.names[0]}")
    if not flat.names and not any(num_inside):
        raise StoreError(f"{root}: no images; looked for *.JPEG, *.jpg and *.png there and one folder down")
    ignored = PassedOver()
    beside = [("", strange), *((f"{name}/", found) for name, (_, found) in zip(classes, inside, strict=True))]
    for folder, found in beside:
        for name, why in found:
            ignored.add(folder + name, why)
    if flat.names:
        return Listing(root, (), np.full(len(flat.names), -1, np.int64), flat, ignored)
    return _joined(root, tuple(classes), [files for files, _ in inside], ignored)


def _files(folder: Path) -> tuple[Files, list[tuple[str, str]]]:
    """The image files straight in `folder`; and what else lies there, with the reason why it is none."""
    rows, strange = [], []
    with os.scandir(folder) as entries:
        for e in entries:
            if e.is_dir():
                continue
            if e.name.startswith(".") or not e.name.lower().endswith(SUFFIXES):
                strange.append((e.name, "not named as an image"))
            elif not e.is_file():
                strange.append((e.name, "a link to nothing, or no regular file"))
            else:
                stat = e.stat()
                rows.append((e.name, stat.st_size, stat.st_mtime_ns, 0))
    return Files.of(rows), sorted(strange)


def _joined(
    path: Path, class_names: tuple[str, ...], parts: list[Files], ignored: PassedOver, archive: Archive | None = None
) -> Listing:
    """One listing out of each class's files."""
    names = [name for part in parts for name in part.names]
    if not names:
        raise StoreError(f"{path}: no images of the names that ImageNet gives them")
    labels = np.repeat(np.arange(len(parts)), [len(part.names) for part in parts])
    return Listing(
        path, class_names, labels, Files(names, np.concatenate([part.numbers for part in parts])), ignored, archive
    )


# Official archives


def _archives(source: Path) -> dict[str, Listing]:
    found = {}
    if (source / TRAIN_TAR).is_file():
        found[TRAIN] = _train_archive(source / TRAIN_TAR)
    if (source / VAL_TAR).is_file():
        found[VAL] = _val_archive(source)
    return found


def _train_archive(path: Path) -> Listing:
    archive, ignored = Archive(path), PassedOver()
    classes: dict[str, Member] = {}
    for outer in archive.members():
        match = _CLASS_TAR.fullmatch(outer.name)
        if outer.kind == "file" and match and match[1] not in classes:
            classes[match[1]] = outer
        else:
            ignored.add(outer.name, _why(outer, "not the archive of a class, or its second one"))
    parts = []
    for wnid, outer in sorted(classes.items()):
        rows = []
        for inner in archive.members(outer):
            match = _TRAIN_IMAGE.fullmatch(inner.name)
            if inner.kind == "file" and match and match[1] == wnid:
                rows.append(_row(inner))
            else:
                ignored.add(f"{wnid}.tar: {inner.name}", _why(inner, "not named as an image of its class"))
        parts.append(Files.of(rows))
    return _joined(path, tuple(sorted(classes)), parts, ignored, archive)


def _val_archive(source: Path) -> Listing:
    truth = _ground_truth(source / DEVKIT)
    archive, ignored = Archive(source / VAL_TAR), PassedOver()
    rows: dict[str, list[tuple[str, int, int, int]]] = {wnid: [] for wnid in sorted(set(truth))}
    for member in archive.members():
        match = _VAL_IMAGE.fullmatch(member.name)
        if member.kind != "file" or not match:
            ignored.add(member.name, _why(member, "not named as a validation image"))
        elif not 1 <= int(match[1]) <= len(truth):
            raise StoreError(f"{archive.path}: {member.name} has no line in the ground truth, which has {len(truth)}")
        else:
            rows[truth[int(match[1]) - 1]].append(_row(member))
    return _joined(archive.path, tuple(rows), [Files.of(r) for r in rows.values()], ignored, archive)


def _row(member: Member) -> tuple[str, int, int, int]:
    return member.name.removeprefix("./"), member.size, min(member.mtime, 1 << 62), member.offset


def _why(member: Member, otherwise: str) -> str:
    return otherwise if member.kind == "file" else f"a {member.kind}"


def _ground_truth(devkit: Path) -> list[str]:
    """The wnid of each validation image in order, out of the development kit."""
    if not devkit.is_file():
        raise StoreError(f"{devkit}: missing; the labels of {VAL_TAR} are in it")
    try:
        with gzip.open(devkit) as file:
            data = file.read(_MAX_DEVKIT_BYTES)
    except (OSError, EOFError, zlib.error) as e:
        raise StoreError(f"{devkit}: damaged, or not a gzip file: {e}") from e
    kit = {}
    for member in members(lambda at, size: data[at : at + size], 0, len(data), str(devkit)):
        for key in (_META, _TRUTH):
            if member.kind == "file" and key.fullmatch(member.name):
                kit[key] = data[member.offset : member.offset + member.size]
    if len(kit) < 2:
        raise StoreError(f"{devkit}: lacks data/meta.mat or data/ILSVRC2012_validation_ground_truth.txt")
    try:
        rows = [(row.get("ILSVRC2012_ID"), row.get("WNID")) for row in structs(kit[_META], "synsets")]
    except StoreError as e:
        raise StoreError(f"{devkit}: meta.mat: {e}") from e
    wnid_of = {int(k): w for k, w in rows if isinstance(k, float) and k.is_integer() and isinstance(w, str)}
    lines = kit[_TRUTH].split()
    wrong = [line for line in lines if not line.isdigit() or not re.fullmatch(r"n\d{8}", wnid_of.get(int(line), ""))]
    if wrong or not lines:
        raise StoreError(f"{devkit}: the ground truth names class {(wrong or [b''])[0][:20]!r}, which meta.mat lacks")
    return [wnid_of[int(line)] for line in lines]
