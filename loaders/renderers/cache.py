"""Decoded images kept in memory: for streams that come back to the same images, as PAWS's support does.

62 % of the decodes of a PAWS step on ImageNet are of support images that were decoded before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from loaders.plan.plan import Rows
from loaders.plan.views import RandomCrop
from loaders.renderers.pil import PilRenderer
from loaders.renderers.resample import CODES, over_grey, resize_boxes
from loaders.renderers.spread import spread
from loaders.store.masks import Masks, mask_of
from loaders.store.source import EncodedSource
from loaders.timing import CROP, FETCH, PhaseTimes, now

_IMAGES_A_TASK = 4
_ONLY = np.zeros(1, np.int64)


class DecodedCache:
    """Images uint8 [H, W, 3] by id, decoded when first asked for and kept until `budget_bytes` are full.

    The first to come stay: a stream that goes through more images than fit would find that the least recently used
    one, which is the next to come again, has just been thrown out, and of images drawn at random any set is as good.
    Safe to use from several threads; two that miss the same image at once may both decode it.
    """

    def __init__(self, decode: Callable[[int], np.ndarray], budget_bytes: int):
        self.decode, self.budget_bytes = decode, budget_bytes
        self.num_bytes = self.hits = self.misses = 0
        self._images: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def get(self, i: int) -> np.ndarray:
        """Image `i`, read-only. Raises what `decode` raises, and keeps nothing then."""
        with self._lock:
            image = self._images.get(i)
            if image is not None:
                self.hits += 1
                return image
            self.misses += 1
        image = self.decode(i)
        image.flags.writeable = False
        with self._lock:
            if i not in self._images and self.num_bytes + image.nbytes <= self.budget_bytes:
                self._images[i] = image
                self.num_bytes += image.nbytes
        return image


class CachedRenderer:
    """Renders an encoded source from decoded images that are kept up to `budget_bytes`; pixels are those of
    `PilRenderer` and `FfcvRenderer`. The threads are those of `pool`, which it neither owns nor closes."""

    device_id: int | None = None

    def __init__(
        self,
        source: EncodedSource,
        pool: ThreadPoolExecutor,
        budget_bytes: int,
        times: PhaseTimes | None = None,
        masks: Masks | None = None,
    ):
        self.source, self.pool, self.times, self.masks = source, pool, times or PhaseTimes(), masks
        pil = PilRenderer(source, pool, self.times)
        self.cache = DecodedCache(lambda i: np.array(pil.decode(i)), budget_bytes)

    def render(self, rows: Rows, out: Mapping[str, np.ndarray]) -> None:
        """Fill out[view name], uint8 [copies * B, S, S, 3], with the crops that `rows` describes, copy-major. Raises
        RenderError for an image that is damaged or not of the size its source says."""

        def work(begin: int, end: int) -> None:
            for b in range(begin, end):
                image = self.cache.get(int(rows.ids[b]))[None]
                start = now()
                if rows.is_masked(b):
                    assert self.masks is not None
                    mask = mask_of(self.masks, self.source, int(rows.ids[b]))
                    start = self.times.add(FETCH, start)
                for v in rows.views:
                    cut_first, pixels = isinstance(v.view.crop, RandomCrop), out[v.view.name]
                    for row in range(b, len(v.boxes), len(rows.ids)):
                        part, shown = slice(row, row + 1), image
                        if v.greys is not None and v.greys[row] >= 0:
                            shown = over_grey(image, mask, np.uint8(v.greys[row]), v.boxes[row], cut_first)
                        resize_boxes(shown, _ONLY, v.boxes[part], cut_first, CODES[v.view.filter], pixels[part])
                self.times.add(CROP, start)

        spread(self.pool, work, len(rows.ids), _IMAGES_A_TASK)
