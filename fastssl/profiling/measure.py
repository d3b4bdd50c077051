"""The measurements of `fastssl profile`, on every rank: windows of the same steps, in turns.

The differential method of DS-Analyzer: the step on a batch that lies ready is the ceiling; the same from host memory
adds the copy; from the loader, warm and cold, adds preparing and fetching. Every window of a kind does the same work,
for what a step uses is a function of its number; windows of different kinds alternate, so that whatever else the
machine does meets all of them alike.

Nothing is added to the hot path: a GPU's times are events, read after the window.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fastssl import dist
from fastssl.engine.job import Job
from fastssl.engine.join import facts_of
from fastssl.machine import keep_freed_memory, threads_per_rank
from fastssl.methods.base import DTYPES, Facts, Stage
from fastssl.profiling.loading import PROBE_S, Given, LoaderAlone
from fastssl.profiling.probes import copy_bytes_s, gemm_flop_s, most_resident_bytes
from fastssl.profiling.stepping import Stepping
from fastssl.profiling.windows import Found
from fastssl.profiling.workload import stand_ins, usable
from fastssl.recipes.datasets import KNOWN_SETS
from loaders.loader import bind
from loaders.plan.plan import Plan
from loaders.store.data import TRAIN, open_data
from loaders.timing import stamp_s

What = Literal["loader", "step", "all"]

LEAST_ROUNDS, MOST_ROUNDS = 3, 9


@dataclass(frozen=True)
class Asked:
    """What to measure. `stage` is the step's shard, `alone` the loader's, both cut from the recipe."""

    what: What
    seconds: float
    stage: Stage
    alone: Stage
    trace_to: Path | None = None


def run(job: Job, asked: Asked, keep: Callable[[list[Found], bool], None]) -> None:
    """Measure on this rank. `keep(found, complete)`, what every rank has found in rank order, is called on the main
    rank after each round, for what a profile that is interrupted leaves behind."""
    threads = threads_per_rank()
    torch.set_num_threads(threads)
    device = torch.device("cuda", dist.local_gpu()) if job.device == "cuda" else torch.device("cpu")
    if device.type == "cpu":
        keep_freed_memory()
    measuring = _Measuring(job, asked, device, threads)
    for complete in measuring.rounds():
        everyone = dist.gather_objects(measuring.given.found)
        if dist.is_main():
            keep(everyone, complete)


class _Measuring:
    def __init__(self, job: Job, asked: Asked, device: torch.device, threads: int):
        self.begin = time.monotonic()
        self.asked = asked
        data = open_data(job.data) if job.data else None
        sources = dict(data.sources) if data else {TRAIN: stand_ins(asked.stage.config)}
        given = usable(sources, [_plan(stage) for stage in (asked.stage, asked.alone)])
        self.given, self.facts = Given(job, device, threads, given), facts_of(given, 0)

    def rounds(self) -> Iterator[bool]:
        """Measure, a bit at a time, until the time is over; True at the end."""
        given, what = self.given, self.asked.what
        given.found.probes.stamp_s = stamp_s()
        alone = [self._alone()] if what in ("loader", "all") else []
        stepping = [self._stepping()] if what in ("step", "all") else []
        parts: list[LoaderAlone | Stepping] = [*alone, *stepping]
        yield False
        done, self.rounds_begin = 0, time.monotonic()
        while dist.broadcast_object(self._goes_on(done)):
            given.found.probes.rounds.append(given.probe.run(given.threads, PROBE_S))
            for part in parts:
                for kind in part.kinds:
                    part.measure(kind)
            done += 1
            yield False
        given.found.counts.most_resident_bytes = most_resident_bytes()
        if stepping and self.asked.trace_to is not None:
            stepping[0].trace(self.asked.trace_to)
        yield True

    def _alone(self) -> LoaderAlone:
        bound = bind(self.asked.alone.config.build(self.facts, {}).plan(), self.given.data)
        return LoaderAlone(self.given, bound, others=self.asked.what == "loader")

    def _stepping(self) -> Stepping:
        probes, stage = self.given.found.probes, self.asked.stage
        probes.flop_s = gemm_flop_s(self.given.device, DTYPES[stage.config.precision])
        probes.copy_bytes_s = copy_bytes_s(self.given.device)
        return Stepping(self.given, stage, self.facts, beside_loader=self.asked.what == "all")

    def _goes_on(self, done: int) -> bool:
        spent_s = time.monotonic() - self.begin
        another_s = (time.monotonic() - self.rounds_begin) / max(1, done)
        return done < MOST_ROUNDS and (done == 0 or spent_s + another_s < self.asked.seconds or done < LEAST_ROUNDS
                                       and spent_s < 2 * self.asked.seconds)  # fmt: skip


def _plan(stage: Stage) -> Plan:
    known = KNOWN_SETS[stage.config.dataset]
    return stage.config.build(Facts(known.num_classes, known.channels, 0), {}).plan()
