"""scikit-learn's handwritten digits: 1,797 grey images of 8 x 8 pixels, the set that needs no download."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np

from loaders.errors import StoreError
from loaders.plan.draws import mix, tag
from loaders.store.source import ArraySource

_HELD_OUT = 5  # one image in five of every class
_BRIGHTEST = 16


def open_digits() -> tuple[ArraySource, ArraySource]:
    """(training, held-out) images uint8 [N, 8, 8, 1], 0..16 scaled to 0..255; the same split everywhere, always."""
    table = np.loadtxt(_file(), delimiter=",")
    images = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / _BRIGHTEST)).astype(np.uint8)[..., None]
    labels = table[:, -1].astype(np.int64)
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


def _file() -> Path:
    """Where scikit-learn keeps them: a line an image, its label last. To import it takes each rank most of a second."""
    found = find_spec("sklearn")
    for folder in (found and found.submodule_search_locations) or ():
        if (path := Path(folder, "datasets", "data", "digits.csv.gz")).is_file():
            return path
    raise StoreError("the digits come with scikit-learn, which is not installed here, or keeps them elsewhere")
