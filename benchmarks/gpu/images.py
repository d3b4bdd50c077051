"""How fast images come to the card: decoded from JPEG files, or from raw pixels; cut, copied and finished there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu.calls import Found, Run, Skipped
from fastssl.methods.paws import GLOBAL_VIEW, SMALL_VIEW
from loaders import loader as loader_module
from loaders.loader import Loader, bind
from loaders.plan.plan import Plan
from loaders.plan.views import Shuffled, Stream
from loaders.store.data import DataSets
from loaders.store.folder import FolderSource
from loaders.store.source import ArraySource, Source

HEIGHT, WIDTH = 375, 500  # as most of ImageNet's
NUM_IMAGES = 256


def loader(run: Run) -> Found:
    """Images a second with PAWS's eight views, by source and renderer; the finish and the copies alone."""
    found = run.found
    batch = 8 if run.toy else 64
    with ExitStack() as stack:
        folder = jpegs(stack, 16 if run.toy else NUM_IMAGES)
        found["images"] = "carried" if "FASTSSL_TEST_DATA" in os.environ else "made here"
        files, arrays = FolderSource(folder), raw(16 if run.toy else NUM_IMAGES)
        contenders: dict[str, tuple[Source, str]] = {"raw, memory": (arrays, "memory"), "jpeg, pil": (files, "pil")}
        contenders |= {f"jpeg, {name}": (files, name) for name in ("ffcv", "dali")}
        for name, (source, renderer) in contenders.items():
            if name not in found:
                run.need(2 * run.window_s)
                found[name] = tried(lambda source=source, renderer=renderer: rate(run, source, renderer, batch))
                run.keep()
    if run.device.type == "cuda":
        found["finish"] = finish_alone(run, batch)
        found["pinned copies, GB/s"] = copies(run.device)
    else:
        found["left out"] = "the finish and the copies need a card"
    return found


def tried(measure: Callable[[], Found]) -> Found:
    try:
        return measure()
    except (
        Exception
    ) as error:  # a renderer that is not installed, or cannot do it here: said, and the next one measured
        return {"left out": f"{type(error).__name__}: {error}"[:300]}


def jpegs(stack: ExitStack, num: int) -> Path:
    """A folder of JPEG files: the sample that was carried here, or smooth noise at quality 90."""
    if "FASTSSL_TEST_DATA" in os.environ:
        return Path(os.environ["FASTSSL_TEST_DATA"]) / "imagenet-sample"
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    (folder / "a").mkdir()
    rng = np.random.default_rng(0)
    for i in range(num):
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
        small.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(folder / "a" / f"{i:05}.jpg", quality=90)
    return folder


def raw(num: int) -> ArraySource:
    """Decoded images: half as high and wide, so that they fit anywhere."""
    pixels = np.random.default_rng(0).integers(0, 256, (num, 256, 256, 3), np.uint8)
    return ArraySource("noise", pixels, np.zeros(num, np.int64), ("a",))


def bound_to(source: Source, batch: int, size: int):  # type: ignore[no-untyped-def]
    views = tuple(replace(view, size=size or view.size) for view in (GLOBAL_VIEW, SMALL_VIEW))
    return bind(
        Plan((Stream("unlabelled", "train", views, Shuffled(), batch),), "unlabelled", seed=0),
        DataSets({"train": source}),
    )


def rate(run: Run, source: Source, renderer: str, batch: int) -> Found:
    """Images a second over a window, once batches flow; and of it the seconds in which each stage was at work."""
    bound = bound_to(source, batch, 8 if run.toy else 0)
    with Loader(bound, device=run.device.type, renderer=renderer) as made, closing(made.batches(0, 10**6)) as batches:
        for _ in range(4):
            next(batches).release()
        begun, num = run.clock(), 0
        while run.clock() - begun < run.window_s / 2 or num == 0:
            next(batches).release()
            num += batch
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        return {"images_per_s": num / (run.clock() - begun), "threads": made.threads}


def finish_alone(run: Run, batch: int) -> Found:
    """Milliseconds of the GPU, and memory, for one batch's crops of each view."""
    plan = bound_to(raw(batch), batch, 0).plan
    found = {}
    for rows in plan.rows("unlabelled", 0).views:
        crops = torch.randint(
            0, 256, (len(rows.boxes), rows.view.size, rows.view.size, 3), dtype=torch.uint8, device=run.device
        )
        out = torch.empty((1, *crops.shape), device=run.device)
        loader_module._finished_on_gpu(rows, crops, out)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, events = torch.cuda.memory_allocated(), [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for _ in range(10):
            loader_module._finished_on_gpu(rows, crops, out)
        events[1].record()
        torch.cuda.synchronize()
        scratch = (torch.cuda.max_memory_allocated() - before) / 2**20
        found[rows.view.name] = {"ms": events[0].elapsed_time(events[1]) / 10, "scratch_mib": scratch}
    return found


def copies(device: torch.device) -> float:
    """10^9 bytes a second from pinned memory."""
    host = torch.empty(183_000_000, dtype=torch.uint8, pin_memory=True)
    there = host.to(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    for _ in range(10):
        there.copy_(host, non_blocking=True)
    events[1].record()
    torch.cuda.synchronize()
    return 10 * len(host) / events[0].elapsed_time(events[1]) / 1e6


def accuracy(run: Run) -> Found:
    """What `benchmarks.accuracy`, where there is one, trains and scores on a GPU within the time that is left."""
    try:
        from benchmarks import accuracy as pays  # type: ignore[attr-defined]
    except ImportError:
        raise Skipped("benchmarks/accuracy.py, which would train and score on a GPU, is not there") from None
    return pays.on_a_gpu(run)
