"""What a training step must show on a GPU, in one run of less than ten minutes: right first, then fast.

    python -m benchmarks.gpu [PART ...] [--json FILE] [--budget-s 570] [--dry-run]

kernels   every Triton kernel (finish, batch norm, LARS) against float64 references: the tests that hold them to these
steps     our step eager, compiled and replayed from a graph, and the authors': the same losses and gradients
lars      `benchmarks.optimizer`
sixteenth a 1/16 shard of `paws.rn50_100ep` (256 + 420 images): the authors', plain, plain compiled, ours
graph     a 1/64 shard (64 + 105): ours eager and replayed from a graph; one step that must not wait for the device
eighth    a 1/8 shard (512 + 840): the memory that a step needs, compiled, recomputed and eager

Parts run in this order, as far as the budget lasts; what is left out is said, can be asked for by name in a later run,
and is added to what FILE holds already. Pixels are noise. Windows last 20 seconds; contenders take turns.

--dry-run goes the same way at toy sizes, without a GPU too: parts that need one say so.
"""

# ruff: noqa: E402
from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `fastssl` sets it; read when torch is loaded

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import plain as peers
from benchmarks import step as steps_of
from benchmarks.step import Build, Contender, Problem, measure, noise_batch, ours, stepping, summary
from fastssl.methods.base import Facts
from fastssl.nn.encoders import WideResNet

# Memory traffic of an image-equivalent with batch norm, addition and ReLU in one kernel: fastssl/costs/cost.py.
FUSED_BYTES = 342e6
BANDWIDTH = {"V100": 0.9e12, "A100": 2.04e12, "H100": 3.35e12, "H200": 4.8e12}  # bytes/s, data sheets
KERNEL_TESTS = (
    "tests/parity/test_lars_triton.py",
    "tests/parity/test_batch_norm_triton.py",
    "tests/ranks/test_global_batch_norm_triton.py",
    "tests/parity/test_finish_triton.py",
)
ROOT = Path(__file__).parents[1]

