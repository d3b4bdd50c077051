"""The same PAWS training step written in several ways, in one run, in turns.

    python -m benchmarks.step [--quick] [--json FILE] [--cifar10 DIR] [--imagenet DIR]

Loss, gradients, LARS update and running statistics of one fixed batch, which lies on the device before the clock runs:

authors          as PAWS's released code behaves: NCHW, float16 with a scaler on a GPU and float32 on a CPU, whole label
                 and similarity matrices, LARS tensor by tensor, waiting for the device at every turn
plain            plain PyTorch of today: channels-last, bfloat16 autocast, foreach LARS, no waiting
plain_compiled   ... its network and its loss under `torch.compile`
fastssl          our `TrainingStep` on the recipe's method, bfloat16, compiled
fastssl_recomputed ... and computing batch norms again, as a GPU without room must (`benchmarks.gpu` only)
fastssl_eager    ... and not compiled
fastssl_graphed  ... and replayed from a CUDA graph (GPUs only)

On a CPU: WRN-28-2 on CIFAR-10's views and, without --quick, ResNet-50 on ImageNet's; on a GPU see `benchmarks.gpu`.
Batches are shares of the recipes' with the recipes' proportions, of real images where the folders are given (default:
$FASTSSL_TEST_CIFAR10 and $FASTSSL_TEST_DATA/imagenet-sample), else of noise. Every round gives each contender one
window; reported are medians over windows, and apart from them how long each took to compile. An image-equivalent is one
forward and backward pass of one image at the size of the global views.
"""

# ruff: noqa: E402
from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `fastssl` sets it; read when torch is loaded

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn

from benchmarks import plain as peers
from benchmarks.machine import commit, cpu_model
from fastssl.engine.join import facts_of
from fastssl.engine.settings import How
from fastssl.engine.step import TrainingStep
from fastssl.machine import keep_freed_memory
from fastssl.methods.base import Facts, Horizon, Method, Nets, Stage, Steps
from fastssl.methods.paws import PawsConfig
from fastssl.optim.adamw import AdamW
from fastssl.recipes.paws import cifar10, rn50_100ep
from loaders.batch import Batch, Part
from loaders.loader import Loader, bind
from loaders.store.data import open_data

HORIZON = Horizon(steps_per_epoch=1_000, total_steps=100_000)  # a run's first steps are timed: the rate hardly moves
MIN_ROUNDS = 2
MUST = {  # on a CPU
    ("fastssl", "authors"): 2.5,  # plain bfloat16 and compiling alone were measured at about 2.4
    ("fastssl_on_timm", "own_resnet50"): 0.95,
    ("fastssl_vit", "plain_vit"): 0.97,
}


