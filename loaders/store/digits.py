"""scikit-learn's handwritten digits: 1,797 grey images of 8 x 8 pixels, the set that needs no download."""

from __future__ import annotations

import numpy as np

from loaders.plan.draws import mix, tag
from loaders.store.source import ArraySource

_HELD_OUT = 5  # one image in five of every class
_BRIGHTEST = 16


def open_digits() -> tuple[ArraySource, ArraySource]:
    """(training, held-out) images uint8 [N, 8, 8, 1], 0..16 scaled to 0..255; the same split everywhere, always."""
    from sklearn.datasets import load_digits  # slow to import, and only this set needs it

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / _BRIGHTEST)).astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int64)
    keys = mix(tag("digits held out"), np.arange(len(labels)))
    held_out = np.zeros(len(labels), bool)
    for c in range(10):
        ids = np.flatnonzero(labels == c)
        held_out[ids[np.argsort(keys[ids], kind="stable")][: len(ids) // _HELD_OUT]] = True
    names = tuple(str(c) for c in range(10))
    return (
        ArraySource("digits (train)", images[~held_out], labels[~held_out], names),
        ArraySource("digits (held out)", images[held_out], labels[held_out], names),
    )
