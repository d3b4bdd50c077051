"""What a conversion says of its result, and the result read again against it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from loaders.errors import StoreError
from loaders.files import Progress
from loaders.store.beton import BetonFile

MANIFEST = "manifest.json"
HASH_DIGITS = 8  # of each image's sha256 in the manifest: enough to find the damaged one

_CHUNK = 16  # images a thread takes at once
_COPY_BYTES = 1 << 24


def verify(out: Path, progress: Progress = lambda what, done, total: None) -> dict[str, Any]:
    """Read all of a finished conversion against its manifest, which is returned. Raises StoreError that names what is
    damaged."""
    manifest = read_manifest(out)
    for name, said in manifest["splits"].items():
        beton = BetonFile(out / said["file"])
        if len(beton) != said["images"] or tables_sha256(beton.path, said["data"]) != said["tables_sha256"]:
            raise StoreError(f"{beton.path}: damaged: its tables are not those of the manifest")
        expected, by_class = (
            "".join(c["sha256"] for c in said["classes"].values()),
            np.argsort(beton.labels, kind="stable"),
        )
        place = np.empty(len(beton), np.int64)  # of each image among the classes' hashes
        place[by_class] = np.arange(len(beton))
        all_of_them, wrong = hashlib.sha256(), []
        for ids, digests in in_chunks(np.arange(len(beton)), lambda ids: _digests(beton, ids)):  # noqa: B023
            progress(f"verify {name}", int(ids[-1]) + 1, len(beton))
            for i, found in zip(ids.tolist(), digests, strict=True):
                all_of_them.update(found)
                at = int(place[i]) * HASH_DIGITS
                if found.hex()[:HASH_DIGITS] != expected[at : at + HASH_DIGITS]:
                    wrong.append(i)
        if wrong:
            first = f"first {beton.class_names[beton.labels[wrong[0]]]}/{beton.name_of(wrong[0])} (id {wrong[0]})"
            raise StoreError(f"{beton.path}: {len(wrong)} of {len(beton)} images are damaged, {first}")
        if all_of_them.hexdigest() != said["images_sha256"]:
            raise StoreError(f"{beton.path}: damaged: its images are not those of the manifest")
    return manifest


def read_manifest(out: Path) -> dict[str, Any]:
    path = out / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        for said in manifest["splits"].values():
            _ = [said[key] for key in ("file", "images_sha256", "tables_sha256", "odd", "quarantined", "ignored")]
            _ = said["images"] + sum(said["data"]), ["".join(c["sha256"]) for c in said["classes"].values()]
        _ = manifest["plan_sha256"]
    except OSError as e:
        raise StoreError(f"{path}: cannot be read: {e.strerror}; a conversion writes it last") from e
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        raise StoreError(f"{path}: not the manifest of a conversion") from e
    return manifest


def _num_threads() -> int:
    return len(os.sched_getaffinity(0))


def in_chunks(ids: np.ndarray, work: Callable[[np.ndarray], Any]) -> Iterator[tuple[np.ndarray, Any]]:
    """(ids, work(ids)) of a few ids at a time, in order, done by as many threads as there are cores to use."""
    num_threads = _num_threads()
    chunks = (ids[k : k + _CHUNK] for k in range(0, len(ids), _CHUNK))
    pool = ThreadPoolExecutor(num_threads)
    pending: list[tuple[np.ndarray, Future[Any]]] = []
    try:
        while True:
            while len(pending) < 8 * num_threads and (chunk := next(chunks, None)) is not None:
                pending.append((chunk, pool.submit(work, chunk)))
            if not pending:
                return
            chunk, future = pending.pop(0)
            yield chunk, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _digests(beton: BetonFile, ids: np.ndarray) -> list[bytes]:
    return [hashlib.sha256(beton.stored(int(i))).digest() for i in ids]


def tables_sha256(path: Path, data: list[int]) -> str:
    """Of all but bytes data[0]..data[1], where the images are."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        for start, end in ((0, data[0]), (data[1], path.stat().st_size)):
            file.seek(start)
            while start < end and (more := file.read(min(_COPY_BYTES, end - start))):
                sha.update(more)
                start += len(more)
    return sha.hexdigest()
