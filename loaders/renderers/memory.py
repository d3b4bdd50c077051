"""Crops of images that lie in memory as arrays: digits, CIFAR."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from loaders.plan.plan import Rows
from loaders.plan.views import RandomCrop
from loaders.renderers.resample import CODES, resize_boxes
from loaders.renderers.spread import spread
from loaders.store.source import ArraySource
from loaders.timing import CROP, StageTimes, now

_IMAGES_A_TASK = 64


class MemoryRenderer:
    """Renders an `ArraySource` with the threads of `pool`, which it neither owns nor closes."""

    device_id: int | None = None

    def __init__(self, source: ArraySource, pool: ThreadPoolExecutor, times: StageTimes | None = None):
        self.source, self.pool, self.times = source, pool, times or StageTimes()

    def render(self, rows: Rows, out: Mapping[str, np.ndarray]) -> None:
        """Fill out[view name], uint8 [copies * B, S, S, C], with the crops that `rows` describes, copy-major."""

        def work(begin: int, end: int) -> None:
            start = now()
            for v in rows.views:
                copies = v.view.copies
                part = slice(begin * copies, end * copies)  # nothing is decoded: any share of the crops will do
                ids = np.tile(rows.ids, copies)[part]
                cut_first, filter = isinstance(v.view.crop, RandomCrop), CODES[v.view.filter]
                resize_boxes(self.source.images, ids, v.boxes[part], cut_first, filter, out[v.view.name][part])
            self.times.add(CROP, start)

        spread(self.pool, work, len(rows.ids), _IMAGES_A_TASK)
