"""The cache of decoded images: the same pixels, within its budget, from any number of threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from loaders.loader import Loader, bind
from loaders.plan.plan import Plan
from loaders.plan.views import UNIT, Balanced, Rrc, Stream, View
from loaders.renderers.cache import DecodedCache
from loaders.store.data import DataSets
from loaders.store.folder import FolderSource

IMAGE_BYTES = 6 * 5 * 3


def decode(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (6, 5, 3), np.uint8)


def test_pixels_are_those_of_the_decoder_and_each_image_is_decoded_once():
    """Catches an image under another's id, and a cache that never hits."""
    cache = DecodedCache(decode, 100 * IMAGE_BYTES)
    for _ in range(3):
        for i in range(20):
            assert np.array_equal(cache.get(i), decode(i))
    assert (cache.hits, cache.misses, cache.num_bytes) == (40, 20, 20 * IMAGE_BYTES)


def test_a_full_cache_keeps_what_it_has():
    """Catches a budget that is overrun, and least-recently-used eviction: in turn through more images than fit, it
    would not hit once."""
    cache = DecodedCache(decode, 10 * IMAGE_BYTES + 1)
    for _ in range(3):
        for i in range(20):
            assert np.array_equal(cache.get(i), decode(i))
        assert cache.num_bytes == 10 * IMAGE_BYTES
    assert (cache.hits, cache.misses) == (20, 40)


def test_a_small_image_still_fits_where_a_large_one_does_not():
    """Catches a cache that closes at the first image too many."""
    cache = DecodedCache(lambda i: np.zeros((i, 1, 3), np.uint8), 30)
    for i in (8, 5, 2, 1):
        cache.get(i)
    assert cache.num_bytes == 3 * (8 + 2)


def test_no_consumer_can_change_what_the_next_one_gets():
    """Catches an op that works in place on the cache."""
    cache = DecodedCache(decode, IMAGE_BYTES)
    for i in (0, 0, 1):
        with pytest.raises(ValueError, match="read-only"):
            cache.get(i)[:] = 0


def test_an_image_that_cannot_be_decoded_is_tried_again():
    """Catches a failure that is remembered as an image."""
    tries = []

    def fails_once(i: int) -> np.ndarray:
        tries.append(i)
        if len(tries) == 1:
            raise ValueError("damaged")
        return decode(i)

    cache = DecodedCache(fails_once, IMAGE_BYTES)
    with pytest.raises(ValueError, match="damaged"):
        cache.get(7)
    assert np.array_equal(cache.get(7), decode(7)) and cache.num_bytes == IMAGE_BYTES


def test_threads_count_and_store_correctly():
    """Catches bytes counted twice where two threads decode one image, and lost counts."""
    cache = DecodedCache(decode, 8 * IMAGE_BYTES)
    ids = np.random.default_rng(0).integers(0, 16, 4000).tolist()
    with ThreadPoolExecutor(8) as pool:
        for i, image in zip(ids, pool.map(cache.get, ids), strict=True):
            assert np.array_equal(image, decode(i))
    assert cache.hits + cache.misses == len(ids) and cache.num_bytes == 8 * IMAGE_BYTES
    assert cache.num_bytes == sum(image.nbytes for image in cache._images.values())


@pytest.mark.parametrize("budget", [1, 5_000, 10**9])
def test_a_stream_gets_the_same_batches_with_and_without_the_cache(budget, tmp_path):
    """Whatever part of the images fits: catches another resampler, crops mixed up between images, and a stale image."""
    rng = np.random.default_rng(0)
    for i in range(8):
        (tmp_path / str(i % 2)).mkdir(exist_ok=True)
        pixels = rng.integers(0, 255, (30 + i, 44 - i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / str(i % 2) / f"{i}.jpg", quality=95)
    view = View("view", 16, Rrc((0.3, 1.0)), pixels=UNIT, copies=2)
    plan = Plan((Stream("s", "train", (view,), Balanced(2, 3), 6),), "s", seed=0)
    bound = bind(plan, DataSets({"train": FolderSource(tmp_path)}))

    def batches(**settings):
        with Loader(bound, renderer="pil", **settings) as loader:
            return [batch.parts["s"].x["view"].clone() for batch in loader.batches(0, 6)]

    plain, cached = batches(), batches(cache_bytes=budget)
    assert all(torch.equal(one, other) for one, other in zip(plain, cached, strict=True))
