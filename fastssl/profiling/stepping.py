"""The step measured: on a batch that lies ready, on one that is copied, from the loader, and without messages."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.profiler import ProfilerActivity, record_function

from fastssl import dist
from fastssl.engine.step import TrainingStep, default_how
from fastssl.methods.base import Facts, Horizon, Method, Stage
from fastssl.profiling.live_memory import LiveMemory
from fastssl.profiling.loading import ENDLESS, WINDOW_S, Given, loader_window
from fastssl.profiling.windows import (
    BESIDE_THE_STEP,
    CLASSES,
    COPIED,
    LOADED,
    READY,
    Kind,
    Messages,
    StepWindow,
    without,
)
from loaders.batch import Batch
from loaders.loader import NUM_KEPT, Loader, bind

MOST_STEPS = 50  # of a window


class Stepping:
    """The step, its batch and its loader on this rank."""

    def __init__(self, given: Given, stage: Stage, facts: Facts, beside_loader: bool):
        """`beside_loader`: with batches from the loader, too."""
        self.given, device = given, given.device
        torch.manual_seed(0)
        self.method: Method[Any, Any] = stage.config.build(facts, {})
        self.bound = bind(self.method.plan(), given.data)
        self.horizon = Horizon(1000, 100_000)  # the rate hardly moves
        nets = self.method.nets()
        for name, module in nets.modules().items():
            module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            module.train(name != "frozen")
        how = given.job.how or default_how(device)
        self.step = TrainingStep(stage, how, self.method, nets, self.method.optimizer(nets), device)
        self.number = 0
        self.fixed = self._first_batch().to(device)
        if self.step.must_prepare:
            self.step.prepare(self.fixed, given.found.notes.append)
        first_s, usual_s = self._timed_step(), self._timed_step()
        given.found.counts.how, given.found.counts.first_step_s = self.step.how, first_s
        self.num_steps = dist.broadcast_object(int(np.clip(WINDOW_S * 2 / usual_s, 1, MOST_STEPS)))
        self._count()
        self.kinds = self._kinds(beside_loader)

    def _kinds(self, beside_loader: bool) -> Sequence[Kind]:
        kinds = [READY]
        if self.given.device.type == "cuda":
            kinds.append(COPIED)
        if beside_loader:
            kinds.append(LOADED)
        if dist.world_size() > 1 and self.step.how.startswith("eager"):
            kinds += map(without, CLASSES)
        return kinds

    def _first_batch(self) -> Batch:
        """A batch of real pixels on the host, not the loader's to write into again."""
        with (
            Loader(
                self.bound,
                rank=dist.rank(),
                world=dist.world_size(),
                threads=self.given.threads,
                renderer=self.given.job.loader,
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
        if self.given.device.type == "cuda":
            torch.cuda.synchronize(self.given.device)
        return time.perf_counter() - begin

    # ------------------------------------------------------------------------------------------------- windows

    def measure(self, kind: Kind) -> None:
        """One window more of this kind."""
        dist.barrier()
        batches_of = {COPIED: self._copied_batches, LOADED: self._loaded_batches}.get(kind, self._fixed_batches)
        with self._silenced(kind.silenced), closing(batches_of(self.num_steps)) as batches:
            self.given.found.steps.setdefault(kind, []).append(self._steps_of(batches))

    def _silenced(self, messages: Messages | None) -> AbstractContextManager[None]:
        """The step without one class of messages: each rank goes on with its own numbers, of the shapes that it would
        have got. What it computes is wrong, how long the rest takes is right."""
        if messages is None:
            return nullcontext()
        return self.step.without_averaging() if messages == "gradients" else dist.silenced(messages)

    def _steps_of(self, batches: Iterator[Batch]) -> StepWindow:
        clock = _DeviceClock(self.given.device)
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
        return StepWindow(clock.between(), waits_s, time.process_time() - cpu_s)

    def _fixed_batches(self, count: int) -> Generator[Batch]:
        for _ in range(count):
            yield self.fixed

    def _copied_batches(self, count: int) -> Generator[Batch]:
        """As the loader copies and finishes them, from pixels that are there: bytes from pinned memory, not floats."""
        with self.given.loader(self.bound, self.given.threads) as loader:
            loader.keep_rendered()
            with closing(loader.batches(0, NUM_KEPT + count)) as batches:
                for batch in islice(batches, NUM_KEPT):
                    batch.release()
                yield from batches

    def _loaded_batches(self, count: int) -> Generator[Batch]:
        """From the loader in full flight. Where the step binds, its queue is full; where the loader binds it is empty,
        and what lies in it before the window begins is let go."""
        with self.given.loader(self.bound, self.given.threads) as loader:
            with closing(loader.batches(0, ENDLESS)) as batches:
                next(batches).release()
                while len(loader.history) <= loader.prefetch:
                    time.sleep(0.002)
                prepare_s = np.median(np.diff([one.busy_s for one in loader.history]))
                if prepare_s > np.median(self.given.found.steps[READY][-1].step_s):
                    for _ in range(loader.prefetch):
                        next(batches).release()
                yield from islice(batches, count)
            self.given.found.loader.setdefault(BESIDE_THE_STEP, []).append(loader_window(loader, 1))

    # ------------------------------------------------------------------------------------------------- counts

    def _count(self) -> None:
        """Operators that reach a kernel, waits of the host, and memory, in one step."""
        counts, device = self.given.found.counts, self.given.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profile:
                    self._do(self.fixed)
                torch.cuda.set_sync_debug_mode("default")
            launches = [e for e in profile.events() if e.name.startswith(("cudaLaunchKernel", "cuLaunchKernel"))]
            counts.launches = len(launches)
            counts.host_syncs = sum("synchronizing" in str(w.message) for w in caught)
            counts.peak_bytes = torch.cuda.max_memory_allocated(device)
            return
        if not self.step.how.startswith("eager"):
            return
        with LiveMemory() as memory:
            self._do(self.fixed)
        counts.dispatches = sum(memory.calls.values())
        counts.host_syncs = memory.calls[torch.ops.aten._local_scalar_dense.default]
        counts.peak_bytes = memory.peak

    def trace(self, path: Path) -> None:
        """torch's own profiler over three steps from the loader, our ranges named; rank 0's goes to `path`."""
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.given.device.type == "cuda")
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
            self.given.loader(self.bound, self.given.threads) as loader,
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
