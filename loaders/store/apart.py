"""Validation images that stand among the others as well: of those a score says nothing.

Two images are one where bytes and sides are as many and the last 4 KB the same; only of images that agree in all else
are those bytes read. Of pixels that are stored as they are, the last 4 KB may be a plain background, as any number of
images have it: such images are compared whole.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from loaders.errors import StoreError
from loaders.plan.draws import mix
from loaders.store.data import LABELLED, TRAIN, VALIDATION, DataSets
from loaders.store.source import EncodedSource, Selected, is_encoded

TAIL_BYTES = 4096
_FLAT = 16  # different bytes, at most, in the pixels of a plain background
MOST_SHARED = 0.01  # of the validation images may be labelled ones too: Tiny-ImageNet has 7 in 10,000


@dataclass(frozen=True)
class Shared:
    """Validation images, `ids` int64, that are among the images of `key` too; `twin` is where the first one lies
    there."""

    key: str
    ids: np.ndarray
    twin: str


def check_apart(data: DataSets) -> list[str]:
    """What there is to warn of. Raises StoreError where more than MOST_SHARED of the validation images are labelled
    ones too, unless they were held out of these: then the set itself has images twice."""
    validation, warnings = data.get(VALIDATION), []
    for shared in shared_images(data):
        assert validation is not None
        other, count = data.get(shared.key), len(shared.ids)
        is_learnt = shared.key == (LABELLED if LABELLED in data.sources else TRAIN)
        kind = "labelled images" if is_learnt else f"{shared.key} ones"
        text = (
            f"{validation.name}: {count:,} of {len(validation):,} validation images are among the {kind} of "
            f"{other.name} too, first {validation.path_of(int(shared.ids[0]))}, there {shared.twin}"
        )
        if is_learnt and count > MOST_SHARED * len(validation) and not isinstance(validation, Selected):
            raise StoreError(f"{text}: a score on them says nothing; give others, or none and a tenth is held out")
        warnings.append(text)
    return warnings


def shared_images(data: DataSets) -> Iterator[Shared]:
    """Of each key but validation's, where there are any; sets in memory are not looked at."""
    validation = data.get(VALIDATION)
    if validation is None or not is_encoded(validation):
        return
    for key, source in data.sources.items():
        if key != VALIDATION and is_encoded(source):
            shared = _shared(validation, source)
            if len(shared):
                yield Shared(key, shared[:, 0], source.path_of(int(shared[0, 1])))


def _shared(mine: EncodedSource, theirs: EncodedSource) -> np.ndarray:
    """int64 [n, 2]: ids of images of `mine`, ascending, each with that of one of `theirs` which is the same."""
    keys, others = _facts(mine), _facts(theirs)
    mine_ids = np.flatnonzero(np.isin(keys, others) & (mine.num_bytes > 0))
    their_ids = np.flatnonzero(np.isin(others, keys[mine_ids]))
    twins = dict(zip(_tails(theirs, their_ids, others), their_ids.tolist(), strict=True))
    pairs = [
        (i, twins[tail])
        for i, tail in zip(mine_ids.tolist(), _tails(mine, mine_ids, keys), strict=True)
        if tail[1] and tail in twins
    ]
    return np.array(pairs, np.int64).reshape(-1, 2)


def _facts(source: EncodedSource) -> np.ndarray:
    """uint64 [N], of bytes and sides."""
    return mix(source.num_bytes, source.sizes[:, 0], source.sizes[:, 1])


def _tails(source: EncodedSource, ids: np.ndarray, keys: np.ndarray) -> list[tuple[int, bytes]]:
    """(key, last bytes, or a sum of all where the last say nothing) of the images `ids`; no bytes where they cannot be
    read."""

    def tail(i: int) -> tuple[int, bytes]:
        try:
            last = source.tail(i, TAIL_BYTES)
            if len(set(last)) <= _FLAT and len(last) == TAIL_BYTES:
                last = hashlib.sha256(source.tail(i, int(source.num_bytes[i]))).digest()
            return int(keys[i]), last
        except (OSError, StoreError):
            return int(keys[i]), b""

    with ThreadPoolExecutor(2 * len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(tail, ids.tolist()))
