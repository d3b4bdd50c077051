"""Image files, in folders or archives, into `train.beton`, `val.beton` and `manifest.json`.

Two passes: the sizes of all files first, so that every image has its place; then each image is read once, checked,
and written to its place by whichever thread takes it. What has to be written anew (CMYK, PNG, EXIF-rotated, or all on
request) has a length that nobody knows before, so it waits in a spill file and is appended in order at the end.
Nothing in the result depends on time, threads or interruptions: a conversion that was killed and run again gives the
same bytes. The source is only read.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import threading
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL

from loaders.convert.journal import RECORD, Journal, write_all
from loaders.convert.judge import MAX_BYTES, SAID, Outcome, Reencode, Verdict, judge, scaled
from loaders.convert.manifest import HASH_DIGITS, MANIFEST, in_chunks, read_manifest, tables_sha256
from loaders.errors import StoreError
from loaders.files import Progress, partial_of, put, write_file
from loaders.labels.subsets import Resolved, listed
from loaders.store.beton import PAGE_SIZE, BetonFile, Stored, data_start, place, write_tables
from loaders.store.data import VALIDATION, described
from loaders.store.folder import ListedSource
from loaders.store.held_out import held_out
from loaders.store.images import ImageError, decode
from loaders.store.listing import Listing
from loaders.store.openers import open_path
from loaders.store.source import Concatenated, Source, digest

TRAIN, VAL = "train", "val"
FORMAT = 1  # of the manifest and of the way images are laid out
COMMIT_S = 5.0  # a kill loses about this much work


@dataclass(frozen=True)
class Options:
    decode_check: bool = True
    reencode: Reencode | None = None
    raw: bool = False  # store decoded pixels: those of the JPEG that would be stored
    subset: str | None = None  # a list of training images, by name or path


@dataclass(frozen=True)
class Conversion:
    """What will be converted; `subset` is the list that chose the training images, `said` what the source was found to
    hold."""

    source: Path
    splits: dict[str, Listing]
    options: Options
    subset: Resolved | None
    said: tuple[str, ...] = ()
    sides: dict[str, np.ndarray] = field(default_factory=dict)  # of a raw store: int64 [N, 2], height and width

    def slots(self, split: str) -> np.ndarray:
        """int64 [N]: the bytes that are set aside for each image before any is read: none where nobody knows."""
        if self.options.raw:
            sizes: np.ndarray = 3 * self.sides[split].prod(1)
            return sizes
        sizes = np.where(self.splits[split].sizes > MAX_BYTES, 0, self.splits[split].sizes)
        return np.zeros_like(sizes) if self.options.reencode else sizes

    def page_size(self, split: str) -> int:
        """FFCV's pages are a power of two and hold the largest image."""
        files = self.splits[split].sizes
        sizes = self.slots(split) if self.options.raw else files[files <= MAX_BYTES]
        return max(PAGE_SIZE, 1 << (int(sizes.max(initial=1)) - 1).bit_length())

    def bytes_needed(self, split: str) -> int:
        """Of disk, at most, as long as images keep their bytes; re-encoding takes about as much twice, for a while."""
        sizes = self.splits[split].sizes
        if self.options.raw:
            start = data_start(len(sizes), self.page_size(split))
            return place(self.slots(split), start, self.page_size(split))[1] + 300 * len(sizes)
        twice = 2 if self.options.reencode else 1
        return int(sizes.sum() * twice) + 200 * len(sizes) + 2 * self.page_size(split)

    def described(self) -> dict[str, Any]:
        """The options as the manifest has them."""
        reencode = self.options.reencode and asdict(self.options.reencode)
        subset = self.subset and {"name": self.subset.name, "sha256": self.subset.sha256, "count": self.subset.count}
        pixels = {"pixels": "raw"} if self.options.raw else {}
        return {"decode_check": self.options.decode_check, "reencode": reencode, "subset": subset, **pixels}

    def sha256(self) -> str:
        """Of what decides the result, but for the images' pixels: names, labels, sizes and options."""
        parts = [(s, li.class_names, digest(li.labels, li.sizes, li.names)) for s, li in self.splits.items()]
        parts += [(s, (), digest(sides)) for s, sides in self.sides.items()]
        return digest([FORMAT, json.dumps(self.described())], parts)