Found = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Where this runs, at full or at toy size."""

    device: torch.device
    toy: bool
    rounds: int = 3
    window_s: float = 20.0

    def shard(self, part: int) -> Problem:
        """1/`part` of the ResNet-50 job; as a toy, a tiny network on a few images."""
        if self.toy:
            return toy_problem(self.device)
        return steps_of.rn50_problem(4096 // part, 960 // part, 7, self.device)


def toy_problem(device: torch.device) -> Problem:
    problem = steps_of.wrn_problem(16, device)
    config = replace(problem.config, encoder=WideResNet(10, 1), batch_global=4, classes_global=4, images_per_class=2)
    return replace(problem, config=config, facts=Facts(4, 3, 0), peer_trunk=lambda: peers.WideResNet(10, 1))


class Skipped(Exception):
    """Why a part did not run."""


# ------------------------------------------------------------------------------------------------------------ right


def kernels(run: Run) -> Found:
    tests = KERNEL_TESTS[:1] if run.toy else KERNEL_TESTS
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    *_, last = ran.stdout.strip().splitlines() or [ran.stderr]
    failed = [line for line in ran.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {"passed": ran.returncode == 0, "result": last, "failed": failed}


def steps(run: Run) -> Found:
    """Largest differences: of gradients in float64 relative to the largest gradient, of losses in float32."""
    exact = replace(toy_problem(run.device), dtype=torch.float64)
    exact = replace(exact, config=replace(exact.config, precision="fp32"))
    reference = gradients(steps_of.fastssl_eager, exact)
    found = {
        "authors": difference(gradients(steps_of.authors, exact), reference),
        "compiled": difference(gradients(steps_of.fastssl, exact), reference),
    }
    if run.device.type == "cuda":
        single = replace(exact, dtype=torch.float32)
        graphed, eager = (losses(build, single) for build in (steps_of.fastssl_graphed, steps_of.fastssl_eager))
        found["graphed_losses"] = max(abs(a - b) for a, b in zip(graphed, eager, strict=True))
    passed = found["authors"] < 1e-9 and found["compiled"] < 1e-9 and found.get("graphed_losses", 0.0) < 1e-3
    return {**found, "passed": passed}


def gradients(build: Build, problem: Problem) -> list[torch.Tensor]:
    batch = noise_batch(problem)
    contender = build(problem, batch)
    contender.loss(contender.formed(batch)).backward()
    return [p.grad for p in contender.net.parameters() if p.grad is not None]


def difference(some: list[torch.Tensor], others: list[torch.Tensor]) -> float:
    largest = max(float(b.abs().max()) for b in others)
    return max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True)) / largest


def losses(build: Build, problem: Problem, num: int = 16) -> list[float]:
    """Of more steps than a graph needs to warm up."""
    batch = noise_batch(problem)
    contender = build(problem, batch)
    return [float(contender.step(step, contender.formed(batch))) for step in range(num)]


# ------------------------------------------------------------------------------------------------------------- fast


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
    found = measured(run, run.shard(16), {name: steps_of.CONTENDERS[name] for name in names})
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


def graph(run: Run) -> Found:
    if run.device.type != "cuda":
        raise Skipped("a CUDA graph needs a GPU")
    builds = {"fastssl_eager": steps_of.fastssl_eager, "fastssl_graphed": steps_of.fastssl_graphed}
    found = measured(run, run.shard(64), builds)
    rates = found["steps_per_s"]
    found["over_eager"] = {"measured": rates["fastssl_graphed"] / rates["fastssl_eager"], "must": 1.5}
    found["ms_per_step"] = {"measured": 1000 / rates["fastssl_graphed"], "must": 48}
    found["waits"] = {name: waits(build, run.shard(64)) for name, build in builds.items()}
    return found


def measured(run: Run, problem: Problem, builds: dict[str, Build]) -> Found:
    return summary(problem, measure(problem, noise_batch(problem), builds, run.rounds, run.window_s))


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
    if run.device.type != "cuda":
        raise Skipped("the device's memory is asked for")
    found: Found = {"gib_there": torch.cuda.get_device_properties(run.device).total_memory / 2**30}
    for how in ("compiled", "eager-recompute", "eager"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            found[how] = peak_gib(lambda problem, batch, how=how: ours(problem, batch, how), run.shard(8))
        except torch.cuda.OutOfMemoryError:
            found[how] = "does not fit"
    return found


def peak_gib(build: Callable[[Problem, Any], Contender], problem: Problem) -> float:
    """The most memory that tensors took during a few steps, their weights and batch included."""
    batch = noise_batch(problem)
    step = stepping(build(problem, batch), batch)
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


def roofline(device: torch.device) -> float | None:
    """Image-equivalents a second at which a step with fused batch norm fills the memory's bandwidth."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((bandwidth / FUSED_BYTES for card, bandwidth in BANDWIDTH.items() if card in name), None)


# ------------------------------------------------------------------------------------------------------------ parts

PARTS: dict[str, tuple[Callable[[Run], Found], float]] = {  # and the seconds that each may take
    "kernels": (kernels, 120),
    "steps": (steps, 60),
    "lars": (lars, 30),
    "sixteenth": (sixteenth, 450),
    "graph": (graph, 300),
    "eighth": (eighth, 150),
}


def show(name: str, found: Found) -> None:
    if "steps_per_s" in found:
        steps_of.show(found)
    hidden = {"steps_per_s", "image_equivalents_per_s", "compile_s", "ratios", "windows", "problem", "whole"}
    for key, value in found.items():
        if key not in hidden:
            print(f"{name}: {key}: {value}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} [all]")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--budget-s", type=float, default=570.0)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if not torch.cuda.is_available() and not arguments.dry_run:
        parser.error("no GPU here: --dry-run goes the same way without one")

    begun = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    run = Run(device, True, rounds=1, window_s=0.1) if arguments.dry_run else Run(device, False)
    held = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}
    for name, (part, needs_s) in PARTS.items():
        if arguments.parts and name not in arguments.parts:
            continue
        start = time.perf_counter()
        left_s = arguments.budget_s - (start - begun)
        try:
            if left_s < needs_s and not arguments.dry_run:
                raise Skipped(f"it may take {needs_s:.0f} s, {left_s:.0f} s are left: ask for it in another run")
            found = {**part(run), "took_s": round(time.perf_counter() - start, 1)}
        except Skipped as why:
            print(f"{name}: left out: {why}", flush=True)
            continue
        show(name, found)
        held[name] = {**found, "settings": steps_of.settings(device)}
        if arguments.json:
            arguments.json.write_text(json.dumps(held, indent=1) + "\n")
        if found.get("passed") is False:
            raise SystemExit(f"{name} failed: nothing is timed")


if __name__ == "__main__":
    main()
