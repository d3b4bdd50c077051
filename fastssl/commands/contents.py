"""What `fastssl data` says of a path: a look at every header, at some images whole, and advice on how to train."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from fastssl.api.jobs import stages_for
from fastssl.errors import ConfigError
from fastssl.methods.base import Stages
from loaders.errors import StoreError
from loaders.files import write_file
from loaders.store.apart import check_apart
from loaders.store.beton import BetonFile
from loaders.store.data import LABELLED, TRAIN, DataSets, open_data
from loaders.store.folder import ListedSource
from loaders.store.images import ImageError, decode
from loaders.store.source import Concatenated, Selected, Source, is_encoded

SAMPLE = 64  # images of a split that are decoded
SHOWN = 8  # things left out, or damaged, that are named
_TURNED = 1  # EXIF's orientation of a picture that is stored upright


@dataclass(frozen=True)
class Split:
    """One split in numbers. Sizes are (height, width), of the image in the middle by area; `turned` counts images that
    are stored on their side."""

    images: int
    unlabelled: int
    classes: int
    least: int
    median: float
    most: int
    least_class: str
    most_class: str
    formats: dict[str, int]
    smallest: tuple[int, int]
    middle: tuple[int, int]
    largest: tuple[int, int]
    num_bytes: int
    turned: int
    unreadable: list[tuple[str, str]]
    sampled: int
    damaged: list[tuple[str, str]]


@dataclass(frozen=True)
class Contents:
    """What a path holds. `left_out` are the first things that are used for nothing, and why; `warnings` what else there
    is to know; `command` would train on it, or else `why_not` says what is in the way."""

    path: str
    said: tuple[str, ...]
    splits: dict[str, Split]
    num_left_out: int
    left_out: list[tuple[str, str]]
    warnings: list[str]
    command: str
    why_not: str
    stages: Stages = field(repr=False)
    data: DataSets = field(repr=False)


def look(path: str) -> Contents:
    """Raises StoreError where there is nothing to look at, or what is there cannot be one set."""
    data = open_data((path,), in_place=False)
    splits = {role: _split(source) for role, source in data.sources.items()}
    try:
        warnings = check_apart(data)
    except StoreError as error:
        warnings = [str(error)]
    command, why_not, stages = _advised(path, data)
    left_out = data.left_out[path]
    shown = [*left_out.listed]
    return Contents(path, data.said, splits, left_out.count, shown, warnings, command, why_not, stages, data)


def _split(source: Source) -> Split:
    labels, sizes = source.labels, source.sizes.astype(np.int64)
    counts = np.bincount(labels[labels >= 0], minlength=source.num_classes)
    order = np.argsort(sizes.prod(1), kind="stable")
    ends = [(int(h), int(w)) for h, w in sizes[order[[0, len(order) // 2, -1]]]]
    least, most = (int(counts.argmin()), int(counts.argmax())) if len(counts) else (0, 0)
    unreadable = source.unreadable if is_encoded(source) else {}
    sampled, damaged = _decoded(source, unreadable)
    return Split(
        images=len(source),
        unlabelled=int((labels < 0).sum()),
        classes=source.num_classes,
        least=int(counts.min(initial=len(labels))) if len(counts) else 0,
        median=float(np.median(counts)) if len(counts) else 0.0,
        most=int(counts.max(initial=0)),
        least_class=source.class_names[least] if len(counts) else "",
        most_class=source.class_names[most] if len(counts) else "",
        formats=dict(Counter(_forms(source).tolist()).most_common()),
        smallest=ends[0],
        middle=ends[1],
        largest=ends[2],
        num_bytes=int(source.num_bytes.sum()) if is_encoded(source) else int(3 * sizes.prod(1).sum()),
        turned=int((_orientations(source) != _TURNED).sum()),
        unreadable=[(source.path_of(i), why) for i, why in unreadable.items()] if is_encoded(source) else [],
        sampled=sampled,
        damaged=damaged,
    )


def _decoded(source: Source, unreadable: object) -> tuple[int, list[tuple[str, str]]]:
    """How many images were decoded, evenly spaced over the set, and which of them could not be."""
    if not is_encoded(source):
        return 0, []
    damaged, ids = [], np.unique(np.linspace(0, len(source) - 1, min(SAMPLE, len(source))).astype(np.int64))
    for i in ids.tolist():
        if i in source.unreadable:
            continue
        try:
            decode(source.jpeg(i))
        except (ImageError, StoreError) as error:
            damaged.append((source.path_of(i), str(error)))
    return len(ids), damaged


def _forms(source: Source) -> np.ndarray:
    """What each image is stored as, str [N]."""
    match source:
        case ListedSource():
            return source.forms
        case BetonFile():
            return np.where(source.is_raw, "decoded", "JPEG")
        case Selected():
            return np.take(_forms(source.whole), source.ids)
        case Concatenated():
            return np.concatenate([_forms(part) for part in source.sources])
    return np.full(len(source), "in memory")


def _orientations(source: Source) -> np.ndarray:
    """As EXIF has them, int [N]; converted images are upright."""
    match source:
        case ListedSource():
            return source.orientations
        case Selected():
            return np.take(_orientations(source.whole), source.ids)
        case Concatenated():
            return np.concatenate([_orientations(part) for part in source.sources])
    return np.full(len(source), _TURNED)


# ------------------------------------------------------------------------------------------------------------ advice


def _recommended(path: str, data: DataSets) -> str:
    """The recipe that would train on the data."""
    if path == "digits":
        return "paws.digits"
    return "paws.mine" if _labelled(data) else "simclrv2.mine"


def _labelled(data: DataSets) -> bool:
    return any((data.get(key).labels >= 0).any() for key in (LABELLED, TRAIN) if key in data.sources)


def _advised(path: str, data: DataSets) -> tuple[str, str, Stages]:
    """(the command that would train on the data, as a shell takes it; why there is none, one of them empty; the
    stages of what it would train)."""
    recipe = _recommended(path, data)
    try:
        stages, _ = stages_for(data, recipe, (), "cpu", from_weights=False)
    except (ConfigError, StoreError) as error:
        return "", str(error), ()
    return shlex.join(["fastssl", "train", recipe, "--data", path]), "", stages


# ------------------------------------------------------------------------------------------------------------- shown


def as_json(found: Contents) -> str:
    plain = {
        "path": found.path,
        "said": found.said,
        "splits": {role: asdict(split) for role, split in found.splits.items()},
        "left_out": {"count": found.num_left_out, "first": found.left_out},
        "warnings": found.warnings,
        "train": found.command or None,
        "why_not": found.why_not or None,
    }
    return json.dumps(plain, indent=2)


def as_tables(found: Contents) -> Iterator[Table | Text]:
    """For a terminal: a table of the splits, then what there is to know beside them."""
    yield Text(found.said[0].partition(": ")[2].partition(": ")[0] if found.said else found.path, "bold")
    table = Table("", *found.splits, box=None, pad_edge=False)
    columns = [dict(_rows(split)) for split in found.splits.values()]
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(Text(name, "dim"), *(Text(column.get(name, "")) for column in columns))
    yield table
    for line in found.said[1:]:
        yield Text(line)
    yield from _listed("left out", found.num_left_out, found.left_out, "yellow")
    for role, split in found.splits.items():
        yield from _listed(f"{role}: cannot be used", len(split.unreadable), split.unreadable, "red")
        yield from _listed(f"{role}: do not decode, of {split.sampled}", len(split.damaged), split.damaged, "red")
    for text in found.warnings:
        yield Text(f"warning: {text}", "yellow")
    if found.command:
        yield Text.assemble("\n", ("to train on it:  ", "dim"), (found.command, "bold green"))
        if not _labelled(found.data):
            path = shlex.quote(found.path)
            beside = f"fastssl train paws.mine --data unlabelled={path} --data labelled=FOLDER"
            yield Text.assemble(("with labelled ones, a folder a class:  ", "dim"), (beside, "green"))
    else:
        yield Text(f"\nno recipe for it: {found.why_not}", "yellow")


def _rows(split: Split) -> Iterator[tuple[str, str]]:
    yield "images", f"{split.images:,}"
    if split.classes:
        yield "classes", f"{split.classes:,}"
        ends = f"{split.least:,} ({split.least_class}) to {split.most:,} ({split.most_class})"
        yield "a class has", f"{split.most:,}" if split.least == split.most else f"{ends}, median {split.median:,g}"
    if split.unlabelled:
        yield "without label", f"{split.unlabelled:,}"
    yield "formats", ", ".join(f"{name or 'unreadable'} {count:,}" for name, count in split.formats.items())
    sizes = [" x ".join(map(str, size)) for size in (split.smallest, split.middle, split.largest)]
    yield "height x width", sizes[0] if len(set(sizes)) == 1 else f"{sizes[0]} to {sizes[2]}, mostly {sizes[1]}"
    yield "bytes", f"{split.num_bytes / 1e6:,.1f} MB"
    yield "on their side", f"{split.turned:,}, shown upright" if split.turned else "none"
    yield "decoded to try", f"{split.sampled - len(split.damaged):,} of {split.sampled:,} are sound"


def _listed(title: str, count: int, rows: list[tuple[str, str]], style: str) -> Iterator[Table | Text]:
    if not count:
        return
    yield Text(f"{title}: {count:,}", style)
    table = Table.grid(padding=(0, 2))
    for name, why in rows[:SHOWN]:
        table.add_row(Text(f"  {name}"), Text(why, "dim"))
    if count > SHOWN:
        table.add_row(Text(f"  and {count - SHOWN:,} more, which --json has", "dim"))
    yield table


def show(found: Contents, file: Path) -> None:
    """Write a page of some images: as they are evaluated, and every crop that a step of the advised recipe makes of
    them. Raises ConfigError or LoaderError where nothing could be trained."""
    from fastssl.engine.join import facts_of
    from fastssl.html.page import page, paragraph
    from fastssl.report.pictures import contact_sheet

    if not found.command:
        raise ConfigError(f"{found.path}: no recipe whose crops could be shown: {found.why_not}")
    method = found.stages[-1].config.build(facts_of(found.data, seed=0), {})
    text = page(f"Images in {found.path}", paragraph(found.command), contact_sheet(method, found.data))
    write_file(file, text)