def prepare(source: Path, options: Options) -> Conversion:
    """Look at the source: names, classes and sizes. Raises StoreError where something is missing or unclear."""
    opened = open_path(str(source))
    splits = {name: _listing(part, source) for name, part in ((TRAIN, opened.train), (VAL, opened.validation)) if part}
    chosen, said = None, [described(str(source), opened, {TRAIN: opened.train, VALIDATION: opened.validation})]
    if TRAIN in splits and VAL in splits:
        _number_classes(splits[VAL], splits[TRAIN].class_names)
    if opened.train is not None and not opened.is_divided and (num_held := len(held_out(opened.train))):
        said.append(f"no validation images: training will hold out {num_held:,} of them, as it does from {source}")
    if options.subset is not None:
        if TRAIN not in splits:
            raise StoreError(f"{source}: has no training images, of which --subset {options.subset} is a list")
        chosen = listed(splits[TRAIN], options.subset, (source,))
        splits[TRAIN] = splits[TRAIN].subset(chosen.ids)  # type: ignore[arg-type]  # a list has ids
    sides = {name: _sides(listing, options.reencode) for name, listing in splits.items()} if options.raw else {}
    return Conversion(source, splits, options, chosen, tuple(said), sides)


def _sides(listing: Listing, reencode: Reencode | None) -> np.ndarray:
    """Height and width, int64 [N, 2], of every image as it will be stored, from the headers; 0 of what has none."""
    source = ListedSource(listing)
    sides = source.sizes.astype(np.int64)
    if reencode:
        for i in np.flatnonzero(sides.max(1) > reencode.max_side).tolist():
            height, width = sides[i].tolist()
            sides[i] = scaled(width, height, reencode.max_side)[::-1]
    sides[list(source.unreadable)] = 0
    sides[listing.sizes > MAX_BYTES] = 0
    return sides


def _listing(part: Source, source: Path) -> Listing:
    if isinstance(part, ListedSource):
        return part.listing
    betons = part.sources if isinstance(part, Concatenated) else (part,)
    made_from = ""
    if all(isinstance(beton, BetonFile) for beton in betons):
        changed = "; ".join(dict.fromkeys(beton.changed for beton in betons if beton.changed))  # type: ignore[attr-defined]
        before = f", whose pixels were changed already ({changed})" if changed else ""
        made_from = f"{before}; --max-side, --pixels and --subset are for the files that it was made from"
    raise StoreError(f"{source}: nothing to convert: {part.name} is read as it is{made_from}")


def _number_classes(val: Listing, class_names: tuple[str, ...]) -> None:
    """Number the validation split's classes as the training set does. An order by class stays one: both are sorted."""
    if class_names and not val.class_names:
        raise StoreError(f"{val.path}: no class folders; put each image into the folder of its class")
    unknown = sorted(set(val.class_names) - set(class_names))
    if unknown:
        raise StoreError(f"{val.path}: class {unknown[0]!r} is not among those of the training set")
    number = {name: c for c, name in enumerate(class_names)}
    table = np.array([*(number[name] for name in val.class_names), -1], np.int64)  # -1 picks the last
    if len(val.class_names):
        val.labels, val.class_names = table[val.labels], class_names


