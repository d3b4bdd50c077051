"""The measurements of `fastssl profile`, on every rank: windows of the same steps, in turns.

The differential method of DS-Analyzer: the step on a batch that lies ready is the ceiling; the same from host memory
adds the copy; from the loader, warm and cold, adds preparing and fetching. Every window of a kind does the same work,
for what a step uses is a function of its number; windows of different kinds alternate, so that whatever else the
machine does meets all of them alike.

Nothing is added to the hot path: a GPU's times are events, read after the window.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from torch.profiler import ProfilerActivity, record_function

from fastssl import dist
from fastssl.engine.job import Job
from fastssl.engine.stages import facts_of
from fastssl.engine.step import TrainingStep, default_how
from fastssl.errors import ConfigError
from fastssl.machine import keep_freed_memory, threads_per_rank
from fastssl.methods.base import DTYPES, Facts, Horizon, Method, Stage
from fastssl.profiling.live_memory import LiveMemory
from fastssl.profiling.probes import (
    CoreProbe,
    copy_bytes_s,
    gemm_flop_s,
    let_go,
    resident_bytes,
)
from fastssl.profiling.workload import stand_ins, usable
from fastssl.recipes.datasets import KNOWN_SETS
from loaders.batch import Batch
from loaders.loader import Bound, Loader, bind
from loaders.plan.plan import Plan
from loaders.store.data import TRAIN, open_data
from loaders.store.source import is_encoded
from loaders.timing import STAGES, stamp_s

What = Literal["loader", "step", "all"]

WARM_UP = 2  # batches of a loader's window that do not count: buffers are touched, code is compiled
WINDOW_S = 0.5  # at least, of a loader
PROBE_S = 0.1
LEAST_ROUNDS, MOST_ROUNDS = 3, 9
MOST_STEPS = 50  # of a window
CLASSES = ("statistics", "rows", "gradients")  # of messages: batch norm's, the loss's, DDP's


@dataclass(frozen=True)
class Asked:
    """What to measure. `stage` is the step's shard, `alone` the loader's, both cut from the recipe."""

    what: What
    seconds: float
    stage: Stage
    alone: Stage
    trace_to: Path | None = None


@dataclass
class Found:
    """Raw measurements of this rank, as plain values; kinds that were not measured are absent.

    loader    kind -> a window each: {"images", "wall_s", "prepare_s": [...], "stages": {stream: [[wall, cpu, stamps]]}}
    steps     kind -> a window each: {"step_s": [...], "wait_s": [...], "cpu_s"}
    """

    loader: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    steps: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    probes: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def run(job: Job, asked: Asked, keep: Callable[[list[dict[str, Any]], bool], None]) -> list[dict[str, Any]]:
    """Measure on this rank; every rank's `Found` as a dict, in rank order, on all ranks. `keep(found, complete)` is
    called on the main rank after each round, for what a profile that is interrupted leaves behind."""
    threads = threads_per_rank()
    torch.set_num_threads(threads)
    device = torch.device(job.device, dist.local_rank()) if job.device == "cuda" else torch.device("cpu")
    if device.type == "cpu":
        keep_freed_memory()
    measuring = _Measuring(job, asked, device, threads)
    for _ in measuring.rounds():
        everyone = dist.gather_objects(vars(measuring.found))
        if dist.is_main():
            keep(everyone, False)
    everyone = dist.gather_objects(vars(measuring.found))
    if dist.is_main():
        keep(everyone, True)
    return everyone


class _Measuring:
    def __init__(self, job: Job, asked: Asked, device: torch.device, threads: int):
        self.job, self.asked, self.device, self.threads = job, asked, device, threads
        self.begin = time.monotonic()
        self.found = Found()
        given = open_data(job.data) if job.data else None
        plans = [_plan(stage) for stage in (asked.stage, asked.alone)]
        sources = dict(given.sources) if given else {TRAIN: stand_ins(asked.stage.method)}
        self.data = usable(sources, plans)
        self.facts = facts_of(self.data, 0)
        self.files = sorted({path for source in self.data.sources.values() for path in source.files()})
        self.probe = CoreProbe()

    def rounds(self) -> Iterator[None]:
        """Measure, a bit at a time, until the time is over."""
        found, what = self.found, self.asked.what
        found.probes["stamp_s"] = stamp_s()
        kinds: list[Callable[[], None]] = []
        if what in ("loader", "all"):
            alone = bind(self.asked.alone.method.build(self.facts, {}).plan(), self.data)
            kinds += self._loader_kinds(alone)
        if what in ("step", "all"):
            precision = self.asked.stage.method.precision
            found.probes |= {
                "flop_s": gemm_flop_s(self.device, DTYPES[precision]),
                "copy_bytes_s": copy_bytes_s(self.device),
                "precision": precision,
            }
            stepping = _Stepping(self)
            kinds += stepping.kinds()
        yield
        done, self.rounds_begin = 0, time.monotonic()
        while dist.broadcast_object(self._goes_on(done)):
            found.probes.setdefault("rounds", []).append(vars(self.probe.run(self.threads, PROBE_S)))
            for measure in kinds:
                measure()
            done += 1
            yield
        found.counts["resident_bytes"], found.counts["most_resident_bytes"] = resident_bytes()
        if what in ("step", "all") and self.asked.trace_to is not None:
            stepping.trace(self.asked.trace_to)

    def _goes_on(self, done: int) -> bool:
        spent_s = time.monotonic() - self.begin
        another_s = (time.monotonic() - self.rounds_begin) / max(1, done)
        return done < MOST_ROUNDS and (done == 0 or spent_s + another_s < self.asked.seconds or done < LEAST_ROUNDS
                                       and spent_s < 2 * self.asked.seconds)  # fmt: skip

    # ------------------------------------------------------------------------------------------------- the loader

    def _loader_kinds(self, alone: Bound) -> list[Callable[[], None]]:
        self.batches = 2

        def window(
            kind: str, threads: int, before: Callable[[], None] = lambda: None, renderer: str = self.job.loader
        ) -> Callable[[], None]:
            def measure() -> None:
                before()
                probe = self.probe.run(threads, PROBE_S)
                one = self._loader_window(alone, threads, renderer)
                one["probe"] = vars(probe)
                self.found.loader.setdefault(kind, []).append(one)

            return measure

        first = self._loader_window(alone, self.threads, self.job.loader)  # not kept: it compiles
        per_batch_s = np.median(first["prepare_s"])
        self.batches = dist.broadcast_object(int(np.clip(WINDOW_S / per_batch_s, 2, 50)))
        kinds = [window("warm", self.threads)]
        if self.threads > 1:
            kinds.append(window("one thread", 1))
        if self.files:
            kinds.append(window("cold", self.threads, self._drop))
        if self.asked.what == "loader" and any(is_encoded(source) for source in alone.sources.values()):
            others = ["pil", "ffcv"] if find_spec("ffcv") else ["pil"]
            kinds += [window(f"as {name}", self.threads, renderer=name) for name in others if name != self.job.loader]
        return kinds

    def _drop(self) -> None:
        dist.barrier()
        kept = let_go(self.files[:1000])
        self.found.probes.setdefault("still_cached", []).append(kept)

    def _loader_window(self, bound: Bound, threads: int, renderer: str) -> dict[str, Any]:
        """`self.batches` batches of the loader alone, after a few that do not count."""
        num = self.batches + WARM_UP
        with self.loader(bound, threads, renderer) as loader, closing(loader.batches(0, num)) as batches:
            for batch in batches:
                batch.release()
            return loader_window(loader, WARM_UP)

    def loader(self, bound: Bound, threads: int, renderer: str | None = None) -> Loader:
        return Loader(
            bound,
            rank=dist.rank(),
            world=dist.world_size(),
            device=self.device,
            threads=threads,
            renderer=renderer or self.job.loader,
            cache_bytes=int(self.job.cache_gib * 2**30),
        )


def loader_window(loader: Loader, skip: int) -> dict[str, Any]:
    """What the loader's last batches took, but for the first `skip` of them: the time in which it worked, not that in
    which it waited for somebody to take a batch."""
    history = list(loader.history)
    assert skip
    counted, plan, last, before = history[skip:], loader.bound.plan.plan, history[-1], history[skip - 1]
    totals = last.totals - before.totals
    streams = [stream.name for stream in plan.streams]
    per_rank = {s.name: s.batch_global // loader.world for s in plan.streams}
    return {
        "images": per_rank[plan.epoch_of] * len(counted),
        "images_by_stream": {name: n * len(counted) for name, n in per_rank.items()},
        "wall_s": sum(one.wall_s for one in counted),
        "prepare_s": [one.wall_s for one in counted],
        "by_stage_s": dict(zip(STAGES, last.by_stage(before).tolist(), strict=True)),
        "threads": loader.threads,
        "stages": {name: dict(zip(STAGES, totals[k].tolist(), strict=True)) for k, name in enumerate(streams)},
    }


# ------------------------------------------------------------------------------------------------------------ the step


class _Stepping:
    """The step, its batch and its loader on this rank."""

    def __init__(self, measuring: _Measuring):
        self.m = measuring
        stage, device = measuring.asked.stage, measuring.device
        torch.manual_seed(0)
        self.method: Method = stage.method.build(measuring.facts, {})
        self.bound = bind(self.method.plan(), measuring.data)
        self.horizon = Horizon(1000, 100_000)  # the rate hardly moves
        nets = self.method.nets()
        for name, module in nets.modules().items():
            module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            module.train(name != "frozen")
        how = measuring.job.how or default_how(device)
        self.step = TrainingStep(stage, how, self.method, nets, self.method.optimizer(nets), device)
        self.number = 0
        self.host = self._first_batch()
        self.fixed = self.host.to(device)
        if self.step.must_prepare:
            self.step.prepare(self.fixed, measuring.found.notes.append)
        first_s, usual_s = self._timed_step(), self._timed_step()
        measuring.found.counts |= {"how": self.step.how, "first_step_s": first_s}
        self.num_steps = dist.broadcast_object(int(np.clip(WINDOW_S * 2 / usual_s, 1, MOST_STEPS)))
        self._count()

    def kinds(self) -> list[Callable[[], None]]:
        kinds = [lambda: self._window("synthetic", self._fixed_batches)]
        if self.m.device.type == "cuda":
            kinds.append(lambda: self._window("cached", self._copied_batches))
        if self.m.asked.what == "all":
            kinds.append(lambda: self._window("full", self._loaded_batches))
        if dist.world_size() > 1 and self.step.how.startswith("eager"):
            kinds += [lambda c=c: self._window(f"without {c}", self._fixed_batches, c) for c in CLASSES]  # type: ignore[misc]
        return kinds

    def _first_batch(self) -> Batch:
        """A batch of real pixels on the host, not the loader's to write into again."""
        with (
            Loader(
                self.bound,
                rank=dist.rank(),
                world=dist.world_size(),
                threads=self.m.threads,
                renderer=self.m.job.loader,
            ) as loader,
            closing(loader.batches(0, 1)) as batches,
        ):
            return next(batches)  # its slot is never given back

    def _do(self, batch: Batch) -> None:
        self.step(self.number, self.horizon, batch)
        self.number += 1

    def _timed_step(self) -> float:
        begin = time.perf_counter()
        self._do(self.fixed)
        if self.m.device.type == "cuda":
            torch.cuda.synchronize(self.m.device)
        return time.perf_counter() - begin

    # ------------------------------------------------------------------------------------------------- windows

    def _window(self, kind: str, batches_of: Callable[[int], Iterator[Batch]], without: str | None = None) -> None:
        dist.barrier()
        silenced = silent(without, self.step) if without else nullcontext()
        with silenced, closing(batches_of(self.num_steps)) as batches:  # type: ignore[type-var]
            self.m.found.steps.setdefault(kind, []).append(self._steps_of(batches))

    def _steps_of(self, batches: Iterator[Batch]) -> dict[str, Any]:
        clock = _DeviceClock(self.m.device)
        waits_s, cpu_s = [], time.process_time()
        clock.mark()
        while True:
            begin = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                break
            waits_s.append(time.perf_counter() - begin)
            self._do(batch)
            batch.release()
            clock.mark()
        return {"step_s": clock.between(), "wait_s": waits_s, "cpu_s": time.process_time() - cpu_s}

    def _fixed_batches(self, count: int) -> Iterator[Batch]:
        for _ in range(count):
            yield self.fixed

    def _copied_batches(self, count: int) -> Iterator[Batch]:
        for _ in range(count):
            yield self.host.to(self.m.device)

    def _loaded_batches(self, count: int) -> Iterator[Batch]:
        """From the loader in full flight. Where the step binds, its queue is full; where the loader binds it is empty,
        and what lies in it before the window begins is let go."""
        with self.m.loader(self.bound, self.m.threads) as loader:
            with closing(loader.batches(0, 1 + loader.prefetch + count)) as batches:
                next(batches).release()
                while len(loader.history) <= loader.prefetch:
                    time.sleep(0.002)
                prepare_s = np.median([one.wall_s for one in loader.history])
                if prepare_s > np.median(self.m.found.steps["synthetic"][-1]["step_s"]):
                    for _ in range(loader.prefetch):
                        next(batches).release()
                yield from islice(batches, count)
            self.m.found.loader.setdefault("beside the step", []).append(loader_window(loader, 1))

    # ------------------------------------------------------------------------------------------------- counts

    def _count(self) -> None:
        """Operators that reach a kernel, waits of the host, and memory, in one step."""
        counts, device = self.m.found.counts, self.m.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profile:
                    self._do(self.fixed)
                torch.cuda.set_sync_debug_mode("default")
            launches = [e for e in profile.events() if e.name.startswith(("cudaLaunchKernel", "cuLaunchKernel"))]
            counts["launches"] = len(launches)
            counts["host_syncs"] = sum("synchronizing" in str(w.message) for w in caught)
            counts["peak_bytes"] = torch.cuda.max_memory_allocated(device)
            return
        if not self.step.how.startswith("eager"):
            return
        with LiveMemory() as memory:
            self._do(self.fixed)
        counts["dispatches"] = sum(memory.calls.values())
        counts["host_syncs"] = memory.calls[torch.ops.aten._local_scalar_dense.default]
        counts["peak_bytes"] = memory.peak

    def trace(self, path: Path) -> None:
        """torch's own profiler over three steps from the loader, our ranges named; rank 0's goes to `path`."""
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.m.device.type == "cuda")
        loss, update = self.method.loss, self.step.optimizer.step

        def named(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def ranged(*args: Any, **kwargs: Any) -> Any:
                with record_function(f"fastssl: {name}"):
                    return call(*args, **kwargs)

            return ranged

        with (
            patch.object(self.method, "loss", named("loss", loss)),
            patch.object(self.step.optimizer, "step", named("update", update)),
            torch.profiler.profile(activities=activities) as profile,
            self.m.loader(self.bound, self.m.threads) as loader,
            closing(loader.batches(0, 3)) as batches,
        ):
            for _ in range(3):
                with record_function("fastssl: wait for batch"):
                    batch = next(batches)
                with record_function("fastssl: step"):
                    self._do(batch)
                batch.release()
        if dist.is_main():
            profile.export_chrome_trace(str(path))


class _DeviceClock:
    """Times between marks in the device's own order; on a GPU events, which are read once the window is over."""

    def __init__(self, device: torch.device):
        self.device, self.marks = device, []  # type: tuple[torch.device, list[Any]]

    def mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def between(self) -> list[float]:
        """Seconds from each mark to the next. Waits for the device."""
        pairs = list(zip(self.marks, self.marks[1:], strict=False))
        if self.device.type != "cuda":
            return [b - a for a, b in pairs]
        torch.cuda.synchronize(self.device)
        return [a.elapsed_time(b) / 1000 for a, b in pairs]


@contextmanager
def silent(which: str, step: TrainingStep) -> Iterator[None]:
    """The step without one class of messages: each rank goes on with its own numbers, of the shapes that it would have
    got. What it computes is wrong, how long the rest takes is right."""
    world = dist.world_size()
    if which == "gradients":
        with step._trained.online.no_sync():
            yield
    elif which == "statistics":
        own, summed = dist.statistics_group().group_name, dist.sum_over_group
        with patch.object(dist, "sum_over_group", lambda x, group: x.clone() if group == own else summed(x, group)):
            yield
    elif which == "rows":
        own, summed = dist.statistics_group().group_name, dist.sum_over_group
        with (
            patch.object(dist, "_all_gather", lambda x: x.repeat(world, *[1] * (x.dim() - 1))),
            patch.object(dist, "_reduce_scatter", lambda x: x[: len(x) // world].clone()),
            patch.object(dist, "sum_over_group", lambda x, group: summed(x, group) if group == own else x * world),
        ):
            yield
    else:
        raise ConfigError(f"no messages are called {which!r}")


def _plan(stage: Stage) -> Plan:
    known = KNOWN_SETS[stage.method.dataset]
    return stage.method.build(Facts(known.num_classes, known.channels, 0), {}).plan()