@dataclass(frozen=True)
class Problem:
    """What all contenders compute: a method with fresh weights, and how a peer builds the same network."""

    name: str
    config: PawsConfig
    facts: Facts
    peer_trunk: Callable[[], peers.WideResNet | peers.ResNet50 | peers.ViT]
    device: torch.device
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def ours(self) -> tuple[Method, Nets]:
        torch.manual_seed(self.seed)
        method = self.config.build(self.facts, {})
        nets = method.nets()
        nets.online.to(self.device, self.dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return method, nets

    def peer(self) -> peers.PawsNet:
        """The peers' network with the same weights."""
        c, activation = self.config, {"activation": nn.GELU} if self.config.activation == "gelu" else {}
        net = peers.PawsNet(self.peer_trunk(), c.out_features, c.prediction, c.hidden_features, **activation)
        net.to(self.dtype).load_state_dict(self.ours()[1].online.state_dict())
        return net

    @cached_property
    def laws(self) -> Method:
        """Whose rates and decays all contenders follow."""
        return self.config.build(self.facts, {})

    def rate(self, step: int) -> float:
        return self.laws.rates(step, HORIZON)[0]

    def decay(self, step: int) -> float | None:
        return self.laws.decay(step, HORIZON)

    def labels(self, batch: Batch) -> Tensor:
        columns = batch.parts["support"].columns
        assert columns is not None
        c = self.config
        return peers.smoothed(columns.repeat(c.support_views), c.classes_global, c.label_smoothing, self.dtype)

    def views_of(self, batch: Batch) -> list[Tensor]:
        unlabelled = batch.parts["unlabelled"].x
        return [batch.parts["support"].x["support"], *unlabelled.values()]

    @property
    def image_equivalents(self) -> float:
        """Of one step: images at the global views' size; smaller ones count as their share of the pixels."""
        c, small = self.config, 0.0
        if c.small_view is not None:
            small = c.small_view.copies * (c.small_view.size / c.global_view.size) ** 2
        supports = c.classes_global * c.images_per_class * c.support_views
        return c.batch_global * (c.global_view.copies + small) + supports


@dataclass
class Contender:
    """One way to take the step. `formed` is the batch as its own loader would hand it out."""

    net: nn.Module
    formed: Callable[[Batch], Any]
    loss: Callable[[Any], Tensor]
    step: Callable[[int, Any], Tensor | float]  # (number of the step, formed batch) -> loss


# ------------------------------------------------------------------------------------------------------- contenders


def authors(problem: Problem, batch: Batch) -> Contender:
    c = problem.config
    peer = peers.Authors(problem.peer(), problem.device, half=c.precision != "fp32")

    def formed(batch: Batch) -> tuple[list[Tensor], Tensor]:
        copies = [c.support_views, *(v.copies for v in (c.global_view, c.small_view) if v is not None)]
        whole = zip(problem.views_of(batch), copies, strict=True)
        return [v.contiguous() for views, n in whole for v in views.chunk(n)], problem.labels(batch)

    return Contender(
        peer.net,
        formed,
        lambda formed: peer.loss(*formed),
        lambda step, formed: peer.step(*formed, problem.rate(step)),
    )


def plain(problem: Problem, batch: Batch, compiled: bool = False) -> Contender:
    c, net = problem.config, problem.peer()
    its_own = isinstance(c.optimizer, AdamW)
    optimizer = peers.adamw(net, c.optimizer.betas, c.optimizer.eps) if its_own else None
    peer = peers.Plain(net, problem.device, c.precision != "fp32", compiled, optimizer)

    def formed(batch: Batch) -> tuple[list[Tensor], Tensor, int]:
        return problem.views_of(batch), problem.labels(batch), c.batch_global

    return Contender(
        peer.net,
        formed,
        lambda formed: peer.loss(*formed),
        lambda step, formed: peer.step(*formed, problem.rate(step), problem.decay(step)),
    )


def plain_compiled(problem: Problem, batch: Batch) -> Contender:
    return plain(problem, batch, compiled=True)


def ours(problem: Problem, batch: Batch, how: How, keeps_all: bool | None = None) -> Contender:
    method, nets = problem.ours()
    stage = Stage("step", problem.config, Steps(HORIZON.total_steps))
    keeps_all = problem.device.type == "cuda" if keeps_all is None else keeps_all  # as a card with room does
    training_step = TrainingStep(stage, how, method, nets, method.optimizer(nets), problem.device, keeps_all)
    if training_step.must_prepare:
        training_step.prepare(batch, _refuse)
    return Contender(
        nets.online,
        lambda batch: batch,
        lambda batch: training_step.loss(batch)["total"],
        lambda step, batch: training_step(step, HORIZON, batch)["total"],
    )


def fastssl(problem: Problem, batch: Batch) -> Contender:
    return ours(problem, batch, "compiled")


def fastssl_recomputed(problem: Problem, batch: Batch) -> Contender:
    return ours(problem, batch, "compiled", keeps_all=False)


def fastssl_eager(problem: Problem, batch: Batch) -> Contender:
    return ours(problem, batch, "eager")


def fastssl_graphed(problem: Problem, batch: Batch) -> Contender:
    return ours(problem, batch, "graphed")


def _refuse(text: str) -> None:
    raise SystemExit(f"benchmarks.step: {text}")


Build = Callable[[Problem, Batch], Contender]
CONTENDERS: dict[str, Build] = {
    build.__name__: build for build in (authors, plain, plain_compiled, fastssl, fastssl_eager)
}


# --------------------------------------------------------------------------------------------------------- problems


def share_of(config: PawsConfig, images: int, classes: int, per_class: int) -> PawsConfig:
    """The recipe with a smaller batch, and labels of any image: which are shown changes nothing in a step."""
    return replace(config, batch_global=images, classes_global=classes, images_per_class=per_class, labels="all")


def wrn_problem(images: int, device: torch.device) -> Problem:
    """`paws.cifar10` with `images` of its 256 images and as large a share of its supports."""
    (stage,) = cifar10()
    assert isinstance(stage.config, PawsConfig)
    config = share_of(stage.config, images, stage.config.classes_global, stage.config.images_per_class * images // 256)
    return Problem("wrn28_2_cifar10", config, Facts(10, 3, 0), peers.WideResNet, device)


def rn50_problem(images: int, classes: int, per_class: int, device: torch.device) -> Problem:
    """`paws.rn50_100ep` with `images` of its 4,096 images and `classes` x `per_class` supports for 6,720."""
    (stage,) = rn50_100ep()
    assert isinstance(stage.config, PawsConfig)
    config = share_of(stage.config, images, classes, per_class)
    return Problem("rn50_imagenet", config, Facts(1_000, 3, 0), peers.ResNet50, device)


def real_batches(problem: Problem, data: Path | str, num: int = 1) -> Iterator[Batch]:
    """Batches that our loader makes of the images in `data`."""
    sets = open_data((str(data),))
    method = problem.config.build(facts_of(sets, seed=problem.seed), {})
    with Loader(bind(method.plan(), sets)) as loader, closing(loader.batches(0, num)) as batches:
        for batch in batches:
            yield copied(batch).to(problem.device)
            batch.release()


def copied(batch: Batch) -> Batch:
    parts = {
        name: replace(part, x={view: x.clone(memory_format=torch.preserve_format) for view, x in part.x.items()})
        for name, part in batch.parts.items()
    }
    return Batch(parts, batch.step)


def noise_batch(problem: Problem) -> Batch:
    """A batch of normal noise, of the shapes that the loader would make."""
    generator = torch.Generator(problem.device).manual_seed(problem.seed)
    parts = {}
    for stream in problem.config.build(problem.facts, {}).plan().streams:
        x = {
            view.name: torch.randn(
                view.copies * stream.batch_global, problem.facts.channels, view.size, view.size,
                generator=generator, device=problem.device, dtype=problem.dtype,
            ).contiguous(memory_format=torch.channels_last)
            for view in stream.views
        }  # fmt: skip
        rows = torch.arange(stream.batch_global, device=problem.device)
        columns = rows // problem.config.images_per_class if stream.name == "support" else None
        parts[stream.name] = Part(x, rows, rows, columns, rows, rows)
    return Batch(parts, torch.zeros((), dtype=torch.int64, device=problem.device))


# -------------------------------------------------------------------------------------------------------- measuring


@dataclass
class Measured:
    """Of one contender: steps a second of each window, and seconds from nothing to the end of the first step."""

    steps_per_s: list[float]
    first_step_s: float

    @property
    def compile_s(self) -> float:
        """What the first step took longer than a later one."""
        return max(0.0, self.first_step_s - 1 / statistics.median(self.steps_per_s))


def measure(
    problem: Problem,
    batch: Batch,
    builds: dict[str, Build],
    rounds: int,
    seconds: float,
    ends: float = float("inf"),
) -> dict[str, Measured]:
    """Every contender in turns, `rounds` windows of about `seconds` each; each round starts with another one. After
    `ends`, on the clock of `time.perf_counter`, no round begins but the first ones."""
    window = gpu_window if problem.device.type == "cuda" else cpu_window
    steps, measured = {}, {}
    for name, build in builds.items():
        start = time.perf_counter()
        # What one contender tells the compiler must not reach the others.
        with torch._functorch.config.patch(aggressive_recomputation=False):
            steps[name] = stepping(build(problem, batch), batch)
            window(steps[name], 0.0)
        measured[name] = Measured([], time.perf_counter() - start)
        print(f"{problem.name}: {name} ready after {measured[name].first_step_s:.0f} s", file=sys.stderr, flush=True)
    names = list(builds)
    for k in range(rounds):
        if k >= MIN_ROUNDS and time.perf_counter() > ends:
            break
        for name in names[k % len(names) :] + names[: k % len(names)]:
            window(steps[name], 0.0)  # its weights and buffers come back into the caches
            measured[name].steps_per_s.append(window(steps[name], seconds))
            gc.collect()
            if problem.device.type == "cuda":
                torch.cuda.empty_cache()
    return measured


def stepping(contender: Contender, batch: Batch) -> Callable[[], None]:
    """The next step of a contender, with each call."""
    formed, number = contender.formed(batch), iter(range(HORIZON.total_steps))
    return lambda: void(contender.step(next(number), formed))


def void(_: Any) -> None:
    """Takes a loss and keeps nothing."""


def cpu_window(step: Callable[[], None], seconds: float) -> float:
    """Steps a second over about `seconds`, one step at least."""
    start, num = time.perf_counter(), 0
    while num == 0 or time.perf_counter() - start < seconds:
        step()
        num += 1
    return num / (time.perf_counter() - start)


def gpu_window(step: Callable[[], None], seconds: float) -> float:
    """The same by the device's own clock: the host may run ahead, by no more than a few steps."""
    begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begun.record()
    num, start = 0, time.perf_counter()
    behind: list[torch.cuda.Event] = []
    while num == 0 or time.perf_counter() - start < seconds:
        step()
        num += 1
        behind.append(torch.cuda.Event())
        behind[-1].record()
        if len(behind) > 4:
            behind.pop(0).synchronize()
    ended.record()
    torch.cuda.synchronize()
    return 1000 * num / begun.elapsed_time(ended)


def summary(problem: Problem, measured: dict[str, Measured]) -> dict[str, Any]:
    median = {name: statistics.median(m.steps_per_s) for name, m in measured.items()}
    c = problem.config
    ratios = {}
    for ours in (name for name in measured if name.startswith("fastssl")):
        for peer in (name for name in measured if not name.startswith("fastssl")):
            pairs = zip(measured[ours].steps_per_s, measured[peer].steps_per_s, strict=True)
            of_round = [a / b for a, b in pairs]
            ratios[f"{ours} / {peer}"] = {"median": statistics.median(of_round), "least": min(of_round)}
            if (ours, peer) in MUST and problem.device.type == "cpu":
                ratios[f"{ours} / {peer}"]["must"] = MUST[ours, peer]
    return {
        "steps_per_s": median,
        "image_equivalents_per_s": {name: rate * problem.image_equivalents for name, rate in median.items()},
        "compile_s": {name: round(m.compile_s, 1) for name, m in measured.items()},
        "ratios": ratios,
        "windows": {name: [round(rate, 4) for rate in m.steps_per_s] for name, m in measured.items()},
        "problem": {
            "name": problem.name,
            "images": c.batch_global,
            "supports": c.classes_global * c.images_per_class * c.support_views,
            "classes": c.classes_global,
            "image_equivalents": problem.image_equivalents,
            "dtype": {
                name: ("float16" if problem.device.type == "cuda" else "float32") if name == "authors" else "bfloat16"
                for name in measured
            },
        },
    }


def show(result: dict[str, Any]) -> None:
    problem = result["problem"]
    print(f"{problem['name']}: {problem['images']} images and {problem['supports']} supports a step")
    print(f"{'':18}{'steps/s':>10}{'least':>9}{'most':>9}{'image-eq./s':>13}{'compile s':>11}  dtype")
    for name, rate in sorted(result["steps_per_s"].items(), key=lambda item: item[1]):
        windows, eq = result["windows"][name], result["image_equivalents_per_s"][name]
        print(
            f"{name:18}{rate:10.3f}{min(windows):9.3f}{max(windows):9.3f}{eq:13.1f}{result['compile_s'][name]:11.1f}"
            f"  {problem['dtype'][name]}"
        )
    for name, ratio in result["ratios"].items():
        must = f"; must {ratio['must']}" if "must" in ratio else ""
        print(f"{name}: {ratio['median']:.2f} x (least round {ratio['least']:.2f}){must}")


def settings(device: torch.device) -> dict[str, Any]:
    """Where and with what this was measured."""
    return {
        "cpu": cpu_model(),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "bfloat16_in_hardware": device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "environment": {"OMP_WAIT_POLICY": os.environ["OMP_WAIT_POLICY"]},
        "commit": commit(),
        "command": " ".join(sys.argv),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="WRN-28-2 alone, short windows: under three minutes")
    parser.add_argument("--json", type=Path, metavar="FILE")
    sample = os.environ.get("FASTSSL_TEST_DATA")
    parser.add_argument("--cifar10", default=os.environ.get("FASTSSL_TEST_CIFAR10"), metavar="DIR")
    parser.add_argument("--imagenet", default=sample and f"{sample}/imagenet-sample", metavar="DIR")
    arguments = parser.parse_args()
    rounds, seconds, budget_s = (5, 1.0, 150.0) if arguments.quick else (7, 6.0, float("inf"))

    device = torch.device("cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    keep_freed_memory()
    start = time.perf_counter()
    problems = [(wrn_problem(16, device), arguments.cifar10)]
    if not arguments.quick:
        problems.append((rn50_problem(4, 6, 1, device), arguments.imagenet))
    results = []
    for problem, data in problems:
        batch = next(real_batches(problem, data)) if data else noise_batch(problem)
        results.append(summary(problem, measure(problem, batch, CONTENDERS, rounds, seconds, start + budget_s)))
        results[-1]["problem"]["pixels"] = "real" if data else "noise"
        show(results[-1])
    result: dict[str, Any] = {
        **results[0],
        "others": {r["problem"]["name"]: r for r in results[1:]},
        "settings": {
            **settings(device),
            "windows": len(results[0]["windows"]["fastssl"]),
            "window_s": seconds,
            "took_s": round(time.perf_counter() - start, 1),
        },
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