def convert(plan: Conversion, out: Path, progress: Progress = lambda what, done, total: None) -> dict[str, Any]:
    """Write the splits and return the manifest. Continues what a kill left; finished, it only returns the manifest.

    Raises StoreError: no space, a source that changed, another conversion's files in `out`. The same call continues.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Pillow's, of EXIF that it cannot read and we do not need
            return _convert(plan, out, progress)
    except OSError as e:
        what = f"{e.filename or out}: {e.strerror}"
        raise StoreError(f"{what}; put that right and run the same command: it continues") from e


def _convert(plan: Conversion, out: Path, progress: Progress) -> dict[str, Any]:
    inside = next((li.path for li in plan.splits.values() if out.resolve().is_relative_to(li.path.resolve())), None)
    if inside:
        raise StoreError(f"{out}: lies among the images of {inside}; choose a folder elsewhere")
    out.mkdir(parents=True, exist_ok=True)
    jobs = [_Split(plan, name, out) for name in plan.splits]
    if (out / MANIFEST).exists():
        manifest = read_manifest(out)
        if manifest["plan_sha256"] != plan.sha256():
            raise StoreError(f"{out}: holds the result of another conversion: other images or options")
    else:
        _check_space(plan, out)
        manifest = {
            "format": FORMAT,
            "tool": "fastssl convert",
            "version": _version(),
            "pillow": PIL.__version__,
            "plan_sha256": plan.sha256(),
            "options": plan.described(),
            "splits": {job.name: job.run(progress) for job in jobs},
        }
        write_file(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    for job in jobs:
        job.clean()
    return manifest


class _Split:
    """One split's files: final, and while it is made the partial one, the spill and the journal."""

    def __init__(self, plan: Conversion, name: str, out: Path):
        self.name, self._options, self._out = name, plan.options, out
        self._listing = plan.splits[name]
        self._final, self._spill, self._journal_path = (
            out / file for file in (f"{name}.beton", f".{name}.spill", f".{name}.journal")
        )
        self._partial = partial_of(self._final)
        self._identity = digest([plan.sha256(), PIL.__version__], self._listing.numbers[:, 1])
        self._page_size, self._sides = plan.page_size(name), plan.sides.get(name)
        slots = plan.slots(name)
        self._data_start = data_start(len(slots), self._page_size)
        self._ptrs, self._slots_end = place(slots, self._data_start, self._page_size)

    def run(self, progress: Progress) -> dict[str, Any]:
        """Make the final file, unless an earlier run did; what the manifest says of it."""
        with closing(Journal(self._journal_path, bytes.fromhex(self._identity), len(self._listing))) as self._journal:
            if not self._final.exists():
                self._make(progress)
            elif (self._journal.records["outcome"] == 0).any():
                raise StoreError(f"{self._final}: is there, and not from this conversion; choose another folder")
            return self._described()

    def _make(self, progress: Progress) -> None:
        if self._journal.is_new or not self._partial.exists():
            self._journal.restart()
            self._spill.unlink(missing_ok=True)
            self._partial.unlink(missing_ok=True)
            self._partial.touch()
        with open(self._partial, "r+b") as file:
            if self._options.raw:
                self._make_room(file)
            self._convert_images(file.fileno(), progress)
            self._finish(file)
        put(self._partial, self._final)

    def _make_room(self, file: BinaryIO) -> None:
        """Give the file its length. Raises StoreError where the file system takes none so large, or none that is longer
        than what was written to it: now, and not after a night."""
        try:
            file.truncate(self._slots_end)
        except OSError as e:
            size = f"{self._slots_end:,} bytes, most of them unwritten yet"
            raise StoreError(
                f"{self._out}: its file system takes no file of {size}: {e.strerror}; choose a folder on another one, "
                "or --pixels jpeg"
            ) from e

    def clean(self) -> None:
        for path in (self._journal_path, self._spill, self._partial):
            path.unlink(missing_ok=True)

    # The images

    def _convert_images(self, fd: int, progress: Progress) -> None:
        todo = np.flatnonzero(self._journal.records["outcome"] == 0)
        num_done, total = len(self._listing) - len(todo), len(self._listing)
        spill = os.open(self._spill, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._spill_end, self._spill_lock = os.fstat(spill).st_size, threading.Lock()
        finished: list[np.ndarray] = []

        def commit(records: list[np.ndarray]) -> None:
            if records:
                os.fdatasync(fd)
                os.fdatasync(spill)
                self._journal.append(np.concatenate(records))

        try:
            with ThreadPoolExecutor(1) as committer:  # its waiting for the disk holds nobody up
                committed: Future[None] = committer.submit(commit, [])
                since_s = time.monotonic()
                for ids, records in in_chunks(todo, lambda ids: self._take(ids, fd, spill)):
                    finished.append(records)
                    num_done += len(ids)
                    progress(self.name, num_done, total)
                    if time.monotonic() - since_s >= COMMIT_S and committed.done():
                        committed.result()
                        committed = committer.submit(commit, finished)
                        finished, since_s = [], time.monotonic()
                committed.result()
                commit(finished)
        finally:
            os.close(spill)

    def _take(self, ids: np.ndarray, fd: int, spill: int) -> np.ndarray:
        """Convert some images; their records [n]."""
        records = np.zeros(len(ids), RECORD)
        for i, record in zip(ids.tolist(), records, strict=True):
            verdict, stored = self._one(i)
            if verdict.outcome is Outcome.KEPT or (self._options.raw and verdict.outcome.in_set):
                write_all(fd, stored, int(self._ptrs[i]))
            elif verdict.outcome.in_set:
                with self._spill_lock:
                    ptr, self._spill_end = self._spill_end, self._spill_end + len(stored)
                write_all(spill, stored, ptr)
                record["spill_ptr"] = ptr
            record["index"], record["outcome"], record["size"] = i, verdict.outcome, len(stored)
            record["height"], record["width"] = verdict.height, verdict.width
            record["sha256"] = np.frombuffer(hashlib.sha256(stored).digest(), np.uint8)
        return records

    def _one(self, i: int) -> tuple[Verdict, bytes]:
        """The verdict on image `i`, and the bytes to store; of what is not in the set, those it has."""
        if self._listing.is_repeated(i):
            return Verdict(Outcome.TWICE), b""
        if self._listing.sizes[i] > MAX_BYTES:
            return Verdict(Outcome.TOO_LARGE), b""
        data = self._listing.read(i)
        if len(data) != self._listing.sizes[i]:
            where = f"{self._listing.path}: {self._listing.where(i)}"
            raise StoreError(f"{where} changed while it was converted; run the same command again")
        if self._options.raw:
            return self._decoded(i, data)
        verdict = judge(data, self._options.decode_check, self._options.reencode)
        if verdict.anew is None:
            return verdict, data
        if len(verdict.anew) > self._page_size:
            return Verdict(Outcome.TOO_LARGE_ANEW), data
        return replace(verdict, anew=None), verdict.anew

    def _decoded(self, i: int, data: bytes) -> tuple[Verdict, bytes]:
        """`_one` of a raw store: the pixels of the JPEG that would have been stored."""
        verdict = judge(data, decode_check=False, reencode=self._options.reencode)
        if not verdict.outcome.in_set:
            return verdict, data
        try:
            image = decode(verdict.anew or data)
        except ImageError:
            return Verdict(Outcome.DAMAGED), data
        assert self._sides is not None
        if (image.height, image.width) != tuple(self._sides[i].tolist()):
            return Verdict(Outcome.DAMAGED), data  # its header, which made room for it, said otherwise
        return replace(verdict, anew=None), image.tobytes()

    def _anew(self, records: np.ndarray) -> np.ndarray:
        """Which images of the set wait in the spill file."""
        waits = _in_set(records) & (records["outcome"] != Outcome.KEPT)
        return np.flatnonzero(waits & (not self._options.raw))

    # The end

    def _finish(self, file: BinaryIO) -> None:
        """Append what was written anew, and the tables."""
        records = self._journal.records
        kept = np.flatnonzero(_in_set(records))
        if not len(kept):
            raise StoreError(f"{self._listing.path}: none of its {len(records)} images can be used")
        anew = self._anew(records)
        ptrs = self._ptrs.copy()
        ptrs[anew], end = place(records["size"][anew].astype(np.int64), self._slots_end, self._page_size)
        with open(self._spill, "rb") as spill:
            for i in anew.tolist():
                spill.seek(int(records["spill_ptr"][i]))
                file.seek(int(ptrs[i]))
                file.write(spill.read(int(records["size"][i])))
        stored = Stored(
            heights=records["height"][kept],
            widths=records["width"][kept],
            labels=self._listing.labels[kept],
            ptrs=ptrs[kept],
            sizes=records["size"][kept],
            names=[self._listing.names[i] for i in kept.tolist()],
            raw=self._options.raw,
            changed=self._options.reencode.said if self._options.reencode else "",
        )
        write_tables(file, stored, self._listing.class_names, end, self._page_size)

    def _described(self) -> dict[str, Any]:
        """The split as the manifest has it."""
        listing, records = self._listing, self._journal.records
        kept = np.flatnonzero(_in_set(records))
        anew = self._anew(records)
        places, end = place(records["size"][anew].astype(np.int64), self._slots_end, self._page_size)
        data = [self._data_start, end]
        order = np.argsort(listing.labels[kept], kind="stable")
        bounds = np.searchsorted(listing.labels[kept][order], np.arange(-1, len(listing.class_names) + 1))
        classes = {}
        for class_name, first, beyond in zip(("", *listing.class_names), bounds[:-1], bounds[1:], strict=True):
            starts = records["sha256"][kept[order[first:beyond]], : HASH_DIGITS // 2]
            if class_name or len(starts):
                classes[class_name] = {"images": len(starts), "sha256": starts.tobytes().hex()}
        plain = np.isin(records["outcome"], [Outcome.KEPT, Outcome.REENCODED])
        aside = [self._odd(i, records[i]) for i in np.flatnonzero(~plain).tolist()]
        return {
            "file": self._final.name,
            "bytes": self._final.stat().st_size,
            "images": len(kept),
            "images_sha256": hashlib.sha256(records["sha256"][kept].tobytes()).hexdigest(),
            "tables_sha256": tables_sha256(self._final, data),
            "data": data,
            "odd": [row for row, in_set in aside if in_set],
            "quarantined": [row for row, in_set in aside if not in_set],
            "ignored": {"count": listing.ignored.count, "first": listing.ignored.listed},
            "classes": classes,
        }

    def _odd(self, i: int, record: np.void) -> tuple[dict[str, Any], bool]:
        outcome = Outcome(record["outcome"])
        row = {"file": self._listing.where(i), "what": SAID[outcome], "sha256": record["sha256"].tobytes().hex()}
        if outcome in (Outcome.TWICE, Outcome.TOO_LARGE):
            del row["sha256"]  # was not read
        return row, outcome.in_set


def _in_set(records: np.ndarray) -> np.ndarray:
    return np.isin(records["outcome"], [o for o in Outcome if o.in_set])


def _check_space(plan: Conversion, out: Path) -> None:
    used = sum(f.stat().st_blocks * 512 for f in out.iterdir() if f.is_file())
    needed, free = sum(map(plan.bytes_needed, plan.splits)), shutil.disk_usage(out).free
    if needed > free + used:
        missing = needed - free - used
        raise StoreError(f"{out}: {needed:,} bytes are needed, {free + used:,} are free: {missing:,} are missing")


def _version() -> str:
    try:
        return importlib.metadata.version("fastssl-train")
    except importlib.metadata.PackageNotFoundError:  # used from a checkout that is not installed
        return "unknown"
