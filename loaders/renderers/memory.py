"""Crops of images that lie in memory as arrays: digits, CIFAR."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numba import njit

from loaders.plan.plan import Rows
from loaders.plan.views import Rrc
from loaders.renderers.resample import CODES, resize_box
from loaders.renderers.spread import spread
from loaders.store.source import ArraySource

_IMAGES_A_TASK = 64


class MemoryRenderer:
    """Renders an `ArraySource` with the threads of `pool`, which it neither owns nor closes."""

    def __init__(self, source: ArraySource, pool: ThreadPoolExecutor):
        self.source, self.pool = source, pool

    def render(self, rows: Rows, out: Mapping[str, np.ndarray]) -> None:
        """Fill out[view name], uint8 [copies * B, S, S, C], with the crops that `rows` describes, copy-major."""

        def work(begin: int, end: int) -> None:
            for v in rows.views:
                copies = v.view.copies
                part = slice(begin * copies, end * copies)  # nothing is decoded: any share of the crops will do
                ids = np.tile(rows.ids, copies)[part]
                cut_first, filter = isinstance(v.view.crop, Rrc), CODES[v.view.filter]
                _resize_all(self.source.images, ids, v.boxes[part], cut_first, filter, out[v.view.name][part])

        spread(self.pool, work, len(rows.ids), _IMAGES_A_TASK)


@njit(nogil=True, cache=True)
def _resize_all(images, ids, boxes, cut_first, filter, out):
    """images uint8 [N, H, W, C], ids int64 [M], boxes float64 [M, 4] -> out uint8 [M, S, S, C]."""
    height, width = images.shape[1:3]
    size = out.shape[1]
    for m in range(len(ids)):
        x0, y0, x1, y1 = boxes[m]
        clip = (int(x0), int(y0), int(x1), int(y1)) if cut_first else (0, 0, width, height)
        if x1 - x0 == size and y1 - y0 == size and x0 == int(x0) and y0 == int(y0):
            out[m] = images[ids[m], int(y0) : int(y1), int(x0) : int(x1)]
        else:
            resize_box(images[ids[m]], (x0, y0, x1, y1), clip, size, filter, out[m])
