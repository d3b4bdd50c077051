"""Whether kernels and steps compute what they should: everything that does not is told, with how far it is off."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks import plain as peers
from benchmarks import step as steps_of
from benchmarks.gpu.calls import Found, OutOfTime, Run, Skipped
from benchmarks.step import Build, Problem, noise_batch
from fastssl.methods.base import Facts
from fastssl.nn.encoders.wide_resnet import WideResNet
from loaders.batch import Batch

KERNEL_TESTS = (
    "tests/parity/test_lars_triton.py",
    "tests/parity/test_batch_norm_triton.py",
    "tests/ranks/test_global_batch_norm_triton.py",
    "tests/parity/test_finish_triton.py",
)
ROOT = Path(__file__).parents[2]
EXACT = 1e-9  # float64
NUM_STEPS = 16  # more than a graph needs to warm up
TIMES_NUDGED = 10.0  # a loss may be as many times as far from eager's as one of pixels that rounding nudged
NUDGES = {"fp32": (1e-7, 1e-5), "bf16": (2**-8, 5e-3), "fp16": (2**-11, 1e-3)}  # of pixels; least limit of a loss


def kernels(run: Run) -> Found:
    """The tests that hold every Triton kernel to its reference, on this device."""
    if run.device.type == "cpu" and (why := no_interpreter()):
        raise Skipped(f"without a card kernels are interpreted, and {why}")
    tests = KERNEL_TESTS[:1] if run.toy else KERNEL_TESTS
    workers = () if run.toy else ("-n", str(len(tests)))
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider", *workers, *tests]
    try:
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(30.0, run.left_s() - 10))
    except subprocess.TimeoutExpired:
        raise OutOfTime from None
    *_, last = ran.stdout.strip().splitlines() or [ran.stderr[-500:]]
    # "FILE:LINE: AssertionError: assert 0.3 < 0.1" of each that failed
    differences = re.findall(r"^\S+\.py:\d+: .*$|^E +assert .*$", ran.stdout, re.MULTILINE)
    failed = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {
        "passed": ran.returncode == 0,
        "result": last,
        "failed": failed,
        "differences": sorted(set(differences))[:50],
    }


def no_interpreter() -> str:
    """Why kernels cannot be interpreted here, if they cannot."""
    triton, numpy = (tuple(int(n) for n in version(name).split(".")[:2]) for name in ("triton", "numpy"))
    if triton < (3, 7) and numpy >= (2, 4):
        return f"Triton {triton[0]}.{triton[1]}'s interpreter does not run with NumPy {numpy[0]}.{numpy[1]}"
    return ""


def steps(run: Run) -> Found:
    """Gradients in float64, relative to the largest; losses of several steps, in the precisions that recipes use."""
    found = run.found
    exact = replace(toy_problem(run.device), dtype=torch.float64)
    exact = replace(exact, config=replace(exact.config, precision="fp32"))
    reference = gradients(steps_of.fastssl_eager, exact)
    for name, build in {"authors": steps_of.authors, "compiled": steps_of.fastssl}.items():
        apart = partial(lambda build: difference(gradients(build, exact), reference), build)
        run.once(f"{name}, float64 gradients", partial(told, apart, EXACT))
    builds = {"compiled": steps_of.fastssl, "recomputed": steps_of.fastssl_recomputed}
    builds |= {"graphed": steps_of.fastssl_graphed} if run.device.type == "cuda" else {}
    for precision in ("fp32", "bf16") if not run.toy else ("fp32",):
        problem = toy_problem(run.device)
        problem = replace(problem, config=replace(problem.config, precision=precision))
        eager, limits = eager_and_limits(problem, precision)
        for name, build in builds.items():
            run.once(f"{name}, {precision} losses", partial(compared, partial(losses, build, problem), eager, limits))
    if run.device.type == "cuda":
        found["gradients that differ between two equal steps"] = bits(run.device)
    found["passed"] = all(entry["passed"] for entry in found.values() if isinstance(entry, dict) and "passed" in entry)
    return found


def toy_problem(device: torch.device) -> Problem:
    problem = steps_of.wrn_problem(16, device)
    config = replace(problem.config, encoder=WideResNet(10, 1), batch_global=4, classes_global=4, images_per_class=2)
    return replace(problem, config=config, facts=Facts(4, 3, 0), peer_trunk=lambda: peers.WideResNet(10, 1))


def told(measure: Any, limit: float) -> Found:
    """What `measure` returns beside its limit, or the error that it ended in."""
    try:
        value = measure()
    except (Exception, SystemExit) as error:
        return {"passed": False, "error": f"{type(error).__name__}: {error}"[:500]}
    return {"passed": bool(value <= limit), "difference": value, "limit": limit}


def compared(measure: Any, eager: Sequence[float], limits: Sequence[float]) -> Found:
    """Losses beside eager ones, step by step: the step at which they are farthest apart for their limit is told."""
    try:
        apart = [abs(a - b) for a, b in zip(measure(), eager, strict=True)]
    except (Exception, SystemExit) as error:
        return {"passed": False, "error": f"{type(error).__name__}: {error}"[:500]}
    worst = max(range(len(apart)), key=lambda k: _times_limit(apart[k], limits[k]))
    first = max(apart[:3])
    passed = apart[worst] <= limits[worst]
    return {
        "passed": passed,
        "difference": apart[worst],
        "limit": limits[worst],
        "at_step": worst,
        "first_three": first,
    }


def _times_limit(apart: float, limit: float) -> float:
    """A limit may be zero, where bits are compared; what is no number is beyond any."""
    if apart <= limit:
        return apart / limit if limit else 0.0
    return apart / limit if limit and math.isfinite(apart) else math.inf


def limits_of(eager: Sequence[float], nudged: Sequence[float], precision: str) -> list[float]:
    """How far the losses of a right step may be from eager ones: as far as rounding has carried any so far, several
    times."""
    limits, farthest = [], 0.0
    for a, b in zip(eager, nudged, strict=True):
        farthest = max(farthest, abs(a - b))
        limits.append(TIMES_NUDGED * farthest + NUDGES[precision][1] * max(1.0, abs(a)))
    return limits


def eager_and_limits(problem: Problem, precision: str) -> tuple[list[float], list[float]]:
    eager, nudged = (losses(steps_of.fastssl_eager, problem, 1 + by) for by in (0.0, NUDGES[precision][0]))
    return eager, limits_of(eager, nudged, precision)


def losses(build: Build, problem: Problem, times: float = 1.0) -> list[float]:
    batch = nudged(noise_batch(problem), times)
    contender = build(problem, batch)
    return [float(contender.step(step, contender.formed(batch))) for step in range(NUM_STEPS)]


def nudged(batch: Batch, times: float) -> Batch:
    for part in batch.parts.values():
        for x in part.x.values():
            x.mul_(times)
    return batch


def gradients(build: Build, problem: Problem) -> list[torch.Tensor]:
    batch = noise_batch(problem)
    contender = build(problem, batch)
    contender.loss(contender.formed(batch)).backward()
    return [p.grad for p in contender.net.parameters() if p.grad is not None]


def difference(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    largest = max(float(b.abs().max()) for b in others)
    return max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True)) / largest


def bits(device: torch.device) -> str:
    """Whether a GPU's step is one to the bit: README promises that a run continues so on CPUs alone."""
    problem = steps_of.rn50_problem(16, 8, 2, device)
    some, others = (gradients(steps_of.fastssl_eager, problem) for _ in range(2))
    return f"{sum(not torch.equal(a, b) for a, b in zip(some, others, strict=True))} of {len(some)}"
