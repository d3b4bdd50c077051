"""Every path that several GPUs take, on one: a group of a single rank, in which nothing is cut short.

NCCL carries batch norm's statistics and DDP's gradients, sums over one rank that must change no bit; steps are
launched, compiled and replayed from graphs, with LARS and with SGD, in three precisions, on batches that a loader makes
meanwhile. From step 13 on, what waits for the device is an error.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.calls import Found, Run
from benchmarks.gpu.right import NUDGES, compared, limits_of
from fastssl import dist
from fastssl.engine.join import facts_of
from fastssl.engine.step import TrainingStep
from fastssl.methods.base import Horizon
from fastssl.nn.encoders.resnet import ResNet
from fastssl.nn.norm import global_batch_norm
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.recipes.resolve import resolve
from loaders.loader import Loader, bind
from loaders.store.data import open_data

NUM_STEPS, UNWAITED_FROM = 20, 13
WAYS = ("eager", "compiled", "graphed")
OPTIMISERS = {"LARS": "paws.digits", "SGD": "supervised.digits"}


def ranks(run: Run) -> Found:
    found, on_gpu = run.found, run.device.type == "cuda"
    optimisers = OPTIMISERS if on_gpu else {"LARS": OPTIMISERS["LARS"]}
    for optimiser, recipe in optimisers.items():
        for precision in ("fp32", "bf16", "fp16") if on_gpu else ("fp32",):
            # One after the other, so that a failure is known by its name and what was found is written at once.
            # A graph is refused for fp16, and impossible without a card.
            ways = WAYS if on_gpu and precision != "fp16" else WAYS[:2]
            keys = {how: f"{optimiser}, {precision}, {how}" for how in ways}
            if all(key in found for key in keys.values()):
                continue
            with our_norms():
                lone = trained("eager", recipe, precision, run.device)["losses"]
                nudged = trained("eager", recipe, precision, run.device, times=1 + NUDGES[precision][0])["losses"]
            limits = limits_of(lone, nudged, precision)
            with group_of_one(run.device):
                for how, key in keys.items():
                    limit = [0.0] * NUM_STEPS if how == "eager" else limits
                    run.once(key, partial(held, how, recipe, precision, run.device, lone, limit))
    found["passed"] = all(entry["passed"] for entry in found.values() if isinstance(entry, dict))
    if not on_gpu:
        found["left out"] = "NCCL, graphs, SGD and half precision need a card"
    return found


def held(how: str, recipe: str, precision: str, device: torch.device, lone: list[float], limits: list[float]) -> Found:
    """The steps beside lone eager ones, the memory they took, and what they warned of, which is a failure too."""
    seen: Found = {}

    def measure() -> list[float]:
        seen.update(trained(how, recipe, precision, device))
        return seen.pop("losses")

    result = compared(measure, lone, limits) | seen
    result["passed"] = result["passed"] and not seen.get("warnings")
    return result


def trained(how: str, recipe: str, precision: str, device: torch.device, times: float = 1.0) -> Found:
    """Losses of the first steps of a tiny network on digits, pixels multiplied by `times`; memory; warnings."""
    torch.manual_seed(0)
    (stage,) = resolve(recipe)
    tiny: dict[str, Any] = {"encoder": ResNet(10, stem="cifar", base_width=16), "batch_global": 64}
    stage = replace(stage, config=replace(stage.config, precision=precision, **tiny))
    data = open_data(("digits",))
    method = stage.config.build(facts_of(data, 0), {})
    nets = method.nets()
    for module in nets.modules().values():
        module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    step = TrainingStep(stage, how, method, nets, method.optimizer(nets), device)  # type: ignore[arg-type]
    warnings: list[str] = []
    losses, horizon = [], Horizon(20, 400)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    # The device without its number, as commands that open a run give it.
    with Loader(bind(method.plan(), data), device=device.type, threads=2) as loader, no_waits_in_the_end() as begin:
        for number, batch in enumerate(loader.batches(0, NUM_STEPS)):
            for part in batch.parts.values():
                part.x = {view: x * times for view, x in part.x.items()}
            if number == 0 and step.must_prepare:
                step.prepare(batch, warnings.append)
            if number == UNWAITED_FROM:
                begin()
            losses.append(step(number, horizon, batch)["total"].clone())
            batch.release()
    found: Found = {"losses": torch.stack(losses).tolist(), "warnings": warnings, "how": step.how}
    if device.type == "cuda":
        found["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20, 1)
        found["reserved_mib"] = round(torch.cuda.memory_reserved() / 2**20, 1)
    return found


@contextmanager
def no_waits_in_the_end() -> Iterator[Any]:
    """What is yielded makes whatever waits for the device an error, until the context ends."""

    def begin() -> None:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error")

    try:
        yield begin
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")


def our_norms() -> Any:
    """Within it a lone process normalises as ranks do: on a CPU torch's own norm would round otherwise."""
    return mock.patch.object(global_batch_norm, "_must_be_ours", return_value=True)


@contextmanager
def group_of_one(device: torch.device) -> Iterator[None]:
    """The ranks' groups with one rank in them, and nothing that looks for others first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    two = property(
        lambda layer: 1 if layer.mode == "local" else 2
    )  # "more than one": the sums are over one rank all the same
    always = property(lambda step: True)
    with mock.patch.dict(os.environ, one), mock.patch.object(GlobalBatchNorm, "_num_ranks", two):
        dist.init("nccl" if device.type == "cuda" else "gloo")
        try:
            with mock.patch.object(TrainingStep, "averages", always):
                yield
        finally:
            dist.shutdown()
