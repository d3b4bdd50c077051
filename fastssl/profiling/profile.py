"""`fastssl profile`: prepares, starts the ranks, writes profile.json and profile.html, says what binds."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from fastssl.costs import whatif
from fastssl.costs.cost import ours
from fastssl.costs.trace import Untraceable, trace_step
from fastssl.engine.job import Job
from fastssl.engine.join import facts_of
from fastssl.engine.step import default_how
from fastssl.errors import ConfigError, FastsslError
from fastssl.methods.base import Facts, Stage
from fastssl.profiling import baseline as baselines
from fastssl.profiling import measure
from fastssl.profiling.before import Before
from fastssl.profiling.presentation import as_text, write_page
from fastssl.profiling.summary import summarise
from fastssl.profiling.windows import Found
from fastssl.profiling.workload import LOADER_IMAGES, SIZED, fitting, sized, stand_ins
from fastssl.recipes.datasets import KNOWN_SETS
from fastssl.recipes.resolve import resolve
from loaders.files import write_file
from loaders.plan.views import Balanced
from loaders.store.data import open_data
from loaders.store.source import EncodedSource, Source, is_encoded

Start = Callable[[Job, Callable[[Job], None]], object]  # does a piece of work on all ranks

PROFILE, PAGE, TRACE = "profile.json", "profile.html", "trace.json"
_SAMPLE = 64  # files whose sizes stand for all


@dataclass(frozen=True)
class Keep:
    """Writes what is known so far: an interrupted profile leaves that behind, marked as not complete."""

    before: Before
    out: Path

    def __call__(self, everyone: list[Found], complete: bool) -> None:
        profile = summarise(self.before, everyone, complete)
        write_file(self.out / PROFILE, json.dumps(profile, indent=2, allow_nan=False) + "\n")
        if complete:
            write_page(profile, self.out / PAGE)


def prepare(job: Job, what: measure.What, seconds: float, trace: bool) -> tuple[Job, measure.Asked, Before]:
    """The job cut to this machine's size, what to measure, and what is known by counting. Takes seconds; before the
    ranks are joined."""
    stage = next((s for s in job.stages if s.do == "train" and not s.needs), None)
    if stage is None:
        raise ConfigError(f"{job.recipe}: none of its stages trains without what an earlier one makes")
    if job.device == "cuda" and torch.cuda.device_count() == 0:
        raise ConfigError("--gpus: torch sees no GPU here; leave it out to profile on the CPU")
    data = open_data(job.data) if job.data else None
    sources = list(data.sources.values()) if data else [stand_ins(stage.config)]
    known = KNOWN_SETS[stage.config.dataset]
    facts = facts_of(data, 0) if data else Facts(known.num_classes, known.channels, 0)
    how = job.how or default_how(torch.device(job.device))
    fixed = any(change.partition("=")[0].rpartition(".")[2] in SIZED for change in job.changes)
    encoded = all(is_encoded(source) for source in sources)
    alone = chosen = sized(stage, LOADER_IMAGES if encoded else None, job.world, fixed)
    cost, notes = None, [] if job.data else ["no --data: stand-in images, in memory"]
    if what != "loader":
        try:
            chosen, traced = fitting(stage, facts, job.world, job.device, how, fixed)
            cost = ours(traced)
        except Untraceable as error:
            notes.append(f"its arithmetic is not counted: {error}")
    plan, whole = (s.config.build(facts, {}).plan() for s in (chosen, stage))
    (headline,) = resolve(whatif.HEADLINE)
    imagenet = KNOWN_SETS["imagenet"]
    everything = Facts(imagenet.num_classes, imagenet.channels, 0)
    some = _some(sources)
    before = Before(
        identity=_identity(job, what, chosen, sources),
        cost=cost,
        headline=ours(trace_step(headline, everything, whatif.HEADLINE_RANKS)),
        device=job.device,
        world=job.world,
        epoch_of=plan.epoch_of,
        batch_global=plan.stream(plan.epoch_of).batch_global,
        streams={s.name: s.batch_global for s in whole.streams},
        recurring=tuple(s.name for s in whole.streams if isinstance(s.order, Balanced)),
        files_bytes=[int(source.num_bytes[i]) for source, i in some],
        decoded_bytes=[3 * int(source.sizes[i].prod()) for source, i in some],
        in_memory=not job.data or not encoded,
        notes=tuple(notes),
    )
    asked = measure.Asked(what, seconds, chosen, alone, job.out / TRACE if trace else None)
    return replace(job, stages=(chosen,)), asked, before


def run(job: Job, what: measure.What, seconds: float, trace: bool, baseline: Path | None, start: Start) -> None:
    """Measure, write, print. Raises Regression, and FastsslError for what a user can put right."""
    compared = read(baseline) if baseline else None
    job, asked, before = prepare(job, what, seconds, trace)
    if compared:
        baselines.check_comparable(compared, before.identity)
    job.out.mkdir(parents=True, exist_ok=True)
    (job.out / PROFILE).unlink(missing_ok=True)
    try:
        start(job, partial(work, asked=asked, keep=Keep(before, job.out)))
    except KeyboardInterrupt:
        kept = (job.out / PROFILE).exists()
        left = (
            f"what was measured is in {job.out / PROFILE}, marked as not complete" if kept else "nothing was measured"
        )
        raise FastsslError(f"interrupted; {left}") from None
    if os.environ.get("RANK", "0") != "0":
        return
    profile = read(job.out / PROFILE)
    Console(markup=False, emoji=False).print(as_text(profile))
    print(f"written: {job.out / PROFILE}, {job.out / PAGE}" + (f", {job.out / TRACE}" if trace else ""))
    if compared:
        print(baselines.check(compared, profile))


def work(job: Job, asked: measure.Asked, keep: Keep) -> None:
    """What each rank does; it pickles."""
    measure.run(job, asked, keep)


def read(path: Path) -> dict[str, Any]:
    """A profile.json. Raises FastsslError where it is none."""
    try:
        profile = json.loads(path.read_text())
        if not isinstance(profile, dict) or "identity" not in profile or "noise" not in profile:
            raise ValueError("it is no profile")
    except (OSError, ValueError) as error:
        raise FastsslError(f"{path}: cannot be read as a profile.json: {error}") from error
    return profile


def _identity(job: Job, what: str, stage: Stage, sources: Sequence[Source]) -> dict[str, Any]:
    """What must be the same for two profiles to be compared."""
    plan_sizes = {name: getattr(stage.config, name) for name in SIZED if hasattr(stage.config, name)}
    libraries = {name: version(name) for name in ("numpy", "numba", "pillow", "torch")}
    gpu = torch.cuda.get_device_name(0) if job.device == "cuda" else None
    return {
        "recipe": job.recipe,
        "changes": sorted(job.changes),
        "dataset": stage.config.dataset,
        "data": sorted(source.name for source in sources),
        "measured": what,
        "sizes": plan_sizes,
        "device": gpu or "CPU",
        "ranks": job.world,
        "step": job.how or default_how(torch.device(job.device)),
        "loader": job.loader,
        "cache_gib": job.cache_gib,
        "machine": {"cpu": cpu_model(), "cpus": len(os.sched_getaffinity(0))},
        "versions": {"python": platform.python_version(), **libraries},
    }


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _some(sources: Sequence[Source]) -> list[tuple[EncodedSource, int]]:
    """Some encoded images; none where images are arrays."""
    return [
        (source, i)
        for source in sources
        if is_encoded(source)
        for i in np.linspace(0, len(source) - 1, min(_SAMPLE, len(source))).astype(int).tolist()
    ]
