"""Crops of images that lie in memory as arrays: digits, CIFAR."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from loaders.plan.plan import Rows, ViewRows
from loaders.plan.views import RandomCrop
from loaders.renderers.resample import CODES, resize_boxes
from loaders.renderers.spread import spread
from loaders.store.masks import Masks, mask_of
from loaders.store.source import ArraySource
from loaders.timing import CROP, PhaseTimes, now

_IMAGES_A_TASK = 64
_ONLY = np.zeros(1, np.int64)


class MemoryRenderer:
    """Renders an `ArraySource` with the threads of `pool`, which it neither owns nor closes. `masks` are the source's,
    where a view has a mask."""

    device_id: int | None = None

    def __init__(
        self,
        source: ArraySource,
        pool: ThreadPoolExecutor,
        times: PhaseTimes | None = None,
        masks: Masks | None = None,
    ):
        self.source, self.pool, self.times, self.masks = source, pool, times or PhaseTimes(), masks

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
                if v.greys is not None:
                    self._render_masked(v, ids, part, out[v.view.name][part])
            self.times.add(CROP, start)

        spread(self.pool, work, len(rows.ids), _IMAGES_A_TASK)

    def _render_masked(self, rows: ViewRows, ids: np.ndarray, part: slice, out: np.ndarray) -> None:
        """Of the crops `part`, of images `ids`, those with a mask, over what `out` has: they are few, and small."""
        assert rows.greys is not None and self.masks is not None
        boxes, greys = rows.boxes[part], rows.greys[part]
        cut_first, filter = isinstance(rows.view.crop, RandomCrop), CODES[rows.view.filter]
        for k in np.flatnonzero(greys >= 0).tolist():
            mask, image = mask_of(self.masks, self.source, int(ids[k])), self.source.images[ids[k]]
            masked = np.where(mask[..., None], image, greys[k].astype(np.uint8))[None]
            resize_boxes(masked, _ONLY, boxes[k : k + 1], cut_first, filter, out[k : k + 1])
