"""From raw windows to what a profile says: rates, shares, what binds, and what other machines would do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from statistics import median, quantiles
from typing import Any

from fastssl.costs import whatif
from fastssl.costs.cost import StepCost, ring_bytes
from fastssl.profiling.before import Before
from fastssl.profiling.figures import (
    Binding,
    Figures,
    LoaderFigures,
    Machine,
    Memory,
    Noise,
    Phase,
    Sent,
    Spread,
    Stall,
    StepFigures,
)
from fastssl.profiling.loader_cost import cpu_s_of, loader_cost, stores_of, wall_s_of
from fastssl.profiling.windows import (
    BESIDE_THE_STEP,
    CLASSES,
    COLD,
    COPIED,
    LOADED,
    ONE_THREAD,
    READY,
    WARM,
    Found,
    Kind,
    Messages,
    Probes,
    Window,
    all_step_s,
    without,
)
from fastssl.recipes.datasets import KNOWN_SETS
from loaders.timing import PHASES

FORMAT = 1  # of profile.json
DECODED_BYTES = 607e3  # of an ImageNet photograph on average
BUSY = 0.1  # of the time in which threads could run, that they waited for a core: wall times say little beyond it
CACHES_GIB = (1, 16, 128)
DDP_BUCKET_BYTES = 25 << 20  # torch's default


def summarise(before: Before, everyone: Sequence[Found], complete: bool) -> dict[str, Any]:
    """The profile, as JSON has it. `everyone`: what each rank found."""
    return asdict(figures(before, everyone, complete))


def figures(before: Before, everyone: Sequence[Found], complete: bool) -> Figures:
    """The same, field by field."""
    main = everyone[0]
    loader = _loader(before, everyone) if WARM in main.loader else None
    step = _step(before, everyone) if READY in main.steps else None
    cost = loader_cost(before, main.loader[WARM]) if loader else None
    binding = _binding(loader, step, cost)
    full_s = step.full_s if step else None
    stall = _stall(everyone) if full_s else None
    rate = before.batch_global / full_s if full_s else _rate_without_full(loader, step)
    equivalents = before.cost.image_equivalents / before.batch_global if before.cost else None
    return Figures(
        format=FORMAT,
        complete=complete,
        identity=dict(before.identity),
        unlabelled_images_per_s=rate,
        image_equivalents_per_s=rate * equivalents if rate and equivalents and step else None,
        stall_share=stall.share if stall else None,
        stall=stall,
        binding=binding,
        loader=loader,
        step=step,
        communication=_communication(before, everyone) if step and before.world > 1 else None,
        memory=_memory(everyone),
        overhead_share=_overhead(main),
        machine=_machine(main.probes),
        here=_here(before, main.loader, loader, step, cost),
        projection=_projection(before, cost, step),
        noise=_noise(main),
        notes=[*before.notes, *main.notes],
    )


# ------------------------------------------------------------------------------------------------------- the loader


def _loader(before: Before, everyone: Sequence[Found]) -> LoaderFigures:
    """Rates of all ranks together; phases by stream of the first."""
    warm, kept = everyone[0].loader[WARM], everyone[0].probes.still_cached
    phases = {phase: _phase_row(warm, phase, before.streams, before.epoch_of) for phase in PHASES}
    return LoaderFigures(
        images_per_s=_rates(everyone, WARM),
        one_thread_images_per_s=_rates_if(everyone, ONE_THREAD),
        cold_images_per_s=_rates_if(everyone, COLD),
        cold=_cold_words(kept) if kept else "nothing is read from a disk" if before.in_memory else "not measured",
        threads=warm[0].threads * before.world,
        cpu_s_per_image=sum(row.cpu_s_per_image for row in phases.values()),
        stages=phases,
        by_stream={name: {phase: cpu_s_of(warm, phase, name) for phase in PHASES} for name in before.streams},
    )


def _rates_if(everyone: Sequence[Found], kind: Kind) -> Spread | None:
    """None where the kind was not measured."""
    return _rates(everyone, kind) if kind in everyone[0].loader else None


def _rates(everyone: Sequence[Found], kind: Kind) -> Spread:
    """Of all ranks together, window by window."""
    rounds = zip(*(found.loader[kind] for found in everyone), strict=False)
    return _spread([sum(window.images_per_s for window in together) for together in rounds])


def _cold_words(kept: Sequence[float | None]) -> str:
    if any(share is None for share in kept):
        return "the file system does not tell whether files left the cache"
    most = max(share for share in kept if share is not None)
    return "dropped before each window" if most < 0.1 else f"the system kept {most:.0%} in memory: not a cold cache"


def _phase_row(windows: Sequence[Window], phase: str, streams: Mapping[str, int], epoch_of: str) -> Phase:
    """A phase of all streams for one image of the epoch's, in the recipe's proportions."""
    wall_s, cpu_s = (
        sum(seconds(windows, phase, name) * n for name, n in streams.items()) / streams[epoch_of]
        for seconds in (wall_s_of, cpu_s_of)
    )
    return Phase(cpu_s, wall_s, 1 / cpu_s if cpu_s else None)


# ------------------------------------------------------------------------------------------------------- the step


def _step(before: Before, everyone: Sequence[Found]) -> StepFigures:
    """Times of the slowest rank, counts of the first."""
    main, counts, probes, cost = everyone[0], everyone[0].counts, everyone[0].probes, before.cost
    synthetic_s, full_s = max(_typical_s(everyone, READY)), max(_typical_s(everyone, LOADED), default=None)
    of = LOADED if full_s else READY
    times, ranks = all_step_s(main.steps[of]), _typical_s(everyone, of)
    assert probes.flop_s and probes.copy_bytes_s
    flop_s = sum(cost.flops.values()) / before.world / synthetic_s if cost else None
    traffic = cost.traffic_bytes / synthetic_s if cost else None
    return StepFigures(
        how=counts.how,
        synthetic_s=synthetic_s,
        cached_s=max(_typical_s(everyone, COPIED), default=None),
        full_s=full_s,
        first_step_s=counts.first_step_s,
        percentiles_s=_percentiles(times),
        num_steps_timed=len(times),
        straggler_spread=(max(ranks) - min(ranks)) / median(ranks),
        cpu_s=median(w.cpu_s / max(1, len(w.step_s)) for w in main.steps[READY]),
        images_per_s=before.batch_global / synthetic_s,
        batch_global=before.batch_global,
        image_equivalents=cost.image_equivalents if cost else None,
        image_equivalents_per_s=cost.image_equivalents / synthetic_s if cost else None,
        flop_s=flop_s,
        peak_flop_s=probes.flop_s,
        share_of_peak=flop_s / probes.flop_s if flop_s else None,
        traffic_bytes_s=traffic,
        copy_bytes_s=probes.copy_bytes_s,
        share_of_memory_roofline=traffic / probes.copy_bytes_s if traffic else None,
        dispatches=counts.dispatches,
        launches=counts.launches,
        host_syncs=counts.host_syncs,
    )


def _typical_s(everyone: Sequence[Found], kind: Kind) -> list[float]:
    """The median step of each rank; empty where the kind was not measured."""
    return [median(all_step_s(found.steps[kind])) for found in everyone if kind in found.steps]


def _percentiles(times: Sequence[float]) -> dict[str, float]:
    if len(times) < 2:
        return {name: times[0] for name in ("p50", "p95", "p99")}
    cuts = quantiles(times, n=100, method="inclusive")
    return {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98]}


def _stall(everyone: Sequence[Found]) -> Stall:
    """The share of the step's time by which the full run is longer than the step on a batch that lies ready: copying is
    what a batch in host memory costs, the rest is the loader's and is split as its threads spent their time. Windows
    of one round are compared with each other; the reported share is the median over rounds."""
    shares, copies = [], []
    for k in range(min(len(found.steps[LOADED]) for found in everyone)):
        ready_s, copied_s, loaded_s = (
            max(found.steps[kind][k].mean_s for found in everyone) if kind in everyone[0].steps else None
            for kind in (READY, COPIED, LOADED)
        )
        assert ready_s and loaded_s
        shares.append(1 - ready_s / loaded_s)
        copies.append(((copied_s or ready_s) - ready_s) / loaded_s)
    share = max(0.0, median(shares))
    copy = min(share, max(0.0, median(copies)))
    spent = phase_seconds(everyone[0].loader[BESIDE_THE_STEP])
    total = sum(spent.values()) or 1.0
    by_phase = {phase: (share - copy) * s / total for phase, s in spent.items()}
    steps = everyone[0].steps[LOADED]
    waited = sum(sum(w.wait_s) for w in steps) / (sum(sum(w.step_s) for w in steps) or 1.0)
    return Stall(
        share=share,
        spread=(max(shares) - min(shares)) / 2,
        prepare=sum(v for phase, v in by_phase.items() if phase != "fetch"),
        fetch=by_phase["fetch"],
        copy=copy,
        by_stage=by_phase,
        waited_share=min(share, waited) if share else 0.0,
    )


def phase_seconds(windows: Sequence[Window]) -> dict[str, float]:
    """What the loader spent by phase, in seconds that add up to the windows' own."""
    return {phase: sum(w.by_phase_s[phase] for w in windows) for phase in PHASES}


