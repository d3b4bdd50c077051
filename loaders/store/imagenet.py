"""ImageNet as it is published: the official archives, those of the classes in them, and Kaggle's folders.

Nothing of an image is read here.
"""

from __future__ import annotations

import csv
import gzip
import re
import zlib
from pathlib import Path

from loaders.errors import StoreError
from loaders.store.folder import files_below, list_folder
from loaders.store.listed import listed_by, read_text
from loaders.store.listing import Archive, Listing, PassedOver, Row, archives_of, by_class
from loaders.store.matlab import structs
from loaders.store.tars import Member, members

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
KAGGLE_LIST = "LOC_val_solution.csv"

_CLASS_TAR = re.compile(r"(?:\./)?(n\d{8})\.tar", re.ASCII)
_TRAIN_IMAGE = re.compile(r"(?:\./)?(n\d{8})_\d+\.JPEG", re.ASCII)
_VAL_IMAGE = re.compile(r"(?:\./)?ILSVRC2012_val_(\d{8})\.JPEG", re.ASCII)
_META = re.compile(r"(?:\./)?[\w.-]+/data/meta\.mat", re.ASCII)
_TRUTH = re.compile(r"(?:\./)?[\w.-]+/data/ILSVRC2012_validation_ground_truth\.txt", re.ASCII)
_MAX_DEVKIT_BYTES = 1 << 28
_KAGGLE_FOLDERS = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC", "")


# Official archives


def has_archives(folder: Path) -> bool:
    return (folder / TRAIN_TAR).is_file() or (folder / VAL_TAR).is_file()


def train_archive(folder: Path) -> Listing:
    """The training images of the official archive, which holds one of every class."""
    path = folder / TRAIN_TAR
    archive, ignored = Archive(path), PassedOver()
    classes: dict[str, Member] = {}
    for outer in archive.members():
        match = _CLASS_TAR.fullmatch(outer.name)
        if outer.kind == "file" and match and match[1] not in classes:
            classes[match[1]] = outer
        else:
            ignored.add(outer.name, _why(outer, "not the archive of a class, or its second one"))
    wnids = sorted(classes)
    parts = [_class_rows(archive, 0, wnid, classes[wnid], ignored) for wnid in wnids]
    return _named(by_class(path, wnids, parts, ignored, (archive,)))


def class_archives_in(folder: Path) -> list[Path]:
    """`n01440764.tar`, ... straight in `folder`, sorted."""
    return sorted(path for path in folder.glob("n*.tar") if _CLASS_TAR.fullmatch(path.name))


def class_archives(folder: Path) -> Listing:
    """The training images in the archives of classes that lie in `folder`."""
    paths, ignored = class_archives_in(folder), PassedOver()
    archives = archives_of(paths)
    wnids = [path.stem for path in paths]
    parts = [_class_rows(a, k, wnid, None, ignored) for k, (a, wnid) in enumerate(zip(archives, wnids, strict=True))]
    for path in sorted(folder.iterdir()):
        if path not in paths:
            ignored.add(path.name, "not the archive of a class")
    return _named(by_class(folder, wnids, parts, ignored, archives))


def _class_rows(archive: Archive, number: int, wnid: str, outer: Member | None, ignored: PassedOver) -> list[Row]:
    """The images of one class, in the archive number `number` or in the one in it that `outer` is."""
    rows = []
    for inner in archive.members(outer):
        match = _TRAIN_IMAGE.fullmatch(inner.name)
        if inner.kind == "file" and match and match[1] == wnid:
            rows.append(_row(inner, number))
        else:
            ignored.add(f"{wnid}.tar: {inner.name}", _why(inner, "not named as an image of its class"))
    return rows


def val_archive(folder: Path) -> Listing:
    """The validation images of the official archive, with the labels of the development kit beside it."""
    truth = _ground_truth(folder / DEVKIT)
    archive, ignored = Archive(folder / VAL_TAR), PassedOver()
    rows: dict[str, list[Row]] = {wnid: [] for wnid in sorted(set(truth))}
    for member in archive.members():
        match = _VAL_IMAGE.fullmatch(member.name)
        if member.kind != "file" or not match:
            ignored.add(member.name, _why(member, "not named as a validation image"))
        elif not 1 <= int(match[1]) <= len(truth):
            raise StoreError(f"{archive.path}: {member.name} has no line in the ground truth, which has {len(truth)}")
        else:
            rows[truth[int(match[1]) - 1]].append(_row(member))
    return _named(by_class(archive.path, list(rows), list(rows.values()), ignored, (archive,)))


def _named(listing: Listing) -> Listing:
    if not len(listing):
        raise StoreError(f"{listing.path}: no images of the names that ImageNet gives them")
    return listing


def _row(member: Member, number: int = 0) -> Row:
    return Row(member.name.removeprefix("./"), member.size, min(member.mtime, 1 << 62), member.offset, number)


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


# Kaggle's folders


def kaggle_folder(path: Path) -> Path | None:
    """The folder CLS-LOC of Kaggle's archive at or below `path`, with train/ and a val/ without classes; None where
    there is none."""
    for inner in _KAGGLE_FOLDERS:
        folder = path / inner
        if (folder / "train").is_dir() and (folder / "val").is_dir() and _kaggle_list(folder) is not None:
            return folder
    return None


def kaggle_train(folder: Path) -> Listing:
    return list_folder(folder / "train")


def kaggle_val(folder: Path) -> Listing:
    """The validation images, with the labels of LOC_val_solution.csv. Raises StoreError where that is no such list, or
    names images that are not there."""
    path = _kaggle_list(folder)
    assert path is not None
    rows = list(csv.reader(read_text(path).splitlines()))
    if not rows or rows[0][:2] != ["ImageId", "PredictionString"]:
        raise StoreError(f"{path}: no list with the columns ImageId and PredictionString")
    pairs = [(f"{row[0]}.JPEG", row[1].split()[0]) for row in rows[1:] if len(row) > 1 and row[1].strip()]
    ignored = PassedOver()
    files = {row.path: row for row in files_below(folder / "val", ignored)}
    return listed_by(path, pairs, folder / "val", files, ignored)


def _kaggle_list(folder: Path) -> Path | None:
    parents = (folder, *folder.absolute().parents[:3])
    return next((place / KAGGLE_LIST for place in parents if (place / KAGGLE_LIST).is_file()), None)
