"""Steps that are not finite: noted on the device, so that no step waits for it; left out once, where that is wished;
and described in a file that `fastssl replay` reproduces them from."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastssl import dist
from fastssl.config.plain import to_plain
from fastssl.methods.base import Nets, Stage
from fastssl.run_dir.checkpoint import Checkpoints
from loaders.files import write_file
from loaders.plan.plan import BoundPlan


class FirstNotFinite:
    """The first step of this rank whose loss or weights were not finite, with the parts of its loss."""

    def __init__(self, total_steps: int, device: torch.device):
        self.step = torch.full((), total_steps, device=device)  # total_steps: none yet
        self.total_steps = total_steps
        self._names: list[str] = []
        self._values: Tensor | None = None

    def note_loss(self, step: int, parts: dict[str, Tensor], forgiven: Tensor | None = None) -> None:
        """Remember `step` where its total is not finite, and not `forgiven` (0-dim bool)."""
        fine = parts["total"].isfinite()
        if forgiven is not None:
            fine = fine | forgiven
        self._names, values = sorted(parts), torch.stack([parts[name].float() for name in sorted(parts)])
        seen = self._values if self._values is not None else torch.zeros_like(values)
        self._values = torch.where(fine | (self.step < self.total_steps), seen, values)
        self.step = torch.where(fine, self.step, self.step.clamp(max=step))

    def note_weights(self, step: int, nets: Nets[Any]) -> None:
        """Remember `step`, which was the last, where weights are not finite after it."""
        finite = torch.stack([p.isfinite().all() for p in nets.online.parameters()]).all()
        self.step = torch.where(finite, self.step, self.step.clamp(max=step))

    def loss(self) -> dict[str, float | str]:
        """The parts of that step's loss on this rank; all 0 where another rank's was not finite, or the weights were
        not. What JSON has no number for is a word. Waits for the device."""
        values = self._values.tolist() if self._values is not None else []
        return {name: v if math.isfinite(v) else str(v) for name, v in zip(self._names, values, strict=True)}


class LeftOut:
    """Undoes one step whose loss is not finite on some rank, as if its batch had not been: weights, statistics,
    averages, queues and momenta are put back. Copies and choices are made on the device; they cost two passes over that
    memory a step, and as much memory again."""

    def __init__(self, nets: Nets[Any], optimizer: Optimizer, device: torch.device):
        self.nets, self.optimizer = nets, optimizer
        self.num_steps = torch.zeros((), dtype=torch.int64, device=device)  # 0 or 1
        self._before: dict[str, Tensor] = {}

    @torch.no_grad()
    def remember(self) -> None:
        """Call before the step."""
        for name, tensor in self._live().items():
            kept = self._before.get(name)
            if kept is None:
                kept = self._before[name] = torch.empty_like(tensor)
            kept.copy_(tensor)

    @torch.no_grad()
    def undo_if_not_finite(self, loss: Tensor) -> Tensor:
        """Call after the step. Whether it was undone; 0-dim bool, equal on all ranks."""
        all_finite = dist.least_over_ranks(loss.isfinite().to(torch.int32)).bool()
        undone = ~all_finite & (self.num_steps == 0)
        for name, tensor in self._live().items():
            before = self._before.get(name)  # a momentum that the step has made was 0 before it
            tensor.copy_(torch.where(undone, torch.zeros_like(tensor) if before is None else before, tensor))
        self.num_steps += undone
        return undone

    def _live(self) -> dict[str, Tensor]:
        """Every tensor that a step may change, by where it is."""
        states = {name: module.state_dict() for name, module in self.nets.saved().items()}
        return _tensors({**states, "optimizer": self.optimizer.state_dict()["state"]})


def _tensors(value: Any, path: str = "") -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {path: value}
    if isinstance(value, dict):
        return {p: t for key, part in value.items() for p, t in _tensors(part, f"{path}.{key}").items()}
    return {}


def describe(folder: Path, step: int, found: FirstNotFinite, stage: Stage, plan: BoundPlan, saved: Checkpoints) -> Path:
    """Write into `folder` what it takes to do `step` again, and what its loss was on each rank. All ranks must call it;
    the first one writes."""
    losses = dist.gather_objects(found.loss())
    path = folder / f"nonfinite-step-{step + 1:08d}.json"
    before = [s for s in saved.steps() if s <= step]
    if dist.is_main():
        content = {
            "stage": stage.name,
            "step": step,  # of the plan: as many are done before it
            "seed": plan.asked.seed,
            "checkpoint": saved.path(before[-1]).name if before else None,
            "ranks": dist.world_size(),
            "device": found.step.device.type,
            "loss_by_rank": losses,
            "ids": {stream.name: plan.rows(stream.name, step).ids.tolist() for stream in plan.asked.streams},
            "config": to_plain(stage),
        }
        write_file(path, json.dumps(content, indent=2) + "\n")
    return path
