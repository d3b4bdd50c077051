"""Holds the profiler's predictions against runs: what `fastssl profile` says of a loader, beside what the loader does.

    python -m tools.profile_evidence [--data DIR] [--rounds N] [CHECK ...]     (DIR: $FASTSSL_TEST_DATA/imagenet-sample)

Every check alternates its windows, so that whatever else the machine does meets all of them alike; each prints what was
said, what was true and how far apart they are. On a busy machine the cores of a prediction are those that a probe gets
beside each window.

cores     the loader with one thread, and a probe of fixed work, predict the loader with two: within 15 %
sleeps    a sleep in fetch, decode or finish, the loader binding: blamed on its stage, within 2 points and the spread
prefetch  prepare and step times, seen at depths 1 and 2, predict depth 4 of a loader in bursts: within 10 %
disk      the bytes a second of a throttled source, read alone, predict the loader's rate: within 10 %
overhead  the loader with and without counting stages (compiled code reads its clocks either way): CPU below 1 %
baseline  profiles of an unchanged loader do not fire, one with a finish that takes 15 % longer does
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from fastssl.costs import whatif
from fastssl.methods.paws import GLOBAL_VIEW, SMALL_VIEW
from fastssl.profiling import baseline
from fastssl.profiling.loading import loader_window
from fastssl.profiling.probes import CoreProbe
from fastssl.profiling.windows import Window
from fastssl.profiling.workload import Cycled
from loaders.finish import numba_cpu
from loaders.loader import Bound, Loader, bind
from loaders.plan.plan import Plan
from loaders.plan.views import Shuffled, Stream
from loaders.renderers import pil
from loaders.store.data import DataSets
from loaders.store.folder import FolderSource
from loaders.timing import PHASES, PhaseTimes

BATCH, BATCHES, SKIP = 32, 8, 2


class Source(Cycled):
    """The sample's images, from which reading an image may take time or bytes a second may be few."""

    pause_s = 0.0
    bytes_s = float("inf")

    def __init__(self, folder: Path):
        super().__init__(FolderSource(folder), 4096, 10)
        self._disk, self._free_at = threading.Lock(), 0.0

    def jpeg(self, i: int) -> bytes:
        file = super().jpeg(i)
        if self.pause_s:
            time.sleep(self.pause_s)
        if self.bytes_s != float("inf"):
            with self._disk:  # one reader after the other, as a disk at its limit
                self._free_at = max(self._free_at, time.perf_counter()) + len(file) / self.bytes_s
            time.sleep(max(0.0, self._free_at - time.perf_counter()))
        return file


@dataclass
class Bench:
    source: Source
    bound: Bound
    rounds: int
    probe: CoreProbe

    def window(self, threads: int = 2, renderer: str = "ffcv") -> Window:
        with Loader(self.bound, renderer=renderer, threads=threads) as loader:
            with closing(loader.batches(0, SKIP + BATCHES)) as batches:
                for batch in batches:
                    batch.release()
            return loader_window(loader, SKIP)


def cpu_s(window: Window, phase: str) -> float:
    """For an image."""
    return sum(of[phase].cpu_s for of in window.spent.values()) / window.images


def cpu_s_an_image(window: Window) -> float:
    return sum(cpu_s(window, phase) for phase in PHASES)


def cost_of(window: Window, bytes_read: float = 0.0) -> whatif.LoaderCost:
    serial_s, finish_s = cpu_s(window, "plan"), cpu_s(window, "finish")
    return whatif.LoaderCost(cpu_s_an_image(window), serial_s, bytes_read, finish_s=finish_s, batch=BATCH)


def show(what: str, said: list[float], true: list[float]) -> None:
    errors = [s / t - 1 for s, t in zip(said, true, strict=True)]
    print(
        f"{what}: said {median(said):.1f}, true {median(true):.1f} images/s; {median(said) / median(true) - 1:+.1%}; "
        f"a window {min(errors):+.1%} to {max(errors):+.1%}"
    )


