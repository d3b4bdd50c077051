"""Copies `.beton` files and masks to a local disk before training, once per host: for data on network file systems.

A copy carries the sum that was computed while its source was read, and is checked against the source's size and time of
change whenever it is used again. Processes of one host agree through a file lock: the first copies, the others wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path

from loaders.errors import StoreError
from loaders.files import Progress, partial_of, sha256_of, whole_file, write_file
from loaders.store.data import MASKS, DataSpec

_CHUNK_BYTES = 1 << 24


def stage(specs: tuple[str, ...], folder: Path, progress: Progress) -> tuple[str, ...]:
    """`--data` values with every `.beton`, every folder of them and every file of masks replaced by its copy under
    `folder`.

    Raises StoreError where a value is none of these (image folders would become millions of small files), where the
    disk has too little room, or where a copy does not read back as it was written.
    """
    return tuple(_stage_one(spec, folder, progress) for spec in specs)


def _stage_one(spec: str, folder: Path, progress: Progress) -> str:
    spec = DataSpec(spec)
    if spec.holds_nothing_out:
        return spec
    source = Path(spec.path)
    files = [source] if source.is_file() else sorted(source.glob("*.beton"))
    if not files or (spec.key != MASKS and any(f.suffix != ".beton" for f in files)):
        raise StoreError(f"--stage-to copies .beton files; {spec.path} is none: convert it first")
    # One folder a source path, so that two sources' train.beton do not meet.
    place = folder / hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:16]
    try:
        place.mkdir(parents=True, exist_ok=True)
        with (place / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _make_room(files, place)
            for file in files:
                _copy(file, place / file.name, progress)
    except OSError as error:
        raise StoreError(f"--stage-to {folder}: {error.strerror}: {error.filename}") from error
    copied = place / source.name if source.is_file() else place
    return spec.at(copied)


def _make_room(files: list[Path], place: Path) -> None:
    """Remove what a kill left of a copy. Raises StoreError where there is too little room for those that are due."""
    for file in files:
        partial_of(place / file.name).unlink(missing_ok=True)
    needed = sum(f.stat().st_size for f in files if not _is_copy(f, place / f.name))
    free = shutil.disk_usage(place).free
    if needed > free:
        raise StoreError(
            f"--stage-to {place.parent}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free: "
            f"{(needed - free) / 1e9:.1f} GB are missing"
        )


def _is_copy(source: Path, copy: Path) -> bool:
    """Whether `copy` was completed from `source` as it is now."""
    try:
        written = json.loads(_note(copy).read_text())
        return written["source"] == _identity(source) and copy.stat().st_size == source.stat().st_size
    except (OSError, ValueError, KeyError):
        return False


def _copy(source: Path, copy: Path, progress: Progress) -> None:
    if _is_copy(source, copy):
        return
    total, done, identity, read = source.stat().st_size, 0, _identity(source), hashlib.sha256()
    with source.open("rb") as reading, whole_file(copy) as writing:
        while chunk := reading.read(_CHUNK_BYTES):
            read.update(chunk)
            writing.write(chunk)
            done += len(chunk)
            progress(source.name, done, total)
        writing.flush()
        os.fsync(writing.fileno())
        # Or the sum below would be that of the page cache, not of the disk.
        os.posix_fadvise(writing.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if sha256_of(partial_of(copy)) != read.hexdigest():
            raise StoreError(f"{copy}: does not read back as it was written; is the disk failing?")
        if _identity(source) != identity:
            raise StoreError(f"{source}: changed while it was copied")
    write_file(_note(copy), json.dumps({"source": identity, "sha256": read.hexdigest()}))


def _identity(source: Path) -> list[int]:
    found = source.stat()
    return [found.st_size, found.st_mtime_ns]


def _note(copy: Path) -> Path:
    return copy.with_name(f".{copy.name}.json")
