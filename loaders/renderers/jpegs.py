"""What renderers share that decode JPEGs alone: buffers kept between images, and `pil` for everything else."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar, cast

import numpy as np

from loaders.errors import StoreError
from loaders.plan.plan import Rows
from loaders.renderers.pil import PilRenderer
from loaders.store.masks import mask_of

T = TypeVar("T")

NO_MASK = np.empty((0, 0), bool)


class JpegRenderer(PilRenderer):
    """`render_image` is that of `pil`: what a subclass does not decode goes there, and is rendered or named."""

    @cached_property
    def _idle(self) -> list[Any]:
        """What serves one thread at a time and waits for the next: buffers, decoders."""
        return []

    def _taken(self, make: Callable[[], T]) -> T:
        """An idle one, else a new one. Give it back by `_idle.append`; that and `pop` are atomic."""
        try:
            return cast(T, self._idle.pop())
        except IndexError:  # looked at before, another thread might take the last one in between
            return make()

    def _mask(self, rows: Rows, b: int) -> np.ndarray:
        """The mask of image `b` of `rows`, bool [H, W]; of no size where no copy is masked."""
        if not rows.is_masked(b):
            return NO_MASK
        assert self.masks is not None
        return mask_of(self.masks, self.source, int(rows.ids[b]))

    def _file(self, i: int) -> bytes:
        """The bytes of image `i`; nothing where it cannot be read, so that `pil` says why."""
        try:
            return self.source.jpeg(i)
        except (StoreError, OSError):
            return b""
