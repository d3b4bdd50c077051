"""How fast steps are and what memory they take. Contenders take turns; a window is kept as soon as it is measured."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._functorch.config

from benchmarks import step as steps_of
from benchmarks.gpu.calls import Found, Run, Skipped
from benchmarks.gpu.ranks import group_of_one
from benchmarks.gpu.right import ROOT, toy_problem
from benchmarks.step import Build, Contender, Measured, Problem, noise_batch, ours, stepping, summary
from fastssl.costs.memory_model import memory_of
from fastssl.costs.trace import trace_step
from fastssl.methods.base import Stage, Steps

# Memory traffic of an image-equivalent with batch norm, addition and ReLU in one kernel: fastssl/costs/cost.py.
FUSED_BYTES = 342e6
BANDWIDTH = {"V100": 0.9e12, "A100": 2.04e12, "H100": 3.35e12, "H200": 4.8e12}  # bytes/s, data sheets
BUILD_S = {"authors": 15, "plain": 15, "plain_compiled": 90, "fastssl": 120, "fastssl_recomputed": 120}  # guesses
Window = Callable[[Callable[[], None], float], float]


def shard(run: Run, part: int) -> Problem:
    """1/`part` of the ResNet-50 job; as a toy, a tiny network on a few images."""
    if run.toy:
        return toy_problem(run.device)
    return steps_of.rn50_problem(4096 // part, 960 // part, 7, run.device)


def lars(run: Run) -> Found:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "lars.json"
        command = [sys.executable, "-m", "benchmarks.optimizer", "--quick", "--json", str(out)]
        subprocess.run([*command, "--device", run.device.type], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        found = json.loads(out.read_text())
    faster, ms = found["authors_over_fastssl"]["wall"], found["ms_per_step"]["fastssl"]
    return {"authors_over_fastssl": faster, "ms_per_step": ms, "must": "20 x, 0.5 ms on an H200", "whole": found}


def sixteenth(run: Run) -> Found:
    names = ("authors", "plain", "plain_compiled", "fastssl")
    found = measured(run, shard(run, 16), {name: steps_of.CONTENDERS[name] for name in names})
    rates = found["steps_per_s"]
    best = max(rates["plain"], rates["plain_compiled"])
    found["over_best_of_plain"] = {"measured": rates["fastssl"] / best, "must": 1.25, "moonshot": 1.5}
    found["over_authors"] = {"measured": rates["fastssl"] / rates["authors"], "must": 3.0}
    found["image_equivalents"] = {
        "measured": found["image_equivalents_per_s"]["fastssl"],
        "must": max(4_000, 1.25 * best * found["problem"]["image_equivalents"]),
        "moonshot": 6_360,
    }
    if (roof := roofline(run.device)) is not None:
        share = {name: 100 * rate / roof for name, rate in found["image_equivalents_per_s"].items()}
        found["percent_of_fused_roofline"] = {**share, "must": 30, "moonshot": 45}
    return found


def kept(run: Run) -> Found:
    """What computing batch norms again costs where memory does not ask for it."""
    if run.device.type != "cuda":
        raise Skipped("what is saved is a GPU's memory traffic")
    builds = {"fastssl": steps_of.fastssl, "fastssl_recomputed": steps_of.fastssl_recomputed}
    found = measured(run, shard(run, 16), builds)
    rates = found["steps_per_s"]
    found["over_recomputed"] = {"measured": rates["fastssl"] / rates["fastssl_recomputed"], "estimated": "1.08 to 1.12"}
    return found


def graph(run: Run) -> Found:
    if run.device.type != "cuda":
        raise Skipped("a CUDA graph needs a GPU")
    builds = {"fastssl_eager": steps_of.fastssl_eager, "fastssl_graphed": steps_of.fastssl_graphed}
    found = measured(run, shard(run, 64), builds)
    rates = found["steps_per_s"]
    found["over_eager"] = {"measured": rates["fastssl_graphed"] / rates["fastssl_eager"], "must": 1.5}
    found["ms_per_step"] = {"measured": 1000 / rates["fastssl_graphed"], "must": 48}
    found["waits"] = {name: waits(build, shard(run, 64)) for name, build in builds.items()}
    return found


def measured(run: Run, problem: Problem, builds: dict[str, Build], window: Window | None = None) -> Found:
    """`benchmarks.step.summary` of `run.rounds` windows of each contender; those that an earlier call has measured
    count. Raises OutOfTime, all that was measured kept, where the rest must wait."""
    window = window or (steps_of.gpu_window if run.device.type == "cuda" else steps_of.cpu_window)
    windows = run.found.setdefault("windows", {name: [] for name in builds})
    first_step_s = run.found.setdefault("first_step_s", {})
    if any(len(windows[name]) < run.rounds for name in builds):
        batch, steps = noise_batch(problem), {}
        for name, build in builds.items():
            run.need(first_step_s.get(name, 0 if run.toy else BUILD_S.get(name, 120)))
            begun = run.clock()
            # What one contender tells the compiler must not reach the others.
            with torch._functorch.config.patch(aggressive_recomputation=False):
                steps[name] = stepping(build(problem, batch), batch)
                window(steps[name], 0.0)
            first_step_s[name] = max(first_step_s.get(name, 0.0), run.clock() - begun)  # later calls find code compiled
            run.keep()
        for number in range(run.rounds):
            names = list(builds)
            for name in names[number % len(names) :] + names[: number % len(names)]:
                if len(windows[name]) > number:
                    continue
                run.need(1.5 * run.window_s)
                window(steps[name], 0.0)  # its weights and buffers come back into the caches
                windows[name].append(window(steps[name], run.window_s))
                run.keep()
                gc.collect()
                if run.device.type == "cuda":
                    torch.cuda.empty_cache()
    of_all = {name: Measured(windows[name], first_step_s[name]) for name in builds}
    return {**run.found, **summary(problem, of_all)}


def waits(build: Build, problem: Problem) -> str:
    """What in a step, once it runs as it will, waits for the device: nothing, it is hoped."""
    batch = noise_batch(problem)
    step = stepping(build(problem, batch), batch)
    for _ in range(16):
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        return "nothing"
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def eighth(run: Run) -> Found:
    """The memory of a 1/8 shard, beside the model's; compiled also within DDP, whose buckets cut the network."""
    problem, found = shard(run, 8), run.found
    found["model"] = modelled_gib(problem)
    if run.device.type != "cuda":
        raise Skipped("the device's memory is asked for")
    found["gib_there"] = torch.cuda.get_device_properties(run.device).total_memory / 2**30
    for how in ("compiled", "compiled-whole", "eager-recompute", "eager"):
        if how not in found:
            run.need(120 if how.startswith("compiled") else 30)
            build = partial(ours, how=how.removesuffix("-whole"), keeps_all=how.endswith("-whole"))  # type: ignore[arg-type]
            found[how] = peak_gib(build, problem)
            run.keep()
    if "compiled, in DDP" not in found:
        run.need(150)
        with group_of_one(run.device):
            found["compiled, in DDP"] = peak_gib(partial(ours, how="compiled", keeps_all=False), problem)
    found["over_model"] = {
        how: found[how] / found["model"][how.partition(",")[0]]
        for how in ("compiled", "compiled, in DDP", "compiled-whole", "eager-recompute", "eager")
        if isinstance(found[how], float)
    }
    found["must"] = "0.9 to 1.1"
    return found


def modelled_gib(problem: Problem) -> dict[str, float]:
    """What the memory model says of tensors alone: weights, batch, activations."""
    stage = Stage("step", problem.config, Steps(1))
    memory = memory_of(trace_step(stage, problem.facts, 1))
    fixed = memory.state_bytes + memory.batch_bytes + memory.workspace_bytes
    return {how: (fixed + kept) / 2**30 for how, kept in memory.activations.items()}


def peak_gib(build: Callable[[Problem, Any], Contender], problem: Problem) -> float | str:
    """The most memory that tensors took during a few steps, their weights and batch included."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        batch = noise_batch(problem)
        step = stepping(build(problem, batch), batch)
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**30
    except torch.cuda.OutOfMemoryError:
        return "does not fit"


def roofline(device: torch.device) -> float | None:
    """Image-equivalents a second at which a step with fused batch norm fills the memory's bandwidth."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((bandwidth / FUSED_BYTES for card, bandwidth in BANDWIDTH.items() if card in name), None)