def cores(bench: Bench) -> None:
    said, true = [], []
    bench.window()
    for _ in range(bench.rounds):
        one, alone = bench.probe.run(1, 0.3), bench.window(threads=1)
        before = bench.probe.run(2, 0.3)
        two = bench.window(threads=2)
        after = bench.probe.run(2, 0.3)
        got = (before.calls_per_s + after.calls_per_s) / 2 * one.cpu_s_per_call  # cores' worth of work
        said.append(cost_of(alone).images_per_s(got)[0])
        true.append(two.images_per_s)
    show("two cores from one", said, true)


@contextmanager
def slower(stage: str, pause_s: float, source: Source) -> Iterator[None]:
    opened, driven = pil.open_image, numba_cpu._drive

    def open_slowly(file: Any) -> Any:
        time.sleep(pause_s * (stage == "decode"))
        return opened(file)

    def drive_slowly(crops: Any, *rest: Any) -> None:
        time.sleep(pause_s * len(crops) * (stage == "finish"))
        driven(crops, *rest)

    source.pause_s = pause_s * (stage == "fetch")
    with patch.object(pil, "open_image", open_slowly), patch.object(numba_cpu, "_drive", drive_slowly):
        yield
    source.pause_s = 0.0


def sleeps(bench: Bench) -> None:
    bench.window(renderer="pil")
    # About half of the time: after pauses of 20 ms cores were so cold that the stages that do not sleep took up to 40 %
    # longer, which is rightly blamed on them. A finish has eight crops an image.
    for stage, pause_s in (("fetch", 0.003), ("decode", 0.003), ("finish", 0.0004)):
        truths, blamed = [], {name: [] for name in PHASES}  # type: tuple[list[float], dict[str, list[float]]]
        for _ in range(bench.rounds):
            short = bench.window(renderer="pil")
            with slower(stage, pause_s, bench.source):
                long = bench.window(renderer="pil")
            truths.append(1 - short.wall_s / long.wall_s)
            for name in PHASES:
                blamed[name].append((long.by_phase_s[name] - short.by_phase_s[name]) / long.wall_s)
        spread = (max(truths) - min(truths)) / 2
        others = ", ".join(f"{name} {100 * median(blamed[name]):+.1f}" for name in PHASES if name != stage)
        print(
            f"sleep in {stage}: blamed {100 * median(blamed[stage]):.1f} points, true {100 * median(truths):.1f} "
            f"± {100 * spread:.1f}; others {others}"
        )


