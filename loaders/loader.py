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
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loaders.batch import Batch, Part
from loaders.device import copy_stream, numbered, runs_triton
from loaders.errors import RenderError, StoreError
from loaders.finish import numba_cpu
from loaders.labels.subsets import NotAmong, Resolved, resolve
from loaders.plan.plan import BoundPlan, Plan, Rows, StreamFacts, ViewRows
from loaders.plan.views import Balanced, Subset
from loaders.renderers import Renderer
from loaders.renderers.autoaugment import CHANNELS, AutoAugmented
from loaders.renderers.cache import CachedRenderer
from loaders.renderers.made import make_renderer
from loaders.store.data import VALIDATION, DataSets
from loaders.store.masks import Masks
from loaders.store.source import Selected, Source, is_encoded
from loaders.timing import FINISH, PLAN, Busy, PhaseTimes, Pool, Prepared, Shares, now

_DONE = object()
_HISTORY = 1000  # batches
_AHEAD = 2  # steps that are rendered, or being so, while one is finished: fewer would leave threads idle in between
NUM_KEPT = 4  # batches after which a GPU's loader has made all its slots
_PLANES_BYTES = 20_000_000  # of a finish's float planes, of which two live at once: less than a large GPU's L2


@dataclass(frozen=True)
class Bound:
    """A plan joined with its data: by stream name, where images come from and which of them show."""

    plan: BoundPlan
    sources: dict[str, Source]
    subsets: dict[str, Resolved]  # the images a stream draws from
    visible: dict[str, Resolved]  # those that show their label
    masks: dict[str, Masks] = field(default_factory=dict)  # of the streams that have a view with a mask

    def truth(self, batch: Batch) -> dict[str, Tensor]:
        """Each stream's labels before any were hidden, on the batch's device."""
        return {
            name: torch.from_numpy(self.sources[name].labels)[part.ids.cpu()].to(part.ids.device)
            for name, part in batch.parts.items()
        }


def bind(plan: Plan, data: DataSets) -> Bound:
    """Resolve each stream's source and subsets. Raises StoreError or PlanError where data and plan do not fit."""
    sources = {stream.name: data.get(stream.source) for stream in plan.streams}
    subsets = {stream.name: resolved(stream.ids, sources[stream.name], data) for stream in plan.streams}
    visible = {stream.name: resolved(stream.visible, sources[stream.name], data) for stream in plan.streams}
    masked = [stream for stream in plan.streams if any(view.mask is not None for view in stream.views)]
    masks = {stream.name: data.masks_of(stream.source) for stream in masked}
    facts = {}
    for name, source in sources.items():
        labels, shown = source.labels, visible[name].ids
        if shown is not None:
            labels = np.full_like(source.labels, -1)
            labels[shown] = source.labels[shown]
        foreground = masks[name].foreground if name in masks else None
        facts[name] = StreamFacts(subsets[name].ids, labels, source.sizes, source.num_classes, foreground)
    return Bound(plan.bind(facts), sources, subsets, visible, masks)


def resolved(subset: Subset, source: Source, data: DataSets) -> Resolved:
    """The images of `source`, one of `data`, that `subset` describes. Raises StoreError, which says of names that the
    source does not have if they are those of validation images."""
    try:
        return resolve(subset, source, data.search)
    except NotAmong as error:
        validation = data.get(VALIDATION)
        taken = 0 if validation is None else sum(validation.name_of(i) in error.names for i in range(len(validation)))
        if taken:
            held_out = isinstance(validation, Selected)
            way_out = "; give others, --data validation=PATH, or none, --data validation=none" if held_out else ""
            raise StoreError(f"{error}; {taken} of them are validation images of {validation.name}{way_out}") from None
        raise


