"""TensorFlow Datasets' files of an image classification set: TFRecords, each a tf.train.Example with an encoded image
and a label; class names in `label.labels.txt` beside them.

They are converted, not trained from: where images lie is known only once every byte of a file was read, and checked
against its sum. A reader of our own, because TensorFlow is a gigabyte and the readers without it skip the sums.

Source: TensorFlow's `core/lib/io/record_writer.h`, `core/example/feature.proto`; protobuf's encoding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from loaders.errors import StoreError
from loaders.store.columns import IMAGES, LABELS, numbered, own_names
from loaders.store.listing import Archive, Listing, PassedOver, Row, archives_of, numbers_of

_FILE = re.compile(r".+-(?P<split>\w+)\.tfrecord(?:-(?P<number>\d+)-of-(?P<count>\d+))?")
_OTHER_FORMATS = re.compile(r".+\.(array_record|riegeli|tfrecord\.gz)(-\d+-of-\d+)?")
_NAMES = ("file_name", "filename", "image/filename", "id")  # features that name an image, the first that is there
_FEATURES = "features.json"
_HEAD, _SUM = 12, 4  # bytes: of a record's length and the length's sum, of its sum
_VARINT, _EIGHT, _DELIMITED, _FOUR = 0, 1, 2, 5  # protobuf's wire types
_BYTES_LIST, _INT64_LIST = 1, 3  # of a Feature


def holds_records(path: Path) -> bool:
    """Whether `path` is a file of TensorFlow Datasets', or a folder of them, or of one folder a version of them."""
    if path.is_file():
        return _FILE.fullmatch(path.name) is not None or _OTHER_FORMATS.fullmatch(path.name) is not None
    return any(_files_in(folder) for folder in (path, *_folders_in(path)))


def records_in(path: Path) -> dict[str, list[Path]]:
    """The files in a folder that `holds_records`, by split: train, val, and others under their own names.

    Raises StoreError where it holds several versions, where files of a split are missing, and where they are of a
    format that is not read.
    """
    holding = [folder for folder in (path, *_folders_in(path)) if _files_in(folder)]
    if len(holding) > 1:
        raise StoreError(f"{path}: holds several sets; give one: {', '.join(map(str, holding))}")
    found: dict[str, list[Path]] = {}
    for file in _files_in(holding[0]):
        match = _FILE.fullmatch(file.name)
        if match is None:
            raise StoreError(f"{file}: of TensorFlow Datasets' formats only plain tfrecord is read; prepare it as that")
        found.setdefault({"validation": "val"}.get(match["split"], match["split"]), []).append(file)
    for files in found.values():
        _check_all_there(files)
    return found


def _folders_in(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir())


def _files_in(folder: Path) -> list[Path]:
    if not (folder / _FEATURES).is_file() and not any(folder.glob("*.tfrecord*")):
        return []
    kinds = (_FILE, _OTHER_FORMATS)
    return sorted(f for f in folder.iterdir() if any(kind.fullmatch(f.name) for kind in kinds) and f.is_file())


def _check_all_there(files: list[Path]) -> None:
    matches = [match for file in files if (match := _FILE.fullmatch(file.name)) and match["count"]]
    numbers, count = {int(match["number"]) for match in matches}, max((int(m["count"]) for m in matches), default=0)
    if missing := sorted(set(range(count)) - numbers):
        raise StoreError(
            f"{files[0].parent}: {len(missing):,} of the {count:,} files that {files[0].name} is one of are missing, "
            f"first number {missing[0]:,}"
        )


class _Image(NamedTuple):
    row: Row
    label: int | None
    name: str | None


def list_records(name: Path, paths: list[Path]) -> Listing:
    """The images in TFRecord files, in the order in which they lie there; `name` is what messages call them. A record
    that is not what its sum says is left out, and named.

    Raises StoreError where a file is cut or damaged so that what follows cannot be found, and where a record has no
    image or label, or several.
    """
    archives, ignored = archives_of(paths), PassedOver()
    images = [image for k, archive in enumerate(archives) for image in _images(archive, k, ignored)]
    if not images:
        raise StoreError(f"{name}: no records")
    labels = [image.label for image in images]
    class_names, found = numbered(labels, _class_names(paths[0].parent))
    of_file = [image.row.container for image in images]
    names = own_names([image.name for image in images], [path.name.replace(".tfrecord", "") for path in paths], of_file)
    rows = [image.row for image in images]
    return Listing(name, class_names, found, names, numbers_of(rows), ignored, archives, paths=names)


def _class_names(folder: Path) -> tuple[str, ...]:
    """Of `*.labels.txt`, one a line; empty where there is none."""
    for feature in LABELS:
        if (folder / f"{feature}.labels.txt").is_file():
            return tuple((folder / f"{feature}.labels.txt").read_text("utf-8").splitlines())
    return ()


