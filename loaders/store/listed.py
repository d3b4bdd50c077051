"""Images whose labels stand in a list: Tiny-ImageNet's annotations, a CSV or TSV of path and label."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from loaders.errors import StoreError
from loaders.store.folder import files_below, list_folder
from loaders.store.images import SUFFIXES
from loaders.store.listing import Listing, PassedOver, Row, numbers_of
from loaders.store.split_names import split_of

TABLES = (".csv", ".tsv")
ANNOTATIONS = "val_annotations.txt"

_PATHS = (
    "path",
    "file",
    "filename",
    "file_name",
    "filepath",
    "file_path",
    "image",
    "image_path",
    "image_id",
    "img",
    "id",
)
_LABELS = ("label", "class", "class_name", "classname", "category", "target", "species", "breed", "wnid")
_SPLITS = ("split", "set", "subset", "data set", "dataset", "data_set", "partition", "phase", "usage")
_FOLDERS = ("", "images", "train")  # beside a table, where its paths may begin
_MAX_TABLE_BYTES = 1 << 30


def listed_by(
    where: Path,
    pairs: list[tuple[str, str]],
    root: Path,
    files: Mapping[str, Row],
    ignored: PassedOver,
    strip: str = "",
) -> Listing:
    """The images that the list `where` names, (path below `root`, class; "" for none), out of `files`, by path. Names
    begin after `strip`, or after a folder called as their class. Files that the list leaves out are added to `ignored`.

    Raises StoreError where the list names an image that is not there, or one twice.
    """
    missing = [path for path, _ in pairs if path not in files]
    if missing:
        raise StoreError(f"{where}: {len(missing)} of its {len(pairs)} images are not in {root}, first {missing[0]}")
    if not pairs:
        raise StoreError(f"{where}: names no image")
    class_of = dict(pairs)
    if len(class_of) < len(pairs):
        seen: set[str] = set()
        twice = next(path for path, _ in pairs if path in seen or seen.add(path))  # type: ignore[func-returns-value]
        raise StoreError(f"{where}: {len(pairs) - len(class_of)} lines name an image twice, first {twice}")
    for path in sorted(files.keys() - class_of.keys()):
        ignored.add(path, f"not in {where.name}")
    class_names = tuple(sorted(set(class_of.values()) - {""}))
    number = {name: c for c, name in enumerate(class_names)} | {"": -1}
    chosen = sorted((number[name], path) for path, name in class_of.items())
    labels = np.array([c for c, _ in chosen], np.int64)
    names = [path.removeprefix(f"{class_of[path]}/").removeprefix(strip) for _, path in chosen]
    paths = [path for _, path in chosen]
    return Listing(root, class_names, labels, names, numbers_of([files[p] for p in paths]), ignored, paths=paths)


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark. Raises StoreError."""
    try:
        if os.stat(path).st_size > _MAX_TABLE_BYTES:
            raise StoreError(f"{path}: more than {_MAX_TABLE_BYTES} bytes, not a list")
        return path.read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise StoreError(f"{path}: cannot be read: {e.strerror}") from e
    except UnicodeDecodeError:
        raise StoreError(f"{path}: not a text file in UTF-8") from None


# Tiny-ImageNet


def is_tiny_imagenet(path: Path) -> bool:
    return (path / "val" / ANNOTATIONS).is_file() or ((path / "wnids.txt").is_file() and (path / "train").is_dir())


def tiny_train(path: Path) -> Listing:
    """`train/<wnid>/images/*`: names are the files' own."""
    listing = list_folder(path / "train")
    listing.paths = [listing.where(i) for i in range(len(listing))]
    listing.names = [name.removeprefix("images/") for name in listing.names]
    return listing


def tiny_val(path: Path) -> Listing:
    """`val/images/*`, with the labels of val_annotations.txt."""
    where, ignored = path / "val" / ANNOTATIONS, PassedOver()
    pairs = []
    for line in read_text(where).splitlines():
        name, _, rest = line.partition("\t")
        if line.strip():
            pairs.append((f"images/{name}", rest.partition("\t")[0].strip()))
    if unlabelled := [name for name, wnid in pairs if not wnid]:
        raise StoreError(f"{where}: {len(unlabelled)} lines have no class after a tab, first {unlabelled[0]}")
    files = {row.path: row for row in files_below(path / "val", ignored)}
    return listed_by(where, pairs, path / "val", files, ignored, strip="images/")


