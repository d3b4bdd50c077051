"""`--data` values become sources: which set each is a part of, how all number their classes, and what is held out."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal, overload

import numpy as np

from loaders.errors import StoreError
from loaders.store.held_out import FEW, MOST, SHARE, held_out
from loaders.store.listing import PassedOver
from loaders.store.masks import MaskFile, Masks, PickedMasks, check_count, masks_by_key
from loaders.store.openers import DIGITS, Splits, open_path
from loaders.store.source import Selected, Source, concatenate, digest, is_encoded, relabelled

TRAIN, VALIDATION, LABELLED, UNLABELLED = "train", "validation", "labelled", "unlabelled"
_LEARNT = (TRAIN, LABELLED)  # keys of images whose labels are learnt from
MASKS = "masks"  # the key of files that say what is foreground in the images of the others
NONE = "none"  # in place of a path of validation images: hold nothing out
NOTHING_HELD_OUT = f"{VALIDATION}={NONE}"
_KEYED = re.compile(r"([a-z][a-z0-9_]*)=(.+)", re.DOTALL)
_MAX_SAID = 3  # things left out that are named in one line


class DataSpec(str):
    """A `--data` value, parsed where it comes in: `key`, None where none is written, and `path`. A path that holds an
    equals sign can be written `./a=b`."""

    key: str | None
    path: str

    def __new__(cls, text: str) -> DataSpec:
        spec = super().__new__(cls, text)
        keyed = _KEYED.fullmatch(text)
        spec.key, spec.path = (keyed[1], keyed[2]) if keyed else (None, str(text))
        return spec

    @property
    def is_embedded(self) -> bool:
        """Whether it names a set that comes with the program."""
        return self.path == DIGITS

    @property
    def holds_nothing_out(self) -> bool:
        return self.key == VALIDATION and self.path == NONE

    def at(self, path: Path | str) -> DataSpec:
        """The same part of the data at another path."""
        return DataSpec(str(path) if self.key is None else f"{self.key}={path}")


@dataclass(frozen=True)
class DataSets:
    """The sources of a run by key; all number their classes as the labelled one does.

    `search` are the folders of the data, where label lists may lie. `masks` say what is foreground in the images of a
    key, for views with a mask. `said` are lines that say what each path holds, and what of it is left out; `left_out`
    has all of that, by path. `converted_first` says how what cannot be trained on as it lies there is converted.
    """

    sources: Mapping[str, Source]
    search: tuple[Path, ...] = ()
    masks: Mapping[str, Masks] = field(default_factory=dict)
    said: tuple[str, ...] = ()
    left_out: Mapping[str, PassedOver] = field(default_factory=dict)
    converted_first: str = ""

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

    def unreadable(self) -> list[tuple[str, str, str]]:
        """(key, path, why) of every image that cannot be used by its header."""
        found = []
        for key, source in sorted(self.sources.items()):
            if is_encoded(source):
                found += [(key, source.path_of(i), why) for i, why in source.unreadable.items()]
        return found


def open_data(specs: Iterable[str], *, validation: bool = True, in_place: bool = True) -> DataSets:
    """Open `PATH` and `key=PATH` values; several paths under one key are one set. Without `validation` there are no
    validation images, and none of theirs are looked at; unless `in_place`, what must be converted before it is trained
    on is opened as well.

    PATH is whatever `loaders.store.openers` knows; under the key `masks`, a file of masks of any of the others. Where
    there are labels and no validation images, some are held out (`loaders.store.held_out`), unless `validation=none` is
    among the values. Raises StoreError that says what was looked for.
    """
    parsed = [DataSpec(spec) for spec in specs]
    found: dict[str, list[Source]] = defaultdict(list)
    mask_files, said, left_out, converted_first = [], [], {}, ""
    is_split = any(spec.key == VALIDATION for spec in parsed)  # also into all and none
    for spec in parsed:
        key, path = spec.key, spec.path
        if key == MASKS:
            mask_files.append(MaskFile(path))
            continue
        if spec.holds_nothing_out or (key == VALIDATION and not validation):
            continue
        splits = open_path(path, validation, in_place)
        used = _used(splits, spec, with_validation=not any(other.key == VALIDATION for other in parsed))
        converted_first = converted_first or splits.converted_first
        is_split |= splits.is_divided and key in (None, *_LEARNT)
        for role, source in used.items():
            if source is not None and (validation or role != VALIDATION):
                _check_new(source, role, found[role])
                found[role].append(source)
        if not spec.is_embedded:
            said.append(described(path, splits, used))
        left_out[path] = splits.ignored()
    sources = _with_common_classes(found)
    masks = masks_by_key(sources, mask_files)
    if not is_split:
        said += _hold_out(sources, masks, validation)
    return DataSets(sources, search_folders(parsed), masks, tuple(said), left_out, converted_first)


def _check_new(source: Source, role: str, others: list[Source]) -> None:
    """Images that count twice would also be held out and learnt from, both."""
    if not others:
        return
    given: set[str] = set().union(*map(_places, others))
    twice = sorted(given & _places(source))
    if twice:
        raise StoreError(
            f"{source.name}: its images are given twice as {role} images, first {twice[0]}; once is enough"
        )


def _places(source: Source) -> set[str]:
    """The files that images are read from, of links those that they lead to; none of sets in memory."""
    real = cache(os.path.realpath)
    return {f"{real(file.parent)}/{file.name}" for file in source.files()}


def _used(splits: Splits, spec: DataSpec, with_validation: bool) -> dict[str, Source | None]:
    """What of a path serves as what. Labelled images bring their validation images along, where others are not given:
    `with_validation`."""
    if spec.key is None:
        return {TRAIN: splits.train, VALIDATION: splits.validation}
    used: dict[str, Source | None] = {spec.key: _chosen(splits, spec.key, spec.path)}
    if spec.key in _LEARNT and with_validation and not splits.single:
        used[VALIDATION] = splits.validation
    return used


def _hold_out(sources: dict[str, Source], masks: dict[str, Masks], validation: bool) -> list[str]:
    """Divide the labelled set in place into what is learnt from and validation images, which are kept where
    `validation` says so; what is said of it."""
    key = LABELLED if LABELLED in sources else TRAIN
    whole = sources.get(key)
    if whole is None or not is_encoded(whole):
        return []
    held = held_out(whole)
    if not len(held):
        return []
    kept = np.setdiff1d(np.arange(len(whole)), held, assume_unique=True)
    sources[key] = Selected(whole, kept, whole.name)
    if key in masks:
        masks[key] = PickedMasks(masks[key], kept)
    if validation:
        sources[VALIDATION] = Selected(whole, held, f"{whole.name} (held out)")
    few = f"; on so few, one image is {100 / len(held):.0f} points of a score" if len(held) < FEW else ""
    return [
        f"{whole.name}: no validation images, so {len(held):,} of its {len(whole):,} are held out: one in {SHARE} of "
        f"each class, {MOST} at most{few}; others are --data validation=PATH, and --data {NOTHING_HELD_OUT} trains on "
        "all"
    ]


def described(path: str, splits: Splits, used: Mapping[str, Source | None]) -> str:
    """One line that says what a path holds, as far as it is `used`, and what of it is left out."""
    parts = []
    for role, source in used.items():
        if source is not None:
            classes = f" of {source.num_classes:,} classes" if source.num_classes else " without labels"
            parts.append(f"{len(source):,} {role} images{classes}")
    ignored = splits.ignored()
    line = f"{path}: {splits.said}: {', '.join(parts) or 'nothing'}"
    if ignored.count:
        named = ", ".join(f"{name} ({why})" for name, why in ignored.listed[:_MAX_SAID])
        more = ", ..." if ignored.count > _MAX_SAID else ""
        line += f"; {ignored.count:,} left out: {named}{more}"
    return line


def search_folders(specs: Iterable[str]) -> tuple[Path, ...]:
    """The folders of the data, where label lists may lie."""
    parsed = [DataSpec(spec) for spec in specs]
    paths = [Path(spec.path) for spec in parsed if not spec.is_embedded and not spec.holds_nothing_out]
    return tuple(dict.fromkeys(path if path.is_dir() else path.parent for path in paths))


def _chosen(splits: Splits, key: str, path: str) -> Source:
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