class Loader:
    """Batches of one rank. At most `threads` threads at a time render and finish images (default, and never more: the
    CPUs this process may use); two more plan what they do and hand it out, `prefetch` batches deep. Close it, or use it
    in a `with` statement, to join its threads.

    Up to `cache_bytes` of decoded images are kept for class-balanced streams, whose pixels stay the same.

    An image that cannot be decoded ends the iteration with a RenderError; with `replace_damaged` the next image of its
    label takes its place, and `replaced` notes it: {stream: {damaged id: id in its place}}.

    `history` holds what the last batches took, stage by stage, in the order of the plan's streams.

    With a CUDA device, uint8 crops leave pinned slots and are finished on a stream of their own; where Triton does not
    run (a V100), they are finished first, and are floats when they leave. NOT YET RUN on a GPU.
    """

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
        replace_damaged: bool = False,
        cache_bytes: int = 0,
    ):
        bound.plan.check_world(world)
        self.bound, self.rank, self.world = bound, rank, world
        self.device = numbered(device)
        self.prefetch, self.replace_damaged = prefetch, replace_damaged
        self.replaced: dict[str, dict[int, int]] = {stream.name: {} for stream in bound.plan.asked.streams}
        num_cpus = len(os.sched_getaffinity(0))
        self.threads = min(threads or num_cpus, num_cpus)
        self._times = {name: PhaseTimes() for name in bound.sources}
        self._pool = Pool(self.threads, "fastssl-render", Shares(self._times.values()))
        self._busy = Busy()
        self.history: deque[Prepared] = deque(maxlen=_HISTORY)
        augmented = _with_policy(bound, renderer)
        gpu = self.device.index if runs_triton(self.device) else None
        self._renderers = {
            name: make_renderer(
                renderer, source, self._pool, self.threads, gpu, self._times[name], bound.masks.get(name)
            )
            for name, source in bound.sources.items()
        }
        self._cache_recurring(renderer, cache_bytes)
        for name in augmented:
            self._renderers[name] = AutoAugmented(self._renderers[name], self._pool, self._times[name])
        self._replace_unreadable()
        self._ahead = copy_stream(self.device) if self.device.type == "cuda" else None  # copies and finishes
        self._finishes_there = runs_triton(self.device)
        self._free: deque[_Slot] = deque()
        # Crops that are finished on the CPU: of the step that is finished, and of those rendered meanwhile.
        self._scratch = [_Slot(pinned=False) for _ in range(1 + _AHEAD)]
        self._stopping = threading.Event()
        self._preparer: threading.Thread | None = None

    def _cache_recurring(self, renderer: str, cache_bytes: int) -> None:
        """Class-balanced streams come back to the same images many times an epoch: keep these decoded."""
        recurring = [s.name for s in self.bound.plan.asked.streams if isinstance(s.order, Balanced)]
        for name in recurring if cache_bytes else ():
            source = self.bound.sources[name]
            if is_encoded(source):
                if renderer == "dali":
                    raise StoreError(
                        "decoded images are kept for --loader turbo, ffcv and pil; DALI's pixels are its own"
                    )
                budget_bytes, masks = cache_bytes // len(recurring), self.bound.masks.get(name)
                self._renderers[name] = CachedRenderer(source, self._pool, budget_bytes, self._times[name], masks)

    def _replace_unreadable(self) -> None:
        """Put others in the place of images whose headers say that they cannot be used. Raises StoreError where that is
        not wanted, or there are no others."""
        for stream, source in self.bound.sources.items():
            unreadable = source.unreadable if is_encoded(source) else {}
            ids = self.bound.subsets[stream].ids
            if ids is not None and unreadable:
                unreadable = {int(i): unreadable[int(i)] for i in np.intersect1d(ids, list(unreadable))}
            if unreadable and not self.replace_damaged:
                first = next(iter(unreadable))
                raise StoreError(
                    f"{source.name}: {len(unreadable)} of {len(source)} images cannot be used, first "
                    f"{source.path_of(first)}: {unreadable[first]}; mend or remove them"
                )
            self.replaced[stream] |= self.bound.plan.substitutes(stream, list(unreadable)) if unreadable else {}

    def batches(self, start: int, stop: int) -> Generator[Batch]:
        """Batches of steps start .. stop - 1, prepared in the background while the consumer works.

        One such iterator may run at a time; leaving it early stops its thread.
        """
        assert self._preparer is None, "close the iterator before asking for another"
        ready: queue.Queue[Any] = queue.Queue(maxsize=self.prefetch)
        self._stopping.clear()
        preparer = threading.Thread(target=self._prepare, args=(start, stop, ready), name="fastssl-prepare")
        preparer.start()  # an interrupt may come here: a thread that has not begun cannot be joined
        self._preparer = preparer
        try:
            while True:
                item = ready.get()
                if item is _DONE:
                    return
                if isinstance(item, BaseException):
                    raise item
                batch, copied = item
                if copied is not None:
                    _hand_over(batch, copied)
                yield batch
        finally:
            self._join_preparer()
            while not ready.empty():
                item = ready.get()
                if isinstance(item, tuple):
                    item[0].release()

    def keep_rendered(self) -> None:
        """After the next NUM_KEPT batches render nothing: what later ones copy and finish lies in their slots already.
        For measurements of what is left."""
        for name, renderer in self._renderers.items():
            self._renderers[name] = _Kept(renderer)

    def close(self) -> None:
        """Stop and join every thread of this loader."""
        self._join_preparer()
        self._pool.shutdown(cancel_futures=True)
        self._renderers.clear()

    def _join_preparer(self) -> None:
        self._stopping.set()
        if self._preparer is not None:
            self._preparer.join()
            self._preparer = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepare(self, start: int, stop: int, ready: queue.Queue[Any]) -> None:
        """The preparing thread: put batches, each with the event of its copy to the GPU, then `_DONE` or the exception
        that ended it, until told to stop. While one is finished, another thread renders the next, so that those of the
        pool need not wait for the last image of either."""

        def put(item: object) -> None:
            while not self._stopping.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        try:
            with self._ahead_of_us() as ahead:
                coming: deque[Future[_Rendered]] = deque()
                for step in range(start, stop):
                    for k in range(step + len(coming), min(step + 1 + _AHEAD, stop)):
                        coming.append(ahead.submit(self._rendered, k, self._room(k)))
                    rendered = coming.popleft().result()
                    if self._stopping.is_set():
                        return
                    batch = self._batch(rendered)
                    totals = np.stack([times.totals() for times in self._times.values()])
                    self.history.append(Prepared(step, self._busy.total_s(), totals))
                    put(batch)
            put(_DONE)
        except BaseException as error:  # handed to the consumer, which raises it
            put(error)

    @contextmanager
    def _ahead_of_us(self) -> Iterator[ThreadPoolExecutor]:
        """The thread that renders; at the end what it has not begun is dropped. It and this one are on our GPU: a
        thread begins on GPU 0, and pinning memory would occupy that."""

        def enter() -> None:
            if self._ahead is not None:
                torch.cuda.set_device(self.device)

        enter()
        ahead = ThreadPoolExecutor(1, "fastssl-ahead", enter)
        try:
            yield ahead
        finally:
            ahead.shutdown(cancel_futures=True)

    def _room(self, step: int) -> _Slot:
        """Where the step's crops go: what is finished on a GPU leaves from a batch's own buffers."""
        return self._slot() if self._finishes_there else self._scratch[step % len(self._scratch)]

    def _rendered(self, step: int, room: _Slot) -> _Rendered:
        with self._busy.working(), torch.cuda.stream(self._ahead):
            streams = [self._rows_and_crops(s.name, step, room) for s in self.bound.plan.asked.streams]
        return _Rendered(step, room, streams)

    def _batch(self, rendered: _Rendered) -> tuple[Batch, torch.cuda.Event | None]:
        slot = rendered.room if self._finishes_there else self._slot()
        with self._busy.working(), torch.cuda.stream(self._ahead):
            parts = {rows.stream: self._part(rows, crops, slot) for rows, crops in rendered.streams}
            batch = Batch(parts, torch.tensor(rendered.step)).to(self.device)
        if self._ahead is None:
            batch.release = self._taking_back(slot)
            return batch, None
        slot.copied = self._ahead.record_event()
        self._free.append(slot)
        return batch, slot.copied

    def _slot(self) -> _Slot:
        """A slot that nobody reads any more. For a GPU the oldest of at least two, so that none waits for the copy
        that was begun last."""
        if len(self._free) < (1 if self._ahead is None else 2):
            return _Slot(pinned=self._ahead is not None)
        slot = self._free.popleft()
        if slot.copied is not None:
            slot.copied.synchronize()
        return slot

    def _taking_back(self, slot: _Slot) -> Callable[[], None]:
        """What takes `slot` back from the consumer, once: a slot that stood in the list twice would be lent twice."""
        lent = [slot]

        def release() -> None:
            while lent:
                self._free.append(lent.pop())

        return release

    def _rows_and_crops(self, stream: str, step: int, room: _Slot) -> tuple[Rows, dict[str, Any]]:
        """The stream's rows of this step and their uint8 crops by view."""
        instead = self.replaced[stream]
        while True:
            begin = now()
            rows = self.bound.plan.rows(stream, step, self.rank, self.world, instead)
            self._times[stream].add(PLAN, begin)
            try:
                return rows, self._crops(rows, room)
            except RenderError as error:
                if not self.replace_damaged or error.image_id is None:
                    raise
                substitute = self.bound.plan.substitute(stream, error.image_id, instead)
                if substitute is None:
                    raise
                instead[error.image_id] = substitute

    def _crops(self, rows: Rows, room: _Slot) -> dict[str, Any]:
        renderer = self._renderers[rows.stream]
        crops: dict[str, Any] = {}
        for v in rows.views:
            shape = (len(v.boxes), v.view.size, v.view.size, self.bound.sources[rows.stream].channels)
            if renderer.device_id is None:
                crops[v.view.name] = room.array((rows.stream, v.view.name), shape, torch.uint8)
            else:
                crops[v.view.name] = torch.empty(shape, dtype=torch.uint8, device=self.device)
        renderer.render(rows, crops)
        return crops

    def _part(self, rows: Rows, crops: dict[str, Any], slot: _Slot) -> Part:
        x = {}
        for v in rows.views:
            crop, shape = crops[v.view.name], (len(v.view.turns), *crops[v.view.name].shape)
            if self._finishes_there:
                out = _finished_on_gpu(v, crop, torch.empty(shape, device=self.device))
            else:
                room = slot.array((rows.stream, v.view.name), shape, torch.float32)
                out = self._finished(v, crop, room, self._times[rows.stream])
            x[v.view.name] = out.flatten(0, 1).permute(0, 3, 1, 2)
        return Part(
            x=x,
            ids=torch.from_numpy(rows.ids),
            labels=torch.from_numpy(rows.labels),
            columns=None if rows.columns is None else torch.from_numpy(rows.columns),
            keys=torch.from_numpy(rows.keys.view(np.int64)),
            positions=torch.from_numpy(rows.positions),
        )

    def _finished(self, rows: ViewRows, crops: np.ndarray, out: np.ndarray, times: PhaseTimes) -> Tensor:
        """Crops uint8 [M, S, S, C] -> `out` float32 [turns, M, S, S, C]."""
        numba_cpu.finish(crops, rows.view.ops, rows.tables, rows.view.pixels, out[0], _Timed(self._pool, times))
        _turn(out, rows.view.turns, np.rot90)
        return torch.from_numpy(out)


