"""WebDataset shards, read in place: tar archives in which the files of a sample share a key, through an index of where
each image lies.

A key ends at the first dot of the base name; what follows is the field, in lower case: `jpg`, `jpeg`, `png` or `webp`
is the image, `cls` (a number or a name) or `json` (its `label`, `cls` or `class`) the label. A sample is a run of
members of one key.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from loaders.errors import StoreError
from loaders.store.folder import folders_in
from loaders.store.listing import Archive, Listing, PassedOver, Row, archives_of, numbers_of
from loaders.store.split_names import TRAIN_NAMES, VAL_NAMES, by_split
from loaders.store.tars import Member

_IMAGES = ("jpg", "jpeg", "png", "webp")
_LABELS = ("cls", "json")
_LABEL_KEYS = ("label", "cls", "class", "class_id", "label_id")  # of a json
_NAME_KEYS = ("class_name", "label_name", "classname")
_MAX_LABEL_BYTES = 1 << 20
_FOLDERS = (*TRAIN_NAMES, *VAL_NAMES, "data")


class _Sample(NamedTuple):
    key: str
    images: list[tuple[str, Row]]  # field, row
    labels: list[str]


def shards_in(folder: Path, suffix: str = ".tar") -> dict[str, list[Path]]:
    """The shards in `folder`, or in its folders train/, val/, ..., by split as their names say it: train, val, test."""
    places = (folder, *(folder / name for name in folders_in(folder) if name.lower() in _FOLDERS))
    found = sorted(p for place in places for p in place.glob(f"*{suffix}") if not p.name.startswith("."))
    return by_split(folder, found)


def list_shards(name: Path, paths: list[Path]) -> Listing:
    """The images in shards, in the order in which they lie there; `name` is what messages call them.

    Raises StoreError where a sample has several images or labels, and where some samples have labels and others none.
    """
    archives, ignored = archives_of(paths), PassedOver()
    rows, labels, unlabelled = [], [], []
    for number, archive in enumerate(archives):
        for sample in _samples(archive, number, ignored):
            if not sample.images:
                ignored.add(f"{archive.path.name}: {sample.key}", "a sample without an image")
                continue
            _check_sample(archive, sample)
            rows.append(sample.images[0][1])
            labels.append(sample.labels[0] if sample.labels else "")
            if not sample.labels:
                unlabelled.append(f"{archive.path.name}: {sample.key}")
    if not rows:
        raise StoreError(f"{name}: no images in its shards; looked for fields {', '.join(_IMAGES)}")
    if unlabelled and len(unlabelled) < len(rows):
        raise StoreError(f"{name}: {len(unlabelled)} of {len(rows)} samples have no label, first {unlabelled[0]}")
    class_names = _in_order(set(labels) - {""})
    number_of = {label: c for c, label in enumerate(class_names)} | {"": -1}
    found = np.array([number_of[label] for label in labels], np.int64)
    names = [row.path for row in rows]
    return Listing(name, class_names, found, names, numbers_of(rows), ignored, archives, paths=names)


def _in_order(labels: set[str]) -> tuple[str, ...]:
    """Numbers by value, else names by alphabet."""
    numbers = all(label.isdecimal() for label in labels)
    return tuple(sorted(labels, key=lambda label: (int(label), label) if numbers else (0, label)))


def _samples(archive: Archive, number: int, ignored: PassedOver) -> Iterator[_Sample]:
    sample: _Sample | None = None
    for member in archive.members():
        folder, slash, base = member.name.rpartition("/")
        key, dot, field = base.partition(".")
        if member.kind != "file" or not dot or not key:
            if member.kind != "folder":
                ignored.add(f"{archive.path.name}: {member.name}", "no sample's: its name has no key and field")
            continue
        key, field = folder + slash + key, field.lower()
        if sample is None or sample.key != key:
            if sample is not None:
                yield sample
            sample = _Sample(key, [], [])
        if field.rpartition(".")[2] in _IMAGES:
            row = Row(member.name, member.size, min(member.mtime, 1 << 62), member.offset, number)
            sample.images.append((field, row))
        elif field in _LABELS:
            label = _label(archive, member, field)
            sample.labels.extend([label] if label is not None and label not in sample.labels else [])
    if sample is not None:
        yield sample


def _label(archive: Archive, member: Member, field: str) -> str | None:
    """What a label file says; None where a json has no label. Raises StoreError where it is none."""
    where = f"{archive.path}: {member.name}"
    if member.size > _MAX_LABEL_BYTES:
        raise StoreError(f"{where}: {member.size} bytes are no label")
    try:
        text = archive.read(member.offset, member.size).decode().strip()
        if field == "cls":
            if not text:
                raise StoreError(f"{where}: an empty label")
            return text
        found = json.loads(text)
    except OSError as e:
        raise StoreError(f"{where}: cannot be read: {e.strerror}") from e
    except ValueError as e:
        raise StoreError(f"{where}: not a label: {e}") from e
    values = [found[key] for key in (*_NAME_KEYS, *_LABEL_KEYS) if key in found] if isinstance(found, dict) else []
    return str(values[0]) if values and isinstance(values[0], str | int) else None


def _check_sample(archive: Archive, sample: _Sample) -> None:
    where = f"{archive.path}: sample {sample.key!r}"
    if len(sample.images) > 1:
        fields = ", ".join(f".{field}" for field, _ in sample.images[:3])
        why = "; a key ends at the first dot of a name, so names with dots become one sample" if any(
            "." in field for field, _ in sample.images) else ""  # fmt: skip
        raise StoreError(f"{where} has {len(sample.images)} images ({fields}){why}")
    if len(sample.labels) > 1:
        raise StoreError(f"{where} has {len(sample.labels)} labels: {', '.join(sample.labels[:3])}")
