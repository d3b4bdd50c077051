"""Test sets that shift ImageNet's distribution, in their published layouts: ImageNetV2, -C, -R, -A and ObjectNet.

A reader checks at once that nothing is missing, and opens the parts of a set one by one: ImageNet-C is 75 times the
validation set. Which of ImageNet's classes an image belongs to is read from the names of folders, never from their
order, and for ObjectNet from the mappings that are published with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from loaders.errors import StoreError
from loaders.store.folder import FolderSource, ImageFiles, ListedSource, folders_in, images_in

ALEXNET_ERROR = {  # of each corruption, over its five severities (hendrycks/robustness, as in its paper's table 1)
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
SEVERITIES = range(1, 6)
_C_ARCHIVES = ("noise", "blur", "weather", "digital")  # and extra, which the error of ImageNet-C does not count
V2_FOLDERS = {
    "matched_frequency": "imagenetv2-matched-frequency-format-val",
    "threshold_0_7": "imagenetv2-threshold0.7-format-val",
    "top_images": "imagenetv2-top-images-format-val",
}
_RED_BORDER_PX = 2  # ObjectNet's, against training on it; its authors' code cuts off as much


@dataclass(frozen=True)
class ShiftedSet:
    """Test images of some or all of ImageNet's classes.

    wnids  one tuple a class of `source`: the ImageNet classes that count as right
    """

    source: ListedSource
    wnids: tuple[tuple[str, ...], ...]


Parts = Mapping[str, Callable[[], ShiftedSet]]
"""The parts of a published set by name ("" where it is one), each to be opened when it is its turn."""


@dataclass(frozen=True)
class Shift:
    """A published set: its reader, and the images of a whole part.

    cropped  images come as the network is to see them
    """

    read: Callable[[Path, tuple[str, ...]], Parts]
    num_images: int
    cropped: bool = False

    def parts(self, path: Path, wnids: tuple[str, ...]) -> Parts:
        """What lies at `path`; `wnids` are the classes that a classifier knows. Raises StoreError naming what is
        missing or strange."""
        try:
            if not path.is_dir():
                raise StoreError(f"{path}: no such folder")
            return self.read(path, wnids)
        except OSError as e:
            raise StoreError(f"{e.filename or path}: cannot be read: {e.strerror}") from e


def _imagenet_v2(path: Path, wnids: tuple[str, ...]) -> Parts:
    """`imagenetv2-*-format-val/K/*.jpeg`, any of the three; K counts the sorted wnids from 0."""
    found = {part: path / folder for part, folder in V2_FOLDERS.items() if (path / folder).is_dir()}
    found |= {part: path for part, folder in V2_FOLDERS.items() if path.name == folder}
    if not found:
        raise StoreError(f"{path}: no ImageNetV2; looked for {', '.join(V2_FOLDERS.values())}")
    numbered = {str(k): (wnid,) for k, wnid in enumerate(sorted(wnids))}
    for root in found.values():
        _check_folders(root, numbered, folders_in(root))
    return {part: partial(_by_folder, root, numbered) for part, root in found.items()}


def _imagenet_c(path: Path, wnids: tuple[str, ...]) -> Parts:
    """`CORRUPTION/SEVERITY/WNID/*.JPEG`, all 15 x 5, each corruption in `path` or in the folder of its archive there,
    `blur/defocus_blur/...`; the four extra corruptions are left aside."""
    places = [path, *(path / archive for archive in _C_ARCHIVES)]
    folder_of = {c: next((p / c for p in places if (p / c).is_dir()), path / c) for c in ALEXNET_ERROR}
    roots = {f"{c}/{severity}": folder / str(severity) for c, folder in folder_of.items() for severity in SEVERITIES}
    _refuse_missing(path, [part for part, root in roots.items() if not root.is_dir()], len(roots))
    same = {wnid: (wnid,) for wnid in wnids}
    for root in roots.values():
        _check_folders(root, same, folders_in(root))
    return {part: partial(_by_folder, root, same) for part, root in roots.items()}


def _some_classes(folder: str, path: Path, wnids: tuple[str, ...]) -> Parts:
    """`WNID/*.jpg` for some of the classes, in `path` or in `folder` below it."""
    root = path / folder if (path / folder).is_dir() else path
    classes = folders_in(root)
    if strange := sorted(set(classes) - set(wnids)):
        raise StoreError(f"{root}: folder {strange[0]!r} is none of the {len(wnids)} classes that this run knows")
    return {"": partial(_by_folder, root, {wnid: (wnid,) for wnid in classes})}


def _objectnet(path: Path, wnids: tuple[str, ...]) -> Parts:
    """`images/FOLDER/*.png` and `mappings/`: the classes that ImageNet has too, without the border."""
    root = path / "objectnet-1.0" if (path / "objectnet-1.0").is_dir() else path
    members = objectnet_classes(root / "mappings", wnids)
    _check_folders(root / "images", members, [f for f in folders_in(root / "images") if f in members])
    return {"": partial(_without_border, root / "images", members)}


SHIFTS = {
    "imagenet_v2": Shift(_imagenet_v2, 10_000),
    "imagenet_c": Shift(_imagenet_c, 50_000, cropped=True),  # published at 224 pixels, and so scored by its authors
    "imagenet_r": Shift(partial(_some_classes, "imagenet-r"), 30_000),
    "imagenet_a": Shift(partial(_some_classes, "imagenet-a"), 7_500),
    "objectnet": Shift(_objectnet, 18_574),
}


def objectnet_classes(mappings: Path, wnids: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """ObjectNet's folders that ImageNet has classes for, each with their wnids.

    Four files lead from one to the other: folder -> ObjectNet's label -> labels of ImageNet ("; " between them) -> line
    of `imagenet_to_label_2012_v2`, from 0 -> number of the sorted wnid. Raises StoreError where they do not.
    """
    label_of_folder = _json(mappings / "folder_to_objectnet_label.json")
    labels_of_object = _json(mappings / "objectnet_to_imagenet_1k.json")
    line_of_number = _json(mappings / "pytorch_to_imagenet_2012_id.json")
    lines = _lines(mappings / "imagenet_to_label_2012_v2")
    in_order = sorted(wnids)
    if line_of_number.keys() != set(map(str, range(len(in_order)))):
        raise StoreError(f"{mappings}: {len(line_of_number)} classes are numbered, and this run knows {len(in_order)}")
    folder_of_label = {label: folder for folder, label in label_of_folder.items()}
    try:
        wnid_of_label = {lines[line]: in_order[int(number)] for number, line in line_of_number.items()}
        return {
            folder_of_label[label]: tuple(wnid_of_label[name] for name in names.split("; "))
            for label, names in labels_of_object.items()
        }
    except LookupError as e:
        raise StoreError(f"{mappings}: the mappings do not fit each other: nothing for {e.args[0]!r}") from e


def _by_folder(root: Path, members: Mapping[str, tuple[str, ...]]) -> ShiftedSet:
    source = FolderSource(root)
    _refuse_empty(source, members)
    return ShiftedSet(source, tuple(members[name] for name in source.class_names))


def _without_border(root: Path, members: Mapping[str, tuple[str, ...]]) -> ShiftedSet:
    folders = sorted(members)
    files = [(c, f"{folder}/{name}") for c, folder in enumerate(folders) for name in images_in(root / folder)]
    labels = np.array([c for c, _ in files], np.int64)
    source = ImageFiles(root, [path for _, path in files], labels, tuple(folders), _RED_BORDER_PX)
    _refuse_empty(source, members)
    return ShiftedSet(source, tuple(members[folder] for folder in folders))


def _check_folders(root: Path, wanted: Iterable[str], found: Iterable[str]) -> None:
    wanted, found = set(wanted), set(found)
    _refuse_missing(root, sorted(wanted - found), len(wanted))
    if strange := sorted(found - wanted):
        raise StoreError(f"{root}: folder {strange[0]!r} is none of the {len(wanted)} classes that this run knows")


def _refuse_missing(root: Path, missing: list[str], num_wanted: int) -> None:
    if missing:
        named = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise StoreError(f"{root}: {len(missing)} of {num_wanted} folders are missing: {named}")


def _refuse_empty(source: ListedSource, wanted: Iterable[str]) -> None:
    held = {source.class_names[label] for label in np.unique(source.labels)}
    if empty := sorted(set(wanted) - held):
        raise StoreError(f"{source.name}: folder {empty[0]!r} holds no image")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path))
    except ValueError as e:
        raise StoreError(f"{path}: no JSON: {e}") from e
    if not isinstance(found, dict):
        raise StoreError(f"{path}: no JSON object")
    return found


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in _text(path).splitlines()]


def _text(path: Path) -> str:
    try:
        return os.fsdecode(path.read_bytes())
    except OSError as e:
        raise StoreError(f"{path}: cannot be read: {e.strerror}") from e