def _described(folder: Path) -> dict[str, str]:
    """The features that `features.json` describes, and which class of TensorFlow Datasets' each is of."""
    try:
        found = json.loads((folder / _FEATURES).read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise StoreError(f"{folder / _FEATURES}: damaged: {e}") from e
    features = found.get("featuresDict", {}).get("features", {})
    return {name: kind.get("pythonClassName", "").rpartition(".")[2] for name, kind in features.items()}


def _images(archive: Archive, container: int, ignored: PassedOver) -> Iterator[_Image]:
    described, time = _described(archive.path.parent), archive.path.stat().st_mtime_ns
    for number, (start, payload) in enumerate(_records(archive)):
        where = f"{archive.path.name}: record {number:,}"
        if payload is None:
            ignored.add(where, "damaged: its sum is not that of its bytes")
            continue
        try:
            features = dict(_features(payload))
        except (IndexError, UnicodeDecodeError) as e:
            raise StoreError(f"{archive.path}: record {number:,} is no tf.train.Example") from e
        (at, end), label = _image_and_label(f"{archive.path}: record {number:,}", features, described)
        named = next((features[key].texts[0] for key in _NAMES if key in features and features[key].texts), None)
        row = Row(where, end - at, time, start + at, container)
        yield _Image(row, label, None if named is None else payload[slice(*named)].decode("utf-8", "replace"))


def _image_and_label(
    where: str, features: dict[str, _Feature], described: dict[str, str]
) -> tuple[tuple[int, int], int | None]:
    """Where the image lies in the record, and its label, None where the set has none. `described` says which features
    they are; without it they are known by name. Raises StoreError."""
    found = ", ".join(sorted(features)) or "none"
    images = [name for name in features if described.get(name) == "Image"] or [n for n in IMAGES if n in features]
    if not images:
        raise StoreError(f"{where}: which feature holds the image? {IMAGES[0]} is looked for; found are {found}")
    image = features[next((name for name in IMAGES if name in images), images[0])]
    if len(image.texts) != 1:
        raise StoreError(f"{where}: its feature {images[0]} holds {len(image.texts)} images in place of one")
    classes = [name for name in features if described.get(name) == "ClassLabel"] or [n for n in LABELS if n in features]
    if not classes:
        return image.texts[0], None
    label = features[next((name for name in LABELS if name in classes), classes[0])]
    if len(label.integers) != 1:
        raise StoreError(f"{where} has {len(label.integers)} labels")
    return image.texts[0], label.integers[0]


# ------------------------------------------------------------------------------------------------------- TFRecord files


def _records(archive: Archive) -> Iterator[tuple[int, bytes | None]]:
    """(where it begins, payload) of each record, None in place of a payload that is not what its sum says."""
    from loaders.store.crc32c import masked_crc32c  # compiles, for half a second where that was never done

    at, number = 0, 0
    while at < archive.length:
        where = f"{archive.path}: {{}} at byte {at:,}, record {number:,}"
        head = archive.read(at, _HEAD)
        if len(head) < _HEAD:
            raise StoreError(where.format("cut short"))
        length = int.from_bytes(head[:8], "little")
        if masked_crc32c(head[:8]) != int.from_bytes(head[8:], "little"):
            raise StoreError(
                where.format("damaged, or no TFRecord file: no record's length") + "; nothing behind is found"
            )
        if at + _HEAD + length + _SUM > archive.length:
            raise StoreError(where.format("cut short"))
        payload = archive.read(at + _HEAD, length + _SUM)
        is_sound = masked_crc32c(payload[:length]) == int.from_bytes(payload[length:], "little")
        yield at + _HEAD, payload[:length] if is_sound else None
        at, number = at + _HEAD + length + _SUM, number + 1


# ------------------------------------------------------------------------------------------------ tf.train.Example


class _Feature(NamedTuple):
    """The values of a feature: where its byte strings lie in the record, and its integers."""

    texts: list[tuple[int, int]]
    integers: list[int]


def _features(data: bytes) -> Iterator[tuple[str, _Feature]]:
    """The features of an Example by name: Example.features.feature is a map. Raises IndexError on what is none."""
    for _, at, end in _delimited(data, 0, len(data), 1):
        for _, entry_at, entry_end in _delimited(data, at, end, 1):
            name, values = b"", _Feature([], [])
            for field, begin, stop in _delimited(data, entry_at, entry_end, 1, 2):
                if field == 1:
                    name = data[begin:stop]
                else:
                    values = _values(data, begin, stop)
            yield name.decode(), values


def _values(data: bytes, at: int, end: int) -> _Feature:
    texts, integers = [], []
    for field, begin, stop in _delimited(data, at, end, _BYTES_LIST, _INT64_LIST):
        for _, kind, first, last in _fields(data, begin, stop):
            if field == _BYTES_LIST and kind == _DELIMITED:
                texts.append((first, last))
            while field == _INT64_LIST and first < last:  # packed or not: one varint after the other
                value, first = _varint(data, first)
                integers.append(value - (1 << 64) if value >> 63 else value)
    return _Feature(texts, integers)


def _delimited(data: bytes, at: int, end: int, *numbers: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, end) of the fields that are messages or strings and have one of these numbers."""
    for number, kind, start, stop in _fields(data, at, end):
        if kind == _DELIMITED and number in numbers:
            yield number, start, stop


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, wire type, start, end) of each field of the message in bytes at..end, where its value lies."""
    while at < end:
        tag, at = _varint(data, at)
        kind, start = tag & 7, at
        if kind == _VARINT:
            _, at = _varint(data, at)
        elif kind == _DELIMITED:
            length, start = _varint(data, at)
            at = start + length
        elif kind in (_EIGHT, _FOUR):
            at += 8 if kind == _EIGHT else 4
        else:
            raise IndexError(kind)
        if at > end:
            raise IndexError(at)
        yield tag >> 3, kind, start, at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number whose seven-bit groups begin at `at`, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        value, at = value | (byte & 0x7F) << shift, at + 1
        if byte < 0x80:
            return value, at
    raise IndexError(at)
