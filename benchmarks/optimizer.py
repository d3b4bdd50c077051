"""What a LARS step costs on ResNet-50 with PAWS's heads: 177 tensors, 38.2 million numbers, 62 tensors adapted.

    python -m benchmarks.optimizer [--quick] [--json FILE] [--device cpu|cuda]

Every contender has weights and momenta of its own and takes the same steps on the same gradients, which are put in
place anew before each step, off the clock. They go in turns: each round gives each of them one window of steps, and the
first round is dropped. Reported are medians over windows of milliseconds a step (on a GPU between events of the stream,
so launching and waiting count where the GPU idles) and of the host's CPU milliseconds; and for one step the operators
that torch dispatches, how often the host waits for a tensor's value and, on a GPU, the kernels and copies that run.

authors          as PAWS's released code behaves (facebookresearch/suncet): tensor by tensor, the host asks for norms
timm_rule        timm's `Lars`: `torch.where` in place of questions, still tensor by tensor; rate outside the momentum
nvidia_apex      NVIDIA apex's LARC around torch's SGD, where an apex is installed that still has it; rate outside
fastssl_foreach  ours without Triton, on a GPU; on a CPU that is what fastssl runs
fastssl          `fastssl.optim.lars.LarsOptimizer`
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.machine import commit, cpu_model
from fastssl.nn.heads import prediction_head, projection_head
from fastssl.nn.trunks.resnet import resnet
from fastssl.optim.lars import Foreach, LarsOptimizer
from fastssl.optim.param_groups import lars_groups

MOMENTUM, DECAY, TRUST, EPS = 0.9, 1e-6, 0.001, 1e-8  # PAWS on ImageNet
MUST_BE_FASTER, MUST_MS = 20.0, 0.5  # on an H200, than the authors'

Groups = list[dict[str, Any]]  # `lars_groups`: [adapted, excluded], "params" of (name, parameter)
Step = Callable[[float], Any]  # takes the rate


def paws_resnet50() -> nn.Module:
    """Channels-last, initialised from seed 0."""
    torch.manual_seed(0)
    parts = {"trunk": resnet(50), "proj": projection_head(2048, 2048), "pred": prediction_head(2048)}
    return nn.ModuleDict(parts).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def parameters(group: dict[str, Any]) -> list[nn.Parameter]:
    return [p for _, p in group["params"]]


# ------------------------------------------------------------------------------------------------------- contenders


class Spread:
    """Last, sum, greatest and least of the ratios of a step, which the authors keep for their log."""

    def __init__(self) -> None:
        self.sum, self.greatest, self.least = 0.0, float("-inf"), float("inf")

    def add(self, value: Any) -> None:
        self.greatest = max(value, self.greatest)  # comparing tensors asks the host, twice
        self.least = min(value, self.least)
        self.sum = self.sum + value


def authors(groups: Groups) -> Step:
    adapted, excluded = (parameters(group) for group in groups)
    momenta: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def step(lr: float) -> Spread:
        spread = Spread()
        for p in adapted:
            assert p.grad is not None
            weight_norm, grad_norm = torch.norm(p.data), torch.norm(p.grad.data)
            if weight_norm != 0 and grad_norm != 0:
                ratio = TRUST * weight_norm / (grad_norm + weight_norm * DECAY + EPS)
                spread.add(ratio)
                p.grad.data += DECAY * p.data
                p.grad.data *= ratio
        for p in [*adapted, *excluded]:
            assert p.grad is not None
            p.grad.mul_(-lr)
            if p in momenta:
                momenta[p].mul_(MOMENTUM).add_(p.grad)
            else:
                momenta[p] = p.grad.clone()
            p.add_(momenta[p])
        return spread

    return step


def timm_rule(groups: Groups) -> Step:
    adapted, excluded = (parameters(group) for group in groups)
    momenta: dict[nn.Parameter, Tensor] = {}
    one = torch.ones((), device=adapted[0].device)

    @torch.no_grad()
    def step(lr: float) -> None:
        for p in adapted:
            assert p.grad is not None
            weight_norm, grad_norm = p.norm(), p.grad.norm()
            ratio = TRUST * weight_norm / (grad_norm + weight_norm * DECAY + EPS)
            ratio = torch.where(weight_norm > 0, torch.where(grad_norm > 0, ratio, one), one)
            p.grad.add_(p, alpha=DECAY).mul_(ratio)
        for p in [*adapted, *excluded]:
            assert p.grad is not None
            if p in momenta:
                momenta[p].mul_(MOMENTUM).add_(p.grad)
            else:
                momenta[p] = p.grad.clone()
            p.add_(momenta[p], alpha=-lr)

    return step


def has_nvidia_apex() -> bool:
    """Whether the apex that an import would find is NVIDIA's and still has LARC; PyPI's is an unrelated web toolkit.
    Nothing is imported."""
    spec = importlib.util.find_spec("apex")
    folders = (spec.submodule_search_locations if spec else None) or []
    return any((Path(folder) / "parallel" / "LARC.py").is_file() for folder in folders)


def nvidia_apex(groups: Groups) -> Step:
    from apex.parallel.LARC import LARC

    adapted, excluded = (parameters(group) for group in groups)
    inner = torch.optim.SGD(adapted, lr=0.0, momentum=MOMENTUM, weight_decay=DECAY)
    optimizers = LARC(inner, TRUST, clip=False, eps=EPS), torch.optim.SGD(excluded, lr=0.0, momentum=MOMENTUM)

    def step(lr: float) -> None:
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()

    return step


def fastssl_foreach(groups: Groups) -> Step:
    form = Foreach([parameters(group) for group in groups])
    settings = {"momentum": MOMENTUM, "weight_decay": DECAY, "trust_coefficient": TRUST, "eps": EPS, "form": "paws"}

    @torch.no_grad()
    def step(lr: float) -> None:
        form.step([{**settings, "lr": lr, "lars_exclude": group["lars_exclude"]} for group in groups], None, None)

    return step


def fastssl(groups: Groups) -> Step:
    optimizer = LarsOptimizer(groups, lr=0.0, momentum=MOMENTUM, weight_decay=DECAY, trust_coefficient=TRUST, eps=EPS)

    def step(lr: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()

    return step


def contenders(device: torch.device) -> dict[str, Callable[[Groups], Step]]:
    """Those that this machine has."""
    found = {"authors": authors, "timm_rule": timm_rule}
    if has_nvidia_apex():
        found["nvidia_apex"] = nvidia_apex
    if device.type == "cuda":
        found["fastssl_foreach"] = fastssl_foreach
    return {**found, "fastssl": fastssl}


# -------------------------------------------------------------------------------------------------------- measuring


class Runner:
    """One contender with its own copy of the weights; all are given the same gradients and rates."""

    def __init__(self, make: Callable[[Groups], Step], build: Callable[[], nn.Module], device: torch.device):
        groups = lars_groups(build().to(device), "authors")
        self.params = [p for group in groups for p in parameters(group)]
        generator = torch.Generator().manual_seed(1)
        self.gradients = [(torch.randn(p.shape, generator=generator) * 1e-3).to(p) for p in self.params]
        for p in self.params:
            p.grad = torch.empty_like(p)
        self.device, self.step, self.num_steps = device, make(groups), 0

    def prepare(self) -> float:
        """Put the gradients in place; returns the step's rate, which moves."""
        torch._foreach_copy_([p.grad for p in self.params], self.gradients)
        self.num_steps += 1
        return 0.3 + 0.01 * self.num_steps

    def window(self, num_steps: int) -> tuple[float, float]:
        """Milliseconds a step, and CPU milliseconds of this process."""
        timed = [self._timed() for _ in range(num_steps)]
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return sum(wall_ms() for wall_ms, _ in timed) / num_steps, sum(cpu_ms for _, cpu_ms in timed) / num_steps

    def _timed(self) -> tuple[Callable[[], float], float]:
        """Take a step; how long it took, to be asked once the device is done, and its CPU milliseconds."""
        lr = self.prepare()
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cpu_s = time.process_time()
            begin.record()
            self.step(lr)
            end.record()
            return lambda: begin.elapsed_time(end), 1e3 * (time.process_time() - cpu_s)
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        self.step(lr)
        wall_ms = 1e3 * (time.perf_counter() - wall_s)
        return lambda: wall_ms, 1e3 * (time.process_time() - cpu_s)


