"""The eleven small sets that representations are transferred to, in their published layouts and splits.

Those of SemPPL (arXiv 2301.05158), BYOL and SimCLR, which follow Kornblith et al. (arXiv 1805.08974). A set is opened
from the folder that its archives unpack to, or from the one above it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from loaders.errors import StoreError
from loaders.labels.subsets import resolve
from loaders.plan.draws import mix, tag
from loaders.plan.views import PerClass
from loaders.store.cifar import open_cifar10, open_cifar100
from loaders.store.folder import FolderSource, ImageFiles
from loaders.store.matlab import numbers, structs
from loaders.store.source import Source

T = TypeVar("T")
Metric = Literal["top1", "mean_per_class"]
_HELD_OUT = 10  # one training image in so many of every class, at least one, where no validation split is published
_CALTECH_PER_CLASS = 30  # for training; the rest is the test set


@dataclass(frozen=True)
class TransferSet:
    """What to learn from, and what to be tested on; both number their classes alike.

    is_val_N   bool, one an image of `learn`: those on which settings are chosen
    published  whether that choice is the authors', not ours
    """

    learn: Source
    test: Source
    is_val_N: np.ndarray
    published: bool


@dataclass(frozen=True)
class Transfer:
    """A published set: how to read it, how it is scored, and the images of the whole."""

    read: Callable[[Path], TransferSet]
    metric: Metric
    num_learn: int
    num_test: int

    def open(self, path: Path) -> TransferSet:
        """The set at `path`. Raises StoreError naming what is missing."""
        try:
            return self.read(path)
        except OSError as e:
            raise StoreError(f"{e.filename or path}: cannot be read: {e.strerror}") from e


class _Rows(NamedTuple):
    """A split as its list has it: paths below the set's folder, and the class of each."""

    paths: list[str]
    classes: list[str]

    def __add__(self, other: tuple[Any, ...]) -> _Rows:
        return _Rows(self.paths + other[0], self.classes + other[1])


def _food101(path: Path) -> TransferSet:
    root = _root(path, "meta/train.txt", "food-101")

    def split(name: str) -> _Rows:
        entries = _lines(root / f"meta/{name}.txt")  # apple_pie/1005649
        return _Rows([f"images/{e}.jpg" for e in entries], [e.partition("/")[0] for e in entries])

    return _of_lists(root, split("train"), split("test"))


def _birdsnap(path: Path) -> TransferSet:
    """The archive holds addresses; `get_birdsnap.py` fetches the images that are still there."""
    root = _root(path, "test_images.txt", "birdsnap")
    class_of = {path: species for path, species in _table(root / "images.txt", "path", "species_id")}
    test = {path for (path,) in _table(root / "test_images.txt", "path")}
    if strange := sorted(test - class_of.keys()):
        raise StoreError(f"{root}/test_images.txt: {strange[0]} is not in images.txt")
    there = [p for p in class_of if (root / "download/images" / p).is_file()]
    if not there:
        raise StoreError(f"{root}: no image of {len(class_of)} in download/images; get_birdsnap.py fetches them")

    def split(of_test: bool) -> _Rows:
        paths = [p for p in there if (p in test) == of_test]
        return _Rows([f"download/images/{p}" for p in paths], [class_of[p] for p in paths])

    return _of_lists(root, split(of_test=False), split(of_test=True))


def _sun397(path: Path) -> TransferSet:
    """Split 1. Some of the files called .jpg are GIF, PNG or BMP. The lists are an archive of their own, which is
    unpacked to `Partitions/` beside the images' folder `SUN397/` or in it, or straight into it."""
    root = path / "SUN397" if (path / "SUN397").is_dir() else path
    lists = _root(path, "Training_01.txt", "Partitions", "SUN397", "SUN397/Partitions", "../Partitions")

    def split(name: str) -> _Rows:
        entries = _lines(lists / f"{name}_01.txt")  # /b/bow_window/indoor/sun_ahsholsagvlrsboa.jpg
        return _Rows([e.removeprefix("/") for e in entries], [e.rpartition("/")[0] for e in entries])

    return _of_lists(root, split("Training"), split("Testing"))