# Tables


def list_table(path: Path) -> dict[str, Listing]:
    """The images that a CSV or TSV names, with their labels: columns called path and label or so, or two without a
    header; by split (train, val, test) where a column says which, else all as `train`. Paths begin at the table's
    folder, at `images/` or `train/` in it, or at the folder of the table's name; the suffix may be left out.

    Raises StoreError where columns or files are missing, and where labels contradict the folders that are named after
    them.
    """
    rows = list(csv.reader(read_text(path).splitlines(), delimiter="\t" if path.suffix.lower() == ".tsv" else ","))
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    pairs = _pairs(path, rows)
    splits = _splits(path, rows) or ["train"] * len(pairs)
    if not pairs:
        raise StoreError(f"{path}: names no image")
    root, suffix = _place_of(path, pairs[0][0])
    pairs = [(file + suffix, label) for file, label in pairs]
    _check_folders(path, pairs)
    found: dict[str, list[tuple[str, str]]] = {}
    for pair, split in zip(pairs, splits, strict=True):
        found.setdefault(split, []).append(pair)
    listings = {}
    for split, some in found.items():
        files = {file: row for file, _ in some if (row := _row(root, file)) is not None}
        listings[split] = listed_by(path, some, root, files, PassedOver())
    return listings


def _splits(path: Path, rows: list[list[str]]) -> list[str]:
    """The split of each image of a table, where a column says it; else nothing."""
    header = [cell.strip().lower() for cell in rows[0]]
    at = next((header.index(name) for name in _SPLITS if name in header), None)
    if at is None:
        return []
    said = [row[at].strip() if at < len(row) else "" for row in rows[1:]]
    splits = [split_of(text) for text in said]
    if not any(splits):
        return []  # of something else
    if not all(splits):
        other = said[splits.index("")]
        raise StoreError(f"{path}: its column {rows[0][at]!r} says {other!r}, which is neither train, val nor test")
    return splits


def _pairs(path: Path, rows: list[list[str]]) -> list[tuple[str, str]]:
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    paths, labels = [c for c in _PATHS if c in header], [c for c in _LABELS if c in header]
    if paths and labels:
        at, of, rows = header.index(paths[0]), header.index(labels[0]), rows[1:]
    elif len(header) == 2 and not paths and not labels:
        at, of = 0, 1
    else:
        raise StoreError(
            f"{path}: which columns are path and label? It has {', '.join(rows[0]) if rows else 'none'}; call them "
            "path and label"
        )
    short = [k for k, row in enumerate(rows) if len(row) <= max(at, of)]
    if short:
        raise StoreError(f"{path}: {len(short)} lines lack a column, first {','.join(rows[short[0]])!r}")
    return [(os.path.normpath(row[at].strip()), row[of].strip()) for row in rows]


def _place_of(path: Path, file: str) -> tuple[Path, str]:
    """The folder at which a table's paths begin, and what must be added to them, judged by its first image."""
    for folder in (*_FOLDERS, path.stem):
        for suffix in ("", *SUFFIXES, ".JPEG", ".JPG", ".PNG"):
            if (path.parent / folder / (file + suffix)).is_file():
                return path.parent / folder, suffix
    return path.parent, ""


def _row(root: Path, file: str) -> Row | None:
    try:
        stat = os.stat(root / file)
    except OSError:
        return None
    return Row(file, stat.st_size, stat.st_mtime_ns)


def _check_folders(path: Path, pairs: list[tuple[str, str]]) -> None:
    """A folder that is called as a class should hold images of that class."""
    classes = {label for _, label in pairs if label}
    wrong = []
    for file, label in pairs:
        folder = file.rpartition("/")[0].rpartition("/")[2]
        if label and folder != label and folder in classes:
            wrong.append((file, label))
    if wrong:
        raise StoreError(
            f"{path}: {len(wrong)} labels contradict the folders of their images, first {wrong[0][0]}, which it "
            f"calls {wrong[0][1]!r}"
        )
