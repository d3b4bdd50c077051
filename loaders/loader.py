"""Joins plan, renderer and finish: from (stream, step) to batches of tensors, prepared ahead of the consumer.

    bound = bind(plan, open_data(("path/to/images",)))
    with Loader(bound) as loader:
        for batch in loader.batches(0, bound.plan.steps_per_epoch):
            ...  # batch.parts["unlabelled"].x["global"]: float32 [copies * B, C, H, W], channels-last
            batch.release()

The loader's whole state is the step it is asked to start from.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loaders.batch import Batch, Part
from loaders.errors import StoreError
from loaders.finish import numba_cpu
from loaders.plan.plan import BoundPlan, Plan, Rows, StreamFacts
from loaders.renderers.memory import MemoryRenderer
from loaders.renderers.pil import PilRenderer
from loaders.store.data import DataSets
from loaders.store.source import ArraySource, Source, is_encoded
from loaders.store.subsets import Resolved, resolve

_DONE = object()


@dataclass(frozen=True)
class Bound:
    """A plan joined with its data: by stream name, where images come from and which of them show."""

    plan: BoundPlan
    sources: dict[str, Source]
    subsets: dict[str, Resolved]  # the images a stream draws from
    visible: dict[str, Resolved]  # those that show their label

    def truth(self, batch: Batch) -> dict[str, Tensor]:
        """Each stream's labels before any were hidden, on the batch's device."""
        return {
            name: torch.from_numpy(self.plan.facts[name].truth)[part.ids.cpu()].to(part.ids.device)
            for name, part in batch.parts.items()
        }


def bind(plan: Plan, data: DataSets) -> Bound:
    """Resolve each stream's source and subsets. Raises StoreError or PlanError where data and plan do not fit."""
    sources = {stream.name: data.get(stream.source) for stream in plan.streams}
    subsets = {stream.name: resolve(stream.ids, sources[stream.name], data.search) for stream in plan.streams}
    visible = {stream.name: resolve(stream.visible, sources[stream.name], data.search) for stream in plan.streams}
    facts = {}
    for name, source in sources.items():
        labels, shown = source.labels, visible[name].ids
        if shown is not None:
            labels = np.full_like(source.labels, -1)
            labels[shown] = source.labels[shown]
        facts[name] = StreamFacts(subsets[name].ids, labels, source.labels, source.sizes, source.num_classes)
    return Bound(plan.bind(facts), sources, subsets, visible)


class Loader:
    """Batches of one rank. `threads` render and finish images (default: the CPUs this process may use); one more
    thread plans ahead, `prefetch` batches deep. Close it, or use it in a `with` statement, to join its threads."""

    def __init__(
        self,
        bound: Bound,
        *,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str = "cpu",
        threads: int | None = None,
        renderer: str = "auto",
        prefetch: int = 2,
    ):
        bound.plan.check_world(world)
        self.bound, self.rank, self.world = bound, rank, world
        self.device = torch.device(device)
        self.prefetch = prefetch
        self.threads = threads or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="fastssl-render")
        self._renderers = {
            name: make_renderer(renderer, source, self._pool) for name, source in bound.sources.items()
        }
        self._free: list[_Slot] = []
        self._crops: dict[tuple[str, str], np.ndarray] = {}  # uint8, rewritten every step by the planning thread
        self._stopping = threading.Event()
        self._planner: threading.Thread | None = None

    def batches(self, start: int, stop: int) -> Generator[Batch]:
        """Batches of steps start .. stop - 1, prepared in the background while the consumer works.

        One such iterator may run at a time; leaving it early stops its thread.
        """
        assert self._planner is None, "close the iterator before asking for another"
        ready: queue.Queue = queue.Queue(maxsize=self.prefetch)
        self._stopping.clear()
        self._planner = threading.Thread(target=self._prepare, args=(start, stop, ready), name="fastssl-plan")
        self._planner.start()
        try:
            while True:
                item = ready.get()
                if item is _DONE:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            self._join_planner()

    def close(self) -> None:
        """Stop and join every thread of this loader."""
        self._join_planner()
        self._pool.shutdown(cancel_futures=True)

    def _join_planner(self) -> None:
        if self._planner is not None:
            self._stopping.set()
            self._planner.join()
            self._planner = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self, start: int, stop: int, ready: queue.Queue) -> None:
        """The planning thread: put batches, then `_DONE` or the exception that ended it, until told to stop."""

        def put(item: object) -> None:
            while not self._stopping.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        try:
            for step in range(start, stop):
                if self._stopping.is_set():
                    return
                put(self._batch(step))
            put(_DONE)
        except BaseException as error:  # handed to the consumer, which raises it
            put(error)

    def _batch(self, step: int) -> Batch:
        slot = self._free.pop() if self._free else _Slot()
        rows = {s.name: self.bound.plan.rows(s.name, step, self.rank, self.world) for s in self.bound.plan.plan.streams}
        parts = {name: self._part(r, slot) for name, r in rows.items()}
        batch = Batch(parts, torch.tensor(step), release=lambda: self._free.append(slot))
        return batch.to(self.device)

    def _part(self, rows: Rows, slot: _Slot) -> Part:
        crops = {}
        for view_rows in rows.views:
            view = view_rows.view
            shape = (len(view_rows.boxes), view.size, view.size, self.bound.sources[rows.stream].channels)
            crops[view.name] = _reuse(self._crops, (rows.stream, view.name), shape, np.uint8)
        self._renderers[rows.stream].render(rows, crops)
        x = {}
        for view_rows in rows.views:
            view, crop = view_rows.view, crops[view_rows.view.name]
            out = _reuse(slot.views, (rows.stream, view.name), (len(view.turns), *crop.shape), np.float32)
            numba_cpu.finish(crop, view.ops, view_rows.tables, view.pixels, out[0], self._pool)
            for turned, turn in list(zip(out, view.turns, strict=True))[::-1]:  # out[0], the original, last
                turned[...] = np.rot90(out[0], turn, axes=(1, 2))
            x[view.name] = torch.from_numpy(out.reshape(-1, *crop.shape[1:])).permute(0, 3, 1, 2)
        return Part(
            x=x,
            ids=torch.from_numpy(rows.ids),
            labels=torch.from_numpy(rows.labels),
            columns=None if rows.columns is None else torch.from_numpy(rows.columns),
            keys=torch.from_numpy(rows.keys.view(np.int64)),
            positions=torch.from_numpy(rows.positions),
        )


def make_renderer(kind: str, source: Source, pool: ThreadPoolExecutor) -> MemoryRenderer | PilRenderer:
    """The renderer named `kind` over `source`; `auto` takes what the source allows. Raises StoreError otherwise."""
    if isinstance(source, ArraySource) and kind in ("auto", "memory"):
        return MemoryRenderer(source, pool)
    if is_encoded(source) and kind in ("auto", "pil"):
        return PilRenderer(source, pool)
    holds, fits = ("encoded images", "pil") if is_encoded(source) else ("arrays", "memory")
    raise StoreError(f"--loader {kind}: {source.name} holds {holds}; choose auto or {fits}")


class _Slot:
    """Float buffers of one batch, lent to the consumer until it releases the batch."""

    def __init__(self) -> None:
        self.views: dict[tuple[str, str], np.ndarray] = {}


def _reuse(buffers: dict, key: tuple[str, str], shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """A contiguous array of `shape` at `key`, allocated where none of that shape is there yet."""
    if key not in buffers or buffers[key].shape != shape:
        buffers[key] = np.empty(shape, dtype)
    return buffers[key]