def _cars(path: Path) -> TransferSet:
    root = _root(path, "cars_train", "stanford_cars")
    with_labels = _root(root, "cars_test_annos_withlabels.mat", "devkit") / "cars_test_annos_withlabels.mat"

    def split(folder: str, annotations: Path) -> _Rows:
        rows = _array(annotations, structs, "annotations")
        pairs = [(row.get("fname"), row.get("class")) for row in rows]
        if not all(isinstance(file, str) and isinstance(number, float) for file, number in pairs):
            raise StoreError(f"{annotations}: an annotation without fname or class")
        return _Rows([f"{folder}/{file}" for file, _ in pairs], [f"{number:03.0f}" for _, number in pairs])

    return _of_lists(root, split("cars_train", root / "devkit/cars_train_annos.mat"), split("cars_test", with_labels))


def _aircraft(path: Path) -> TransferSet:
    """The 100 variants; the banner with the photographer's name below each image stays, as in torchvision's reader."""
    root = _root(path, "images_variant_train.txt", "data", "fgvc-aircraft-2013b/data")

    def split(name: str) -> _Rows:
        entries = [line.partition(" ") for line in _lines(root / f"images_variant_{name}.txt")]  # 1025794 707-320
        return _Rows([f"images/{number}.jpg" for number, _, _ in entries], [variant for _, _, variant in entries])

    return _of_lists(root, split("train"), split("test"), split("val"))


def _dtd(path: Path) -> TransferSet:
    """Split 1."""
    root = _root(path, "labels/train1.txt", "dtd")

    def split(name: str) -> _Rows:
        entries = _lines(root / f"labels/{name}1.txt")  # banded/banded_0002.jpg
        return _Rows([f"images/{e}" for e in entries], [e.partition("/")[0] for e in entries])

    return _of_lists(root, split("train"), split("test"), split("val"))


def _pets(path: Path) -> TransferSet:
    root = _root(path, "annotations/trainval.txt", "oxford-iiit-pet")

    def split(name: str) -> _Rows:
        names = [line.split()[0] for line in _lines(root / f"annotations/{name}.txt")]  # Abyssinian_100 1 1 1
        return _Rows([f"images/{n}.jpg" for n in names], [n.rpartition("_")[0] for n in names])

    return _of_lists(root, split("trainval"), split("test"))


def _caltech101(path: Path) -> TransferSet:
    """Nothing is split as published: 30 images of each of the 102 classes, background among them, are drawn by key."""
    root = _root(path, "BACKGROUND_Google", "101_ObjectCategories", "caltech-101/101_ObjectCategories")
    images = FolderSource(root)
    ids = resolve(PerClass(_CALTECH_PER_CLASS), images).ids
    assert ids is not None
    learns = np.zeros(len(images), bool)
    learns[ids] = True

    def split(chosen: np.ndarray) -> _Rows:
        rows = np.flatnonzero(chosen).tolist()
        classes = [images.class_names[images.labels[i]] for i in rows]
        return _Rows([f"{c}/{images.name_of(i)}" for c, i in zip(classes, rows, strict=True)], classes)

    return _of_lists(root, split(learns), split(~learns))


def _flowers(path: Path) -> TransferSet:
    root = _root(path, "setid.mat", "flowers-102")
    labels = _array(root / "imagelabels.mat", numbers, "labels").astype(np.int64)

    def split(name: str) -> _Rows:
        ids = _array(root / "setid.mat", numbers, name).astype(np.int64)
        if len(ids) and not 1 <= ids.min() <= ids.max() <= len(labels):
            raise StoreError(f"{root}/setid.mat: {name} names images beyond the {len(labels)} in imagelabels.mat")
        return _Rows([f"jpg/image_{i:05d}.jpg" for i in ids.tolist()], [f"{c:03d}" for c in labels[ids - 1].tolist()])

    return _of_lists(root, split("trnid"), split("tstid"), split("valid"))


def _of_arrays(read: Callable[[Path], tuple[Source, Source]]) -> Callable[[Path], TransferSet]:
    def open_set(path: Path) -> TransferSet:
        train, test = read(path)
        return TransferSet(train, test, held_out(train.labels), published=False)

    return open_set