def _communication(before: Before, everyone: Sequence[Found]) -> dict[str, Sent]:
    """By class: messages and bytes of a rank and step (counted), and how much shorter the step is without them."""
    sent = _sent(before.cost, before.world) if before.cost is not None else {}
    return {name: replace(sent.get(name, Sent()), exposed_s=_exposed(everyone[0], name)) for name in CLASSES}


def _sent(cost: StepCost, world: int) -> dict[str, Sent]:
    found = {}
    for name, messages in (("statistics", cost.statistics), ("rows", cost.rows)):
        moved = sum(ring_bytes(op, size, world) for op, (_, size) in messages.items())
        found[name] = Sent(sum(count for count, _ in messages.values()), moved)
    buckets = math.ceil(cost.gradient_bytes / DDP_BUCKET_BYTES)
    return found | {"gradients": Sent(buckets, cost.gradient_ring_bytes)}


def _exposed(main: Found, name: Messages) -> Spread | None:
    """How much longer the step is for the class of messages; None where it was not measured without."""
    if without(name) not in main.steps:
        return None
    pairs = zip(main.steps[READY], main.steps[without(name)], strict=False)
    return _spread([whole.mean_s - less.mean_s for whole, less in pairs])


# ------------------------------------------------------------------------------------------------------- what binds