def prefetch(bench: Bench) -> None:
    """Every sixth batch reads slowly; the step sleeps."""
    plan, source, step_s = bench.bound.plan, bench.source, 0.25
    rows, count = plan.rows, 36

    def bursts(stream: str, step: int, *rest: Any) -> Any:
        source.pause_s = 0.04 if step % 6 == 0 else 0.0
        return rows(stream, step, *rest)

    def run(depth: int) -> tuple[float, list[float]]:
        with Loader(bench.bound, prefetch=depth) as loader, closing(loader.batches(0, count)) as batches:
            next(batches).release()
            begin = time.perf_counter()
            for batch in batches:
                time.sleep(step_s)
                batch.release()
            return (count - 1) / (time.perf_counter() - begin), [one.wall_s for one in loader.history]

    said, true = [], []
    with patch.object(plan, "rows", bursts):
        for _ in range(max(1, bench.rounds // 2)):
            seen = {depth: run(depth) for depth in (1, 2, 4)}
            prepare_s = seen[1][1] + seen[2][1]
            predicted = {depth: whatif.simulate(prepare_s, [step_s], depth) for depth in (1, 2, 4)}
            said.append(predicted[4] * median(seen[d][0] / predicted[d] for d in (1, 2)) * BATCH)
            true.append(seen[4][0] * BATCH)
    source.pause_s = 0.0
    show("depth 4 from depths 1 and 2", said, true)


def disk(bench: Bench) -> None:
    """The disk's rate is what a reader alone gets of it, as any probe of a disk would find it."""
    bench.window()
    source = bench.source
    files = [len(source.jpeg(i)) for i in range(250)]
    mean_bytes = sum(files) / len(files)
    sizes = tuple(file / mean_bytes for file in files)
    for share in (0.25, 0.5, 0.75):
        said, true = [], []
        for _ in range(bench.rounds):
            free = bench.window()
            source.bytes_s = share * free.images_per_s * mean_bytes
            begin = time.perf_counter()
            disk_bytes_s = sum(len(source.jpeg(i)) for i in range(64)) / (time.perf_counter() - begin)
            cost = replace(cost_of(free), bytes_read=mean_bytes, sizes=sizes)
            got = cost.cpu_s * free.images_per_s  # the cores it had
            said.append(cost.images_per_s(got, disk_bytes_s, threads=2)[0])
            true.append(bench.window().images_per_s)
            source.bytes_s = float("inf")
        show(f"a disk of {share:.0%} of what the loader takes", said, true)


def overhead(bench: Bench) -> None:
    def silent(self: PhaseTimes, stage: int, since: Any) -> Any:
        return since

    bench.window()
    ratios = []
    for k in range(2 * bench.rounds):
        spent: dict[bool, float] = {}
        for timed in (True, False) if k % 2 else (False, True):
            without = nullcontext() if timed else patch.object(PhaseTimes, "add", silent)
            with without:
                begin = time.process_time()
                bench.window()
                spent[timed] = time.process_time() - begin
        ratios.append(spent[True] / spent[False] - 1)
    print(f"overhead of stage timing: {median(ratios):+.2%} of CPU; windows {min(ratios):+.1%} to {max(ratios):+.1%}")


def baselines(bench: Bench) -> None:
    def kept(slow: bool) -> dict[str, Any]:
        values: dict[str, list[float]] = {}
        speed = []
        for _ in range(bench.rounds):
            speed.append(bench.probe.run(2, 0.1).cpu_s_per_call)
            with slow_finish() if slow else nullcontext():
                window = bench.window()
            for stage in PHASES:
                values.setdefault(stage, []).append(cpu_s(window, stage))
        noise = {"speed": speed, "cpu": values, "wall": {}, "counts": {}}
        return {"noise": noise, "machine": {"quiet": False}}

    @contextmanager
    def slow_finish() -> Iterator[None]:
        driven = numba_cpu._drive

        def drive(*arguments: Any) -> None:
            begin = time.thread_time()
            driven(*arguments)
            until = time.thread_time() + 0.15 * (time.thread_time() - begin)
            while time.thread_time() < until:
                pass

        with patch.object(numba_cpu, "_drive", drive):
            yield

    bench.window()
    first = kept(False)
    for k in range(10):
        changes = baseline.compare(first, kept(False))
        fires = "FIRES: " if any(change.is_regression for change in changes) else ""
        print(f"unchanged {k + 1}: {fires}{'; '.join(map(str, changes))}")
    changes = baseline.compare(first, kept(True))
    caught = "caught" if any(change.is_regression for change in changes) else "NOT CAUGHT"
    print(f"finish 15 % slower: {caught}: {'; '.join(map(str, changes))}")


CHECKS: dict[str, Callable[[Bench], None]] = {
    "cores": cores, "sleeps": sleeps, "prefetch": prefetch, "disk": disk, "overhead": overhead, "baseline": baselines,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=", ".join(CHECKS))
    arguments = parser.parse_args()
    folder = arguments.data or Path(os.environ["FASTSSL_TEST_DATA"]) / "imagenet-sample"
    stream = Stream("unlabelled", "train", (GLOBAL_VIEW, SMALL_VIEW), Shuffled(), BATCH)
    source = Source(folder)
    bound = bind(Plan((stream,), "unlabelled", 0), DataSets({"train": source}))
    bench = Bench(source, bound, arguments.rounds, CoreProbe())
    for name in arguments.checks or CHECKS:
        begin = time.monotonic()
        CHECKS[name](bench)
        print(f"  ({name}: {time.monotonic() - begin:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