class Count(TorchDispatchMode):
    """The operators that torch dispatches, and how many of them wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.dispatches = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        self.dispatches += not name.startswith("_record_function")  # torch.optim's marker for profilers
        self.waits += name.startswith(("_local_scalar_dense", "nonzero"))
        return func(*args, **(kwargs or {}))


def count(runner: Runner) -> dict[str, int]:
    """Of one step in full flight."""
    lr = runner.prepare()
    with Count() as counted:
        runner.step(lr)
    found = {"dispatches": counted.dispatches, "host_waits": counted.waits}
    if runner.device.type == "cuda":
        lr = runner.prepare()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            runner.step(lr)
            torch.cuda.synchronize()
        on_device = torch.autograd.DeviceType.CUDA
        found["kernels"] = sum(event.device_type == on_device for event in profile.events())
    return found


def measure(runners: dict[str, Runner], rounds: int, steps: int) -> dict[str, np.ndarray]:
    """Milliseconds a step [rounds, 2], wall and CPU, of each; every round starts with another one."""
    names = list(runners)
    windows: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for k in range(rounds + 1):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            windows[name].append(runners[name].window(steps))
    return {name: np.array(rows[1:]) for name, rows in windows.items()}


def difference(ours: Runner, theirs: Runner) -> float:
    """Largest ‖w - w'‖ / ‖w'‖ of any tensor."""
    assert ours.num_steps == theirs.num_steps
    pairs = zip(ours.params, theirs.params, strict=True)
    with torch.no_grad():
        return max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)


def summary(windows: dict[str, np.ndarray], counts: dict[str, dict[str, int]]) -> dict[str, Any]:
    faster = windows["authors"] / windows["fastssl"]
    middle = {name: np.median(ms, axis=0).tolist() for name, ms in windows.items()}
    return {
        "ms_per_step": {name: wall for name, (wall, _) in middle.items()},
        "cpu_ms_per_step": {name: cpu for name, (_, cpu) in middle.items()},
        "authors_over_fastssl": {
            "wall": float(np.median(faster[:, 0])),
            "wall_least": float(faster[:, 0].min()),
            "cpu": float(np.median(faster[:, 1])),
        },
        "must_on_h200": {"authors_over_fastssl": MUST_BE_FASTER, "ms_per_step": MUST_MS},
        "per_step": counts,
        "windows": {name: ms.round(3).tolist() for name, ms in windows.items()},
    }


def show(result: dict[str, Any]) -> None:
    kinds = list(next(iter(result["per_step"].values())))
    print(f"{'':16}{'ms/step':>10}{'least to most':>20}{'CPU ms':>10}" + "".join(f"{kind:>12}" for kind in kinds))
    for name, ms in sorted(result["ms_per_step"].items(), key=lambda row: -row[1]):
        walls = [wall for wall, _ in result["windows"][name]]
        spread = f"{min(walls):.3f} to {max(walls):.3f}"
        counts = "".join(f"{number:12,}" for number in result["per_step"][name].values())
        print(f"{name:16}{ms:10.3f}{spread:>20}{result['cpu_ms_per_step'][name]:10.3f}" + counts)
    faster = result["authors_over_fastssl"]
    least = f"least window {faster['wall_least']:.2f}"
    print(f"authors / fastssl: {faster['wall']:.2f} x ({least}; CPU {faster['cpu']:.2f})")
    print(f"after {result['settings']['steps']} steps: weights {result['difference']:.1e} apart")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter windows: under a minute")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rounds, steps = (5, 5) if arguments.quick else (9, 15)
    if device.type == "cuda":
        steps *= 10

    start_s = time.perf_counter()
    runners = {name: Runner(make, paws_resnet50, device) for name, make in contenders(device).items()}
    windows = measure(runners, rounds, steps)
    result = summary(windows, {name: count(runner) for name, runner in runners.items()})
    result["difference"] = difference(runners["fastssl"], runners["authors"])
    result["settings"] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "windows": rounds,
        "steps_per_window": steps,
        "steps": runners["fastssl"].num_steps,
        "took_s": round(time.perf_counter() - start_s, 1),
        "commit": commit(),
        "command": " ".join(["python -m benchmarks.optimizer", *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