def _binding(loader: LoaderFigures | None, step: StepFigures | None, cost: whatif.LoaderCost | None) -> Binding:
    if loader is None and step is None:
        return Binding(None, None, None, "nothing was measured yet")
    if loader is None:
        assert step is not None
        return Binding("step", None, None, f"the step by itself: {_n(step.images_per_s)} images/s, {_limit_of(step)}")
    phase = max(PHASES, key=lambda name: loader.stages[name].wall_s_per_image)
    prepare = f"{loader.threads} core{'s' * (loader.threads > 1)} prepare {_n(loader.images_per_s.median)}"
    if step is None:
        return Binding("loader", phase, None, f"the loader by itself: {prepare} images/s, most of it {phase}")
    return _of_both(loader, step, cost, phase, prepare)


def _of_both(
    loader: LoaderFigures, step: StepFigures, cost: whatif.LoaderCost | None, phase: str, prepare: str
) -> Binding:
    """`prepare`: how many cores prepare how much, in words."""
    trained = step.images_per_s
    cores = cost.cores_for(trained) if cost and trained else None
    would = "no number of cores would do, for planning alone is slower" if cores is None else (
        f"{cores} core{'s' * (cores > 1)} would do"
    )  # fmt: skip
    if loader.images_per_s.median >= trained:
        return Binding(
            "step", phase, cores, f"the step: it takes {_n(trained)} images/s, {_limit_of(step)}; {prepare}, {would}"
        )
    fetch = loader.stages["fetch"]
    disk = phase == "fetch" and fetch.wall_s_per_image > 2 * fetch.cpu_s_per_image
    sentence = (
        f"the {'disk' if disk else 'loader'}: {prepare} images/s, most of it {phase}; "
        f"the step could take {_n(trained)}; {'a faster disk or a cache' if disk else would}"
    )
    return Binding("disk" if disk else "loader", phase, cores, sentence)


def _limit_of(step: StepFigures) -> str:
    if step.share_of_peak is None:
        return "on a network whose arithmetic cannot be counted"
    return (
        f"at {step.share_of_peak:.0%} of the measured peak FLOP/s and {step.share_of_memory_roofline:.0%} of the "
        "memory's"
    )


def _n(rate: float | None) -> str:
    return "?" if rate is None else f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _rate_without_full(loader: LoaderFigures | None, step: StepFigures | None) -> float | None:
    """Where the two were not run together: the step's, else the loader's."""
    if step:
        return step.images_per_s
    return loader.images_per_s.median if loader else None


# ------------------------------------------------------------------------------------------------------- elsewhere


def _here(
    before: Before,
    windows: Mapping[Kind, Sequence[Window]],
    loader: LoaderFigures | None,
    step: StepFigures | None,
    cost: whatif.LoaderCost | None,
) -> dict[str, Any] | None:
    if loader is None or cost is None:
        return None
    trained = step.images_per_s if step else math.inf
    known = KNOWN_SETS[before.identity["dataset"]]
    recurring_bytes = known.num_images * DECODED_BYTES
    caches = {f"{gib} GiB of decoded support": min(1.0, gib * 2**30 / recurring_bytes) for gib in CACHES_GIB}
    others = {kind.renderer: loader_cost(before, found) for kind, found in windows.items() if kind.renderer}
    stores = stores_of(before, windows[WARM], cost)
    tables = whatif.around(
        cost, trained, loader.threads, _efficiency(loader), caches if before.recurring else {}, others, stores
    )
    hours = None
    if step:
        rate = 1 / step.full_s * before.batch_global if step.full_s else trained
        hours = 100 * known.num_images / rate / 3600
    return {"hours_per_100_epochs": hours, "efficiency_of_a_core": _efficiency(loader), **_finite(tables)}


