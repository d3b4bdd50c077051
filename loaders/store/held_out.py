"""Images that are held out for validation where a data set has no split of its own: a tenth of each class, by key.

Decided by class and name alone, so that training in place, evaluating, and training on what was converted leave out the
same images.
"""

from __future__ import annotations

import zlib

import numpy as np

from loaders.plan.draws import mix, tag
from loaders.store.source import Source

SHARE = 10  # one image in so many
FEW = 50  # in all: below, one image is more than two points of a score
MOST = 50  # of a class: as many as ImageNet's validation images have


def held_out(source: Source) -> np.ndarray:
    """Ids, int64 ascending, of the images of `source` that are held out: of a class of two images or more, one at
    least."""
    order = np.argsort(source.labels, kind="stable")
    bounds = np.searchsorted(source.labels[order], np.arange(source.num_classes + 1))
    chosen = [np.zeros(0, np.int64)]
    for name, first, beyond in zip(source.class_names, bounds[:-1], bounds[1:], strict=True):
        ids = order[first:beyond]
        count = min(MOST, max(1, len(ids) // SHARE)) if len(ids) > 1 else 0
        names = np.array([zlib.crc32(source.name_of(i).encode()) for i in ids.tolist()], np.uint64)
        keys = mix(tag("held out"), zlib.crc32(name.encode()), names)
        chosen.append(ids[np.argsort(keys, kind="stable")[:count]])
    return np.sort(np.concatenate(chosen))
