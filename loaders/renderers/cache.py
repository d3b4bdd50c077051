"""Decoded images kept in memory: for streams that come back to the same images, as PAWS's support does."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np


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
