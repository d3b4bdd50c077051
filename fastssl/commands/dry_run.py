"""What a job would do, without data and without devices: `fastssl train --dry-run`."""

from __future__ import annotations

import torch

from fastssl.costs import memory_model
from fastssl.costs.cost import StepCost, ours
from fastssl.costs.trace import Untraceable, traced
from fastssl.engine.job import Job
from fastssl.engine.join import bounds_of, fitted, joined, protocols_of
from fastssl.engine.train_stage import NOTHING_EVALUATED
from fastssl.engine.unusable import said, unusable
from fastssl.errors import ConfigError
from fastssl.launch.lines import lines
from fastssl.launch.ranks import Ranks
from fastssl.methods.base import Facts, Stage
from fastssl.recipes.datasets import KNOWN_SETS
from loaders.errors import LoaderError
from loaders.plan.plan import check_world
from loaders.plan.views import All, Sequential
from loaders.store.apart import check_apart
from loaders.store.data import DataSets, open_data


def describe(job: Job) -> str:
    """The resolved job as text. What is missing is a warning in it; what cannot work raises FastsslError."""
    data, warnings = _opened(job)
    lowered: list[str] = []
    if data:
        job, lowered = fitted(job, data)
    told = [f"{job.recipe}, seed {job.seed}, {job.world} {'GPU' if job.device == 'cuda' else 'CPU'} rank(s)"]
    told += [f"  data         {line}" for line in (*data.said, *lowered)] if data else []
    told += [f"  {line}" for line in job.said]
    for stage in job.stages:
        told += _describe_stage(job, stage, data, warnings)
    if data and (found := unusable([bound for stage in job.stages for bound in bounds_of(job, stage, data)])):
        warnings.append(said(found))
    told.append(f"  directory    {job.out}")
    ways = lines(Ranks(job.world, job.device), job.command)
    told += [f"  {'launch' if not i else 'or':12} {line}" for i, line in enumerate(ways)]
    if job.device == "cuda":
        try:
            memory_model.refuse_job(job, None)
        except ConfigError as error:
            warnings.append(str(error))
    told += [f"warning: {text}" for text in warnings]
    return "\n".join(told)


def _opened(job: Job) -> tuple[DataSets | None, list[str]]:
    warnings = []
    available = torch.cuda.device_count()
    if job.device == "cuda" and job.world > available:
        warnings.append(f"this host has {available} GPUs, {job.world} are asked for")
    try:
        data = open_data(job.data) if job.data else None
        return data, warnings + (check_apart(data) if data else [])
    except LoaderError as error:
        return None, [*warnings, str(error)]


def _describe_stage(job: Job, stage: Stage, data: DataSets | None, warnings: list[str]) -> list[str]:
    steps_per_epoch, bound = None, None
    if data:
        method, bound = joined(job, stage, data, {})
        plan, steps_per_epoch = method.plan(), bound.plan.steps_per_epoch
    else:
        known = KNOWN_SETS[stage.config.dataset]
        method = stage.config.build(Facts(known.num_classes, known.channels, job.seed), {})
        plan = method.plan()
        check_world(job.world, [s.batch_global for s in plan.streams if not isinstance(s.order, Sequential)])
        epoch_stream = plan.stream(plan.epoch_of)
        if isinstance(epoch_stream.ids, All):
            steps_per_epoch = known.num_images // epoch_stream.batch_global
            warnings.append(f"no --data: steps assume {stage.config.dataset}'s {known.num_images:,} images")
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in method.nets().online.parameters())

    lines = [f"  stage        {stage.name}: {type(method).__name__}, {stage.length}"]
    for stream in plan.streams:
        per_rank = stream.batch_global // job.world
        views = ", ".join(f"{v.copies * len(v.turns)} x {v.name} {v.size}" for v in stream.views)
        lines.append(f"  {stream.name:12} {stream.batch_global:,} images a step, {per_rank:,} a rank; {views}")
        if bound is not None and (repeats := bound.plan.repeats(stream.name)):
            lines.append(f"  {'':12} {repeats}")
    if steps_per_epoch is not None:
        total = stage.length.steps(steps_per_epoch)
        lines.append(f"  steps        {total:,}, {steps_per_epoch:,} an epoch")
    lines.append(f"  network      {num_parameters:,} parameters")
    if data and stage.do == "train" and stage.evaluate:
        protocols = protocols_of(job, stage, data)
        lines += [f"  evaluated    by {', '.join(protocols)}"] if protocols else []
        warnings += [] if protocols or NOTHING_EVALUATED in warnings else [NOTHING_EVALUATED]
    if stage.do == "train":
        lines += _describe_cost(stage, method.facts, job.world)
    return lines


def _describe_cost(stage: Stage, facts: Facts, world: int) -> list[str]:
    """What a step computes and sends, and what a card must hold; all modelled."""
    try:
        trace = traced(stage, facts, world)
    except Untraceable as error:
        return [f"  memory       not estimated: {error}"]
    needs, cards = memory_model.describe(memory_model.memory_of(trace))
    return [
        f"  a step       {_arithmetic(ours(trace))}",
        *([f"  messages     {_messages(ours(trace))}"] if world > 1 else []),
        f"  memory       {needs}",
        f"  cards        {cards}",
    ]


def _arithmetic(cost: StepCost) -> str:
    tera = sum(cost.flops.values()) / 1e12
    return (
        f"{f'{tera:,.0f}' if tera >= 100 else f'{tera:.3g}'} TFLOP, {cost.image_equivalents:,.0f} image-equivalents; "
        f"{cost.decodes:,} images decoded, {cost.crops:,} crops"
    )


def _messages(cost: StepCost) -> str:
    """Of one rank and step."""
    statistics_mb = sum(num_bytes for _, num_bytes in cost.statistics.values()) / 1e6
    return (
        f"{cost.num_statistics_messages} of batch norm, {statistics_mb:.2f} MB; "
        f"{cost.rows_moved_bytes / 1e6:.1f} MB of the loss; {cost.gradient_ring_bytes / 1e6:.1f} MB of gradients"
    )