def _finished_on_gpu(rows: ViewRows, crops: np.ndarray | Tensor, out: Tensor) -> Tensor:
    """Crops uint8 [M, S, S, C], pinned or on the GPU already -> `out` float32 [turns, M, S, S, C] on the GPU, queued on
    the current stream."""
    from loaders.finish.triton import finish as triton_finish  # a library that only torch's CUDA builds bring along

    on_gpu = crops if isinstance(crops, Tensor) else torch.from_numpy(crops).to(out.device, non_blocking=True)
    # A blur keeps float planes between its passes: of few images at a time they stay in the cache, and take no memory
    # to speak of.
    at_once = max(1, _PLANES_BYTES // (4 * out[0, 0].numel()))
    for first in range(0, len(crops), at_once):
        few = slice(first, first + at_once)
        tables = tuple(table[few] for table in rows.tables)
        triton_finish.finish(on_gpu[few], rows.view.ops, tables, rows.view.pixels, out[0, few])
    _turn(out, rows.view.turns, torch.rot90)
    return out


class _Kept:
    """A renderer that stops rendering once every slot has crops in it."""

    def __init__(self, renderer: Renderer):
        self.renderer, self.device_id, self._num_left = renderer, renderer.device_id, NUM_KEPT

    def render(self, rows: Rows, out: Mapping[str, Any]) -> None:
        if self._num_left:
            self._num_left -= 1
            self.renderer.render(rows, out)


class _Timed:
    """The pool, counting what its threads are given as the stage `finish`."""

    def __init__(self, pool: ThreadPoolExecutor, times: PhaseTimes):
        self.pool, self.times = pool, times

    def map(self, task: Callable[[int], None], starts: Iterable[int]) -> Iterator[None]:
        def timed(start: int) -> None:
            begin = now()
            task(start)
            self.times.add(FINISH, begin)

        return self.pool.map(timed, starts)


def _turn(out: Any, turns: tuple[int, ...], rot90: Callable[..., Any]) -> None:
    """From the crops in out[0], [M, S, S, C], the quarter turns of each."""
    for i, turn in reversed(list(enumerate(turns))):  # the original last
        if i or turn % 4:
            out[i] = rot90(out[0], turn, (1, 2))


def _with_policy(bound: Bound, renderer: str) -> list[str]:
    """The streams that have a view with a policy. Raises StoreError where `renderer` or the images do not take one."""
    streams = [s.name for s in bound.plan.asked.streams if any(view.policy is not None for view in s.views)]
    for source in (bound.sources[name] for name in streams):
        if renderer == "dali" and is_encoded(source):
            raise StoreError(
                "--loader dali: a view has AutoAugment, which DALI's pipeline lacks; choose auto, turbo, ffcv or pil"
            )
        if source.channels not in CHANNELS:
            raise StoreError(f"AutoAugment wants images of 1 or 3 channels, {source.name} has {source.channels}")
    return streams


@dataclass(frozen=True)
class _Rendered:
    """A step whose crops are there: the rows of each stream beside its uint8 crops by view."""

    step: int
    room: _Slot
    streams: list[tuple[Rows, dict[str, Any]]]


class _Slot:
    """Buffers of one batch, lent until the consumer, or the copy to the GPU, has done with them."""

    def __init__(self, pinned: bool):
        self.pinned = pinned
        self.copied: torch.cuda.Event | None = None  # the end of its last copy to the GPU
        self._arrays: dict[tuple[str, str], np.ndarray] = {}

    def array(self, key: tuple[str, str], shape: tuple[int, ...], dtype: torch.dtype) -> np.ndarray:
        """The slot's array called `key`, of one dtype as long as it lives."""
        if key not in self._arrays or self._arrays[key].shape != shape:
            self._arrays[key] = torch.empty(shape, dtype=dtype, pin_memory=self.pinned).numpy()
        return self._arrays[key]


def _hand_over(batch: Batch, copied: torch.cuda.Event) -> None:
    """Make the current stream wait for the batch's copy, and the allocator for the current stream."""
    stream = torch.cuda.current_stream(batch.step.device)
    stream.wait_event(copied)
    for part in batch.parts.values():
        for tensor in (*part.x.values(), part.ids, part.labels, part.columns, part.keys, part.positions):
            if tensor is not None:
                tensor.record_stream(stream)
    batch.step.record_stream(stream)