TRANSFERS = {
    "food101": Transfer(_food101, "top1", 75_750, 25_250),
    "cifar10": Transfer(_of_arrays(open_cifar10), "top1", 50_000, 10_000),
    "cifar100": Transfer(_of_arrays(open_cifar100), "top1", 50_000, 10_000),
    "birdsnap": Transfer(_birdsnap, "top1", 47_386, 2_443),
    "sun397": Transfer(_sun397, "top1", 19_850, 19_850),
    "cars": Transfer(_cars, "top1", 8_144, 8_041),
    "aircraft": Transfer(_aircraft, "mean_per_class", 6_667, 3_333),
    "dtd": Transfer(_dtd, "top1", 3_760, 1_880),
    "pets": Transfer(_pets, "mean_per_class", 3_680, 3_669),
    "caltech101": Transfer(_caltech101, "mean_per_class", 3_060, 6_084),
    "flowers": Transfer(_flowers, "mean_per_class", 2_040, 6_149),
}


def held_out(labels_N: np.ndarray) -> np.ndarray:
    """bool [N]: one image in ten of every class, one at least of two, none of a single one. A function of class and
    index alone."""
    keys = mix(tag("transfer validation"), labels_N, np.arange(len(labels_N)))
    held = np.zeros(len(labels_N), bool)
    for c in np.unique(labels_N):
        rows = np.flatnonzero(labels_N == c)
        if len(rows) > 1:
            held[rows[np.argsort(keys[rows], kind="stable")[: max(1, len(rows) // _HELD_OUT)]]] = True
    return held


def _of_lists(root: Path, train: _Rows, test: _Rows, val: _Rows | None = None) -> TransferSet:
    """The set whose splits are `train`, `test` and, where published, `val`. Raises StoreError where there is an image
    to be learnt from and tested on, or one that is missing, or a class of the test split alone."""
    learn = train + val if val is not None else train
    if both := sorted(set(learn.paths) & set(test.paths)):
        raise StoreError(f"{root}: the lists name {both[0]} both to learn from and to be tested on")
    class_names = tuple(sorted(set(learn.classes)))
    number = {name: c for c, name in enumerate(class_names)}
    if strange := sorted(set(test.classes) - number.keys()):
        raise StoreError(f"{root}: class {strange[0]!r} is in the test split alone")

    def source(rows: _Rows, name: str) -> ImageFiles:
        if not rows.paths:
            raise StoreError(f"{root}: the {name} split is empty")
        missing = [p for p in rows.paths if not (root / p).is_file()]
        if missing:
            count = f"{len(missing)} of {len(rows.paths)}"
            raise StoreError(f"{root}: {count} {name} images are missing, first {missing[0]}")
        labels = np.array([number[c] for c in rows.classes], np.int64)
        files = ImageFiles(root, rows.paths, labels, class_names)
        files.name = f"{root} ({name})"
        return files

    learned = source(learn, "training")
    is_val = held_out(learned.labels) if val is None else np.arange(len(learned)) >= len(train.paths)
    return TransferSet(learned, source(test, "test"), is_val, published=val is not None)


def _root(path: Path, witness: str, *inside: str) -> Path:
    """`path` or the folder `inside` it that holds `witness`."""
    for folder in (path, *(path / name for name in inside)):
        if (folder / witness).exists():
            return folder
    places = ", ".join(("there", *(f"in {name}/" for name in inside)))
    raise StoreError(f"{path}: {witness} is missing; looked {places}")


def _lines(path: Path) -> list[str]:
    """The lines of a list that hold something."""
    return [line.strip() for line in os.fsdecode(path.read_bytes()).splitlines() if line.strip()]


def _table(path: Path, *columns: str) -> list[tuple[str, ...]]:
    """Those columns of a table with tabs and a header line."""
    header, *rows = [line.split("\t") for line in _lines(path)] or [[]]
    try:
        at = [header.index(column) for column in columns]
        return [tuple(row[k] for k in at) for row in rows]
    except (ValueError, IndexError):
        raise StoreError(f"{path}: no table with tabs and the columns {', '.join(columns)}") from None


def _array(path: Path, read: Callable[[bytes, str], T], name: str) -> T:
    """An array of a MATLAB file."""
    try:
        return read(path.read_bytes(), name)
    except StoreError as e:
        raise StoreError(f"{path}: {e}") from e