def _efficiency(loader: LoaderFigures) -> float:
    """What a core is worth when all are busy, from the loader with one thread and with all."""
    one = loader.one_thread_images_per_s
    if one is None:
        return 1.0
    return min(1.0, loader.images_per_s.median / one.median / loader.threads)


def _projection(before: Before, cost: whatif.LoaderCost | None, step: StepFigures | None) -> dict[str, Any]:
    """The 64-GPU job, always: hours and what binds on a few machines, and over numbers of ranks."""
    share = step.share_of_memory_roofline if step and before.device == "cuda" else None
    images, epoch = 4096, KNOWN_SETS["imagenet"].num_images
    usable = cost if cost is not None and before.identity["dataset"] == "imagenet" else None
    rows = [whatif.described(before.headline, c, usable, images, epoch, share) for c in whatif.CLUSTERS]
    measured = ["CPU seconds an image of the loader on this machine's cores"] if usable else []
    measured += ["share of the memory roofline on this machine's GPU"] if share else []
    modelled = [
        "arithmetic, memory traffic, messages and bytes of a step, counted from the step's own code on fake tensors"
    ]
    modelled += [] if share else ["share of the memory roofline: published training rates, see each row's `assumed`"]
    modelled += [] if usable else ["that the loader keeps up: it was not measured on ImageNet's views here"]
    modelled += ["latency and bandwidth between GPUs: published or estimated"]
    return {
        "recipe": whatif.HEADLINE,
        "ranks": whatif.HEADLINE_RANKS,
        **{k: rows[0][k] for k in ("machine", "hours_per_100_epochs", "hours_low", "hours_high", "binding",
                                   "unlabelled_images_per_s", "image_equivalents_per_s")},
        "measured": measured,
        "modelled": modelled,
        "machines": rows,
        "ranks_on_paper": whatif.over_ranks(before.headline, usable, images, epoch),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the machine


def _memory(everyone: Sequence[Found]) -> Memory:
    return Memory(
        peak_bytes=max((found.counts.peak_bytes or 0 for found in everyone), default=0) or None,
        resident_bytes=sum(found.counts.most_resident_bytes or 0 for found in everyone) or None,
    )


def _overhead(main: Found) -> float | None:
    """Stamps of the loader's threads times what one costs, over the threads' time."""
    spent = [s for kind in main.loader.values() for w in kind for of in w.spent.values() for s in of.values()]
    spent_s = sum(s.cpu_s for s in spent)
    return sum(s.stamps for s in spent) * main.probes.stamp_s / spent_s if spent_s else None


def _machine(probes: Probes) -> Machine:
    """How much of it was ours: the share of time in which a thread for each CPU that we may use had to wait for it."""
    waits = [speed.waited_share for speed in probes.rounds]
    share = median(waits) if waits else None
    return Machine(share, quiet=share is not None and share < BUSY, rounds=len(waits))


def _noise(main: Found) -> Noise:
    """What a later profile is compared with: values that load on the machine moves least, each with all windows.

    CPU seconds, and those of fixed work beside each window; counts; wall seconds too, which count only where
    the machine was quiet both times.
    """
    warm = main.loader.get(WARM, ())
    steps = {f"step, {name}": main.steps.get(kind, ()) for name, kind in (("synthetic", READY), ("full", LOADED))}
    counted = {name: getattr(main.counts, name) for name in ("dispatches", "launches", "host_syncs", "peak_bytes")}
    wall = {"loader": [window.wall_s / window.images for window in warm]} if warm else {}
    return Noise(
        speed=[window.probe.cpu_s_per_call for window in warm if window.probe is not None],
        cpu={phase: [_phase_cpu_s(window, phase) / window.images for window in warm] for phase in PHASES if warm},
        counts={name: count for name, count in counted.items() if count},
        wall=wall | {name: [window.mean_s for window in windows] for name, windows in steps.items()},
    )


def _phase_cpu_s(window: Window, phase: str) -> float:
    """Of all streams."""
    return sum(of[phase].cpu_s for of in window.spent.values())


def _spread(values: Sequence[float]) -> Spread:
    return Spread(median(values), min(values), max(values), len(values))


def _finite(tables: Any) -> Any:
    """JSON has no infinities."""
    if isinstance(tables, dict):
        return {k: _finite(v) for k, v in tables.items()}
    if isinstance(tables, list):
        return [_finite(v) for v in tables]
    return None if isinstance(tables, float) and not math.isfinite(tables) else tables
