"""What a path holds is decided here, for every command alike: a table of openers, of which the first that knows a path
opens it.

A new format or layout is one file and one row of OPENERS.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from loaders.errors import StoreError
from loaders.store import cifar, imagenet, listed, parquet, records, shards
from loaders.store.arrays import holds_arrays, open_arrays
from loaders.store.beton import BetonSource
from loaders.store.digits import open_digits
from loaders.store.folder import ListedSource, files_below, folders_in, images_in, list_folder
from loaders.store.images import SUFFIXES
from loaders.store.listing import Listing, PassedOver
from loaders.store.source import Source, concatenate
from loaders.store.split_names import TEST_NAMES, TRAIN_NAMES, VAL_NAMES, by_split, split_of, train_and_val

DIGITS = "digits"  # the embedded set, in place of a path


@dataclass(frozen=True)
class Splits:
    """What one path holds. A `single` set, not divided into splits, serves as either.

    `said` is what it was taken for; `left_out` what lies there and is used for neither split; `is_divided` says whether
    there are validation images, opened or not; `converted_first` how they are converted, where nothing trains on them
    as they are.
    """

    said: str
    train: Source | None
    validation: Source | None = None
    single: bool = False
    left_out: PassedOver | None = None
    is_divided: bool = False
    converted_first: str = ""

    def ignored(self) -> PassedOver:
        """All that is left out, of the path and of its splits."""
        everything, both = PassedOver(), self.train is not None and self.validation is not None
        everything.update(self.left_out or PassedOver())
        for source in (self.train, self.validation):
            if isinstance(source, ListedSource):
                everything.update(source.listing.ignored, f"{source.listing.path.name}/" if both else "")
        return everything


class Opener(NamedTuple):
    """A kind of data: what messages call it, whether a path looks like it, and how it is opened. `open` gets the path,
    and whether validation images are wanted: where not, nothing of theirs is looked at. What is not read `in_place` is
    converted before it is trained on."""

    said: str
    looks_like: Callable[[Path], bool]
    open: Callable[[Path, bool], Splits]
    in_place: bool = True


def open_path(path: str, validation: bool = True, in_place: bool = False) -> Splits:
    """What `path` holds. Raises StoreError that says what was looked for, and, where it is to be read `in_place` and
    cannot be, how it is converted."""
    if path == DIGITS:
        return Splits("handwritten digits (embedded)", *open_digits(), is_divided=True)
    p = Path(path)
    try:
        if not p.exists():
            raise StoreError(f"{path}: no such file or folder")
        for opener in OPENERS:
            if opener.looks_like(p):
                said = f"{path}: {opener.said} are converted first: fastssl convert-imagenet {path} OUT"
                if in_place and not opener.in_place:
                    raise StoreError(said)
                return replace(opener.open(p, validation), converted_first="" if opener.in_place else said)
    except OSError as e:
        raise StoreError(f"{e.filename or path}: cannot be read: {e.strerror}") from e
    raise StoreError(f"{p}: no images; looked for {'; '.join(opener.said for opener in OPENERS)}")


# .beton files


def _open_beton(p: Path, validation: bool) -> Splits:
    source = BetonSource(p)
    return Splits(f"a .beton{_changed([source])}", source, single=True)


def _changed(betons: Iterable[BetonSource]) -> str:
    """What conversions have done to pixels, in words."""
    how = dict.fromkeys(beton.changed for beton in betons if beton.changed)
    return f", pixels changed ({'; '.join(how)})" if how else ""


def _betons_in(p: Path) -> list[Path]:
    return sorted(f for f in p.glob("*.beton") if not f.name.startswith(".")) if p.is_dir() else []


def _open_betons(p: Path, validation: bool) -> Splits:
    files = by_split(p, _betons_in(p))
    train, val = train_and_val(files)
    left_out = _beside(
        p, "beside the .beton files", [path for name in files.keys() - {train, val} for path in files[name]]
    )
    parts = [BetonSource(f) for f in files[train]] if train else []
    held_out = [BetonSource(f) for f in files[val]] if val and validation else []
    return Splits(
        f"a folder of .beton files{_changed([*parts, *held_out])}",
        concatenate(parts) if parts else None,
        concatenate(held_out) if held_out else None,
        left_out=left_out,
        is_divided=val is not None,
    )


def _beside(p: Path, where: str, others: Iterable[Path] = (), used: Iterable[str] = ()) -> PassedOver:
    """What lies in a folder of files of many images and is not read: those of `others`, images, and folders of images
    but those `used`."""
    left_out = PassedOver()
    for path in sorted(others):
        left_out.add(str(path.relative_to(p)), f"of a {split_of(path.name) or 'second'} set")
    for name in images_in(p):
        left_out.add(name, f"an image {where}")
    for name in folders_in(p):
        if name not in used and _holds_images(p / name):
            left_out.add(f"{name}/", f"a folder of images {where}")
    return left_out


def _holds_images(folder: Path) -> bool:
    """Whether any image file lies in `folder` or below."""
    return any(name.lower().endswith(SUFFIXES) for _, _, files in os.walk(folder) for name in files)


# Listings


def _open_table(p: Path, validation: bool) -> Splits:
    listings = listed.list_table(p)
    train, val = train_and_val(listings)
    learnt = ListedSource(listings[train]) if train else None
    held_out = ListedSource(listings[val]) if val and validation else None
    left_out = PassedOver()
    for split in sorted(listings.keys() - {train, val}):
        for path in listings[split].paths or ():
            left_out.add(path, f"of a {split} set")
    return Splits("a table of paths and labels", learnt, held_out, not val, left_out, val is not None)


def _open_archives(p: Path, validation: bool) -> Splits:
    train = ListedSource(imagenet.train_archive(p)) if (p / imagenet.TRAIN_TAR).is_file() else None
    has_val = (p / imagenet.VAL_TAR).is_file()
    val = ListedSource(imagenet.val_archive(p)) if has_val and validation else None
    return Splits("ImageNet's archives", train, val, is_divided=has_val)


def _class_archives_at(p: Path) -> Path | None:
    return next((f for f in (p / "train", p) if f.is_dir() and imagenet.class_archives_in(f)), None)


def _open_class_archives(p: Path, validation: bool) -> Splits:
    folder = _class_archives_at(p)
    assert folder is not None
    train, said = ListedSource(imagenet.class_archives(folder)), "archives of ImageNet's classes, n*.tar"
    val = _first(folders_in(p), VAL_NAMES)
    left_out = _beside(folder, "beside the archives", used=[val] if val and folder == p else ())
    if val is None:
        return Splits(said, train, single=folder == p, left_out=left_out)
    return Splits(
        said, train, ListedSource(list_folder(p / val)) if validation else None, left_out=left_out, is_divided=True
    )


def _open_kaggle(p: Path, validation: bool) -> Splits:
    folder = imagenet.kaggle_folder(p)
    assert folder is not None
    val = ListedSource(imagenet.kaggle_val(folder)) if validation else None
    train = ListedSource(imagenet.kaggle_train(folder))
    return Splits("Kaggle's ILSVRC folders", train, val, left_out=_others(folder), is_divided=True)


def _open_tiny(p: Path, validation: bool) -> Splits:
    train = ListedSource(listed.tiny_train(p)) if (p / "train").is_dir() else None
    has_val = (p / "val").is_dir()
    val = ListedSource(listed.tiny_val(p)) if has_val and validation else None
    return Splits("Tiny-ImageNet's layout", train, val, left_out=_others(p), is_divided=has_val)


def _open_shards(p: Path, validation: bool) -> Splits:
    return _sharded("WebDataset shards", p, _by_split(p, ".tar"), shards.list_shards, validation)


def _open_parquet(p: Path, validation: bool) -> Splits:
    return _sharded("parquet files", p, _by_split(p, parquet.SUFFIX), parquet.list_parquet, validation)


def _open_records(p: Path, validation: bool) -> Splits:
    by_split = records.records_in(p) if p.is_dir() else {"train": [p]}
    return _sharded("TensorFlow Datasets' records", p, by_split, records.list_records, validation)


def _by_split(p: Path, suffix: str) -> dict[str, list[Path]]:
    return shards.shards_in(p, suffix) if p.is_dir() else {"train": [p]}


def _sharded(
    said: str,
    p: Path,
    files: dict[str, list[Path]],
    listed_in: Callable[[Path, list[Path]], Listing],
    validation: bool,
) -> Splits:
    """Files of many images each, by split as their names say it."""
    train, val = train_and_val(files)
    others = [path for name in files.keys() - {train, val} for path in files[name]]
    used = {path.relative_to(p).parts[0] for paths in files.values() for path in paths if path != p}
    left_out = _beside(p, "beside these files", others, used) if p.is_dir() else PassedOver()

    def source(split: str | None, title: str) -> Source | None:
        name = p / f"{title} files" if train and val else p
        return ListedSource(listed_in(name, files[split])) if split else None

    held_out = source(val, "val") if validation else None
    return Splits(said, source(train, "train"), held_out, val is None, left_out, val is not None)


def _first(folders: list[str], names: Iterable[str]) -> str | None:
    """The folder that is called as the first of `names` that there is, in either case."""
    called = {f.lower(): f for f in folders} | {f: f for f in folders}
    return next((called[name] for name in names if name in called), None)


def _divided(p: Path) -> tuple[str | None, str | None]:
    """The folders of training and validation images where those in `p` are splits: `train` may also be a class of
    vehicles among others."""
    folders = folders_in(p)
    train, val = _first(folders, TRAIN_NAMES), _first(folders, VAL_NAMES)
    if val and val.lower() in TEST_NAMES and not (train and folders_in(p / val)):
        val = None  # without classes it is a set to be predicted
    all_named = len(folders) > 1 and all(f.lower() in (*TRAIN_NAMES, *VAL_NAMES) for f in folders)
    if train and (val or len(folders) == 1 or all_named or folders_in(p / train)):
        return train, val
    if not train and val and (val.lower() == "val" or len(folders) == 1):
        return None, val
    return _named_alike(p, folders)


def _named_alike(p: Path, folders: list[str]) -> tuple[str | None, str | None]:
    """`seg_train` and `seg_test`, say: folders whose names have the words of splits in them, and which hold folders of
    the same names, as classes would not."""
    named: dict[str, str] = {}
    for name in folders:
        named.setdefault(split_of(name), name)
    train, val = train_and_val(named.keys() - {""})
    if train != "train" or val is None or not {*folders_in(p / named[train])} & {*folders_in(p / named[val])}:
        return None, None
    return named[train], named[val]


def _open_divided(p: Path, validation: bool) -> Splits:
    train, val = _divided(p)
    said = f"image folders {' and '.join(f'{name}/' for name in (train, val) if name)}"
    learnt = ListedSource(list_folder(p / train)) if train else None
    held_out = ListedSource(list_folder(p / val)) if val and validation else None
    return Splits(said, learnt, held_out, left_out=_others(p), is_divided=val is not None)


def _others(p: Path) -> PassedOver:
    """What lies in a divided folder beside its splits."""
    left_out, chosen = PassedOver(), _divided(p)
    for row in sorted(files_below(p, left_out, deep=False)):
        left_out.add(row.path, "an image beside the splits")
    for name in folders_in(p):
        if name not in chosen:
            second = name.lower() in (*TRAIN_NAMES, *VAL_NAMES)
            why = "a second set for the same purpose, or without classes" if second else "a folder beside the splits"
            left_out.add(f"{name}/", why)
    return left_out


def _open_folder(p: Path, validation: bool) -> Splits:
    listing = list_folder(p)
    said = "a folder of a folder a class" if listing.class_names else "a folder of images without classes"
    return Splits(said, ListedSource(listing), single=True)


def _one_image(p: Path, validation: bool) -> Splits:
    raise StoreError(f"{p}: a single image; give the folder that it lies in")


def _is_sharded(p: Path, suffix: str) -> bool:
    """What lies beside image folders is theirs, and left out: the archive that they were unpacked from, or a table."""
    if p.is_file():
        return p.suffix == suffix
    found = [path for paths in shards.shards_in(p, suffix).values() for path in paths]
    if not found or any(path.parent != p for path in found) or _divided(p) != (None, None):
        return any(path.parent != p for path in found)
    return len(list(islice((f for f in folders_in(p) if _holds_images(p / f)), 2))) < 2


def _named(p: Path, *suffixes: str) -> bool:
    return p.is_file() and p.suffix.lower() in suffixes


OPENERS = (
    Opener("*.beton", lambda p: bool(_betons_in(p)), _open_betons),
    Opener("images.npy and labels.npy", holds_arrays,
           lambda p, validation: Splits("arrays", open_arrays(p), single=True)),
    Opener("a .csv or .tsv of paths and labels", lambda p: _named(p, *listed.TABLES), _open_table),
    Opener("a single image", lambda p: _named(p, *SUFFIXES), _one_image),
    Opener(f"CIFAR-10's {cifar.TRAIN[0]}", lambda p: cifar.find(p) is not None,
           lambda p, validation: Splits("CIFAR-10", *cifar.open_cifar10(p), is_divided=True)),
    Opener(f"ImageNet's {imagenet.TRAIN_TAR}", imagenet.has_archives, _open_archives),
    Opener("Kaggle's ILSVRC/Data/CLS-LOC", lambda p: imagenet.kaggle_folder(p) is not None, _open_kaggle),
    Opener("Tiny-ImageNet's val_annotations.txt", listed.is_tiny_imagenet, _open_tiny),
    Opener("n*.tar of ImageNet's classes", lambda p: _class_archives_at(p) is not None, _open_class_archives),
    Opener("WebDataset's *.tar", lambda p: _is_sharded(p, ".tar"), _open_shards),
    Opener(f"Hugging Face's *{parquet.SUFFIX}", lambda p: _is_sharded(p, parquet.SUFFIX), _open_parquet, False),
    Opener("TensorFlow Datasets' *.tfrecord*", records.holds_records, _open_records, False),
    Opener("a .beton", Path.is_file, _open_beton),
    Opener("train/ and val/", lambda p: _divided(p) != (None, None), _open_divided),
    Opener("images, or folders of them", lambda p: bool(folders_in(p) or images_in(p)), _open_folder),
)  # fmt: skip
