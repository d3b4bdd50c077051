"""The loader measured: how it is opened on this rank, a window of its batches, and the kinds of windows by itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from fastssl import dist
from fastssl.engine.job import Job
from fastssl.profiling.probes import CoreProbe, let_go
from fastssl.profiling.windows import COLD, ONE_THREAD, WARM, Found, Kind, Spent, Window, rendered_by
from loaders.loader import Bound, Loader
from loaders.store.data import DataSets
from loaders.store.source import is_encoded
from loaders.timing import PHASES

ENDLESS = 1 << 40  # steps: at the end of a loader's range there is nothing left to render beside what is finished
WARM_UP = 2  # batches of a loader's window that do not count: buffers are touched, code is compiled
WINDOW_S = 0.5  # at least, of a loader
PROBE_S = 0.1


@dataclass
class Given:
    """What is measured with on this rank, and what was found."""

    job: Job
    device: torch.device
    threads: int
    data: DataSets
    probe: CoreProbe = field(default_factory=CoreProbe)
    found: Found = field(default_factory=Found)

    @cached_property
    def files(self) -> list[Path]:
        """That images are read from."""
        return sorted({path for source in self.data.sources.values() for path in source.files()})

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


class LoaderAlone:
    """The loader while nothing else is done."""

    def __init__(self, given: Given, bound: Bound, others: bool):
        """`others`: with the other renderers, too."""
        self.given, self.bound = given, bound
        self.num_batches = 2
        first = self._window(given.threads, None)  # not kept: it compiles
        per_batch_s = np.median(first.prepare_s)
        self.num_batches = dist.broadcast_object(int(np.clip(WINDOW_S / per_batch_s, 2, 50)))
        self.kinds = self._kinds(others)

    def _kinds(self, others: bool) -> Sequence[Kind]:
        kinds = [WARM]
        if self.given.threads > 1:
            kinds.append(ONE_THREAD)
        if self.given.files:
            kinds.append(COLD)
        if others and any(is_encoded(source) for source in self.bound.sources.values()):
            known = ["turbo", "pil"]
            kinds += [rendered_by(name) for name in known if name != self.given.job.loader]
        return kinds

    def measure(self, kind: Kind) -> None:
        """One window more of this kind."""
        if kind == COLD:
            self._drop_files()
        threads = 1 if kind == ONE_THREAD else self.given.threads
        probe = self.given.probe.run(threads, PROBE_S)
        window = replace(self._window(threads, kind.renderer), probe=probe)
        self.given.found.loader.setdefault(kind, []).append(window)

    def _drop_files(self) -> None:
        dist.barrier()
        self.given.found.probes.still_cached.append(let_go(self.given.files[:1000]))

    def _window(self, threads: int, renderer: str | None) -> Window:
        """At least `num_batches` batches, after a few that do not count."""
        num = self.num_batches + WARM_UP
        with self.given.loader(self.bound, threads, renderer) as loader, closing(loader.batches(0, ENDLESS)) as batches:
            for batch in islice(batches, num):
                batch.release()
            return loader_window(loader, WARM_UP)


def loader_window(loader: Loader, skip: int) -> Window:
    """What the loader's last batches took, but for the first `skip` of them: the time in which it worked, not that in
    which it waited for somebody to take a batch."""
    history = list(loader.history)
    assert skip
    counted, plan, last, before = history[skip:], loader.bound.plan.asked, history[-1], history[skip - 1]
    totals = last.totals - before.totals
    by_stream = {s.name: s.batch_global // loader.world * len(counted) for s in plan.streams}
    return Window(
        images=by_stream[plan.epoch_of],
        by_stream=by_stream,
        prepare_s=np.diff([one.busy_s for one in history[skip - 1 :]]).tolist(),
        by_phase_s=dict(zip(PHASES, last.by_phase(before).tolist(), strict=True)),
        spent={
            name: {phase: Spent(*row) for phase, row in zip(PHASES, totals[k, :, :3].tolist(), strict=True)}
            for k, name in enumerate(by_stream)
        },
        threads=loader.threads,
    )
