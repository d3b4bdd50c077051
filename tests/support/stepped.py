"""A training step on the embedded digits, prepared and done some times, without the loop around it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from fastssl.engine.join import facts_of
from fastssl.engine.settings import How
from fastssl.engine.step import TrainingStep
from fastssl.machine import forget_compiled
from fastssl.methods.base import Horizon, Stages
from loaders.loader import Loader, bind
from loaders.store.data import open_data


def stepped(
    how: How,
    stages: Stages,
    device: torch.device,
    steps: int,
    watch: AbstractContextManager | None = None,
    keeps_all: bool = False,
) -> tuple[TrainingStep, list[str], list[float]]:
    """The step of the one stage, prepared within `watch`; what it warned of; the losses of its first steps."""
    (stage,) = stages
    forget_compiled()
    torch.manual_seed(0)
    data = open_data(("digits",))
    method = stage.config.build(facts_of(data, 0), {})
    nets = method.nets()
    nets.online.to(memory_format=torch.channels_last)
    step = TrainingStep(stage, how, method, nets, method.optimizer(nets), device, keeps_all)
    warnings: list[str] = []
    losses = []
    with Loader(bind(method.plan(), data), threads=1) as loader:
        for number, batch in enumerate(loader.batches(0, steps)):
            if number == 0 and step.must_prepare:
                with watch or nullcontext():
                    step.prepare(batch, warnings.append)
            losses.append(float(step(number, Horizon(5, 40), batch)["total"]))
            batch.release()
    return step, warnings, losses
