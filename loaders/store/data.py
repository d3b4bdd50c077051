"""`--data` values become sources: which files a path means, and which source a stream's key means."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, overload

from loaders.errors import StoreError
from loaders.store import cifar
from loaders.store.beton import BetonSource
from loaders.store.digits import open_digits
from loaders.store.folder import FolderSource, folders_in, images_in
from loaders.store.masks import MaskFile, Masks, check_count, masks_by_key
from loaders.store.source import Source, concatenate, digest, relabelled

TRAIN, VALIDATION, LABELLED = "train", "validation", "labelled"
MASKS = "masks"  # the key of files that say what is foreground in the images of the others
_KEYED = re.compile(r"([a-z][a-z0-9_]*)=(.+)", re.DOTALL)


@dataclass(frozen=True)
class DataSets:
    """The sources of a run by key; all number their classes as the labelled one does.

    `search` are the folders of the data, where label lists may lie. `masks` say what is foreground in the images of a
    key, for views with a mask.
    """

    sources: Mapping[str, Source]
    search: tuple[Path, ...] = ()
    masks: Mapping[str, Masks] = field(default_factory=dict)

    @overload
    def get(self, key: Literal["validation"]) -> Source | None: ...  # type: ignore[overload-overlap]
    @overload
    def get(self, key: str) -> Source: ...
    def get(self, key: str) -> Source | None:
        """The source called `key`, else the plain training set; for `validation` the images that are never trained
        on, None where there are none. Raises StoreError where there is nothing to train on."""
        source = self.sources.get(key)
        if source is None and key != VALIDATION:
            source = self.sources.get(TRAIN)
            if source is None:
                given = ", ".join(sorted(self.sources)) or "none"
                other = ", several times for several sets" if key == TRAIN else f" or --data {key}=PATH"
                raise StoreError(f"no data for {key!r}: give --data PATH{other} (given: {given})")
        return source

    def masks_of(self, key: str) -> Masks:
        """The masks of `get(key)`'s images. Raises StoreError where there are none, or more or fewer than images."""
        masks = self.masks.get(key if key in self.sources else TRAIN)
        if masks is None:
            raise StoreError(
                f"no masks for the images of {self.get(key).name}: make them with python -m tools.saliency and give "
                "--data masks=FILE, or train without them: --set masks=off"
            )
        check_count(masks, self.get(key))
        return masks

    def fingerprints(self) -> dict[str, str]:
        """What identifies the data, and the masks where they are given, by key."""
        found = {key: source.fingerprint() for key, source in sorted(self.sources.items())}
        if self.masks:
            found[MASKS] = digest([(key, masks.fingerprint()) for key, masks in sorted(self.masks.items())])
        return found


@dataclass(frozen=True)
class _Splits:
    """What one path holds. A single set, not divided into splits, serves as either."""

    train: Source | None
    validation: Source | None
    single: bool = False


def open_data(specs: tuple[str, ...], *, validation: bool = True) -> DataSets:
    """Open `PATH` and `key=PATH` values; several paths under one key are one set. Without `validation` there are no
    validation images, and no folder or `.beton` of theirs is looked at.

    PATH is `digits`, a `.beton`, a folder of them (`val.beton` apart, the rest is the training set), CIFAR-10 in
    binary form, or an image folder, whole or divided into `train/` and `val/`; under the key `masks`, a file of masks
    of any of the others. A path that holds an equals sign can be written `./a=b`. Raises StoreError that says what was
    looked for.
    """
    found: dict[str, list[Source]] = defaultdict(list)
    mask_files = []
    for spec in specs:
        key, path = parse_spec(spec)
        if key == MASKS:
            mask_files.append(MaskFile(path))
            continue
        if key == VALIDATION and not validation:
            continue
        splits = _open(path, validation)
        if key is None:
            if splits.train is not None:
                found[TRAIN].append(splits.train)
            if splits.validation is not None and validation:
                found[VALIDATION].append(splits.validation)
        else:
            found[key].append(_chosen(splits, key, path))
    sources = _with_common_classes(found)
    return DataSets(sources, search_folders(specs), masks_by_key(sources, mask_files))


def parse_spec(spec: str) -> tuple[str | None, str]:
    """(key, path) of a `--data` value; the key is None where none is written."""
    keyed = _KEYED.fullmatch(spec)
    return (keyed[1], keyed[2]) if keyed else (None, spec)


def search_folders(specs: tuple[str, ...]) -> tuple[Path, ...]:
    """The folders of the data, where label lists may lie."""
    paths = (Path(path) for _, path in map(parse_spec, specs) if path != "digits")
    return tuple(dict.fromkeys(path if path.is_dir() else path.parent for path in paths))


def _chosen(splits: _Splits, key: str, path: str) -> Source:
    wanted = splits.validation if key == VALIDATION and not splits.single else splits.train
    if wanted is None:
        raise StoreError(f"{key}={path}: it has no {'val' if key == VALIDATION else 'train'} split")
    return wanted


def _with_common_classes(found: Mapping[str, list[Source]]) -> dict[str, Source]:
    """Each key's sources as one, labels numbered as in the labelled set. A validation class that the labelled set
    does not have is an error; elsewhere such labels are as good as unknown (-1)."""
    joined = {key: concatenate(sources) for key, sources in found.items()}
    reference = joined.get(LABELLED, joined.get(TRAIN))
    if reference is None or not reference.num_classes:
        return joined
    if VALIDATION in joined:
        _check_validation(joined[VALIDATION], reference)
    return {key: concatenate([source], reference.class_names) for key, source in joined.items()}


def _check_validation(validation: Source, reference: Source) -> None:
    lost = (relabelled(validation, reference.class_names) < 0) & (validation.labels >= 0)
    if lost.any():
        name = validation.class_names[validation.labels[lost.argmax()]]
        raise StoreError(f"{validation.name}: its class {name!r} is not among the classes of {reference.name}")


def _open(path: str, validation: bool) -> _Splits:
    if path == "digits":
        return _Splits(*open_digits())
    p = Path(path)
    try:
        if p.is_file():
            return _Splits(BetonSource(p), None, single=True)
        if not p.is_dir():
            raise StoreError(f"{path}: no such file or folder; --data takes digits, a .beton, or a folder")
        return _open_folder(p, validation)
    except OSError as e:
        raise StoreError(f"{e.filename or path}: cannot be read: {e.strerror}") from e


def _open_folder(p: Path, validation: bool) -> _Splits:
    betons = sorted(f for f in p.glob("*.beton") if not f.name.startswith("."))
    if betons:
        parts = [BetonSource(f) for f in betons if f.name != "val.beton"]
        held_out = BetonSource(p / "val.beton") if len(parts) < len(betons) and validation else None
        return _Splits(concatenate(parts) if parts else None, held_out)
    if cifar.find(p) is not None:
        return _Splits(*cifar.open_cifar10(p))
    folders = folders_in(p)
    if _is_divided(p, folders):
        train = FolderSource(p / "train") if "train" in folders else None
        return _Splits(train, FolderSource(p / "val") if "val" in folders and validation else None)
    if not folders and not images_in(p):
        raise StoreError(
            f"{p}: no images; looked for *.beton, CIFAR-10's {cifar.TRAIN[0]}, train/ and val/, "
            "folders of images, and *.JPEG, *.jpg, *.jpeg and *.png"
        )
    return _Splits(FolderSource(p), None, single=True)


def _is_divided(p: Path, folders: list[str]) -> bool:
    """Whether `train` and `val` are splits: `train` may also be a class of vehicles among others."""
    return "val" in folders or ("train" in folders and (len(folders) == 1 or bool(folders_in(p / "train"))))
