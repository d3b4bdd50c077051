"""A step captured once as a CUDA graph, and replayed: the device launches its kernels, not the host one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from loaders.batch import Batch

Parts = dict[str, Tensor]


class Graph:
    """A captured step, with the batch and the results in fixed places."""

    def __init__(self, step: Callable[[Batch], Parts], batch: Batch, stream: torch.cuda.Stream):
        """Capture `step` on `stream`, on which it has run before; nothing is done yet. (torch.optim and autograd tie
        what they keep to the stream they first ran on, and a graph must not depend on another one.)

        The loader's thread copies and allocates meanwhile, which concerns no other thread's graph: "thread_local".
        """
        self.batch = _copied(batch)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
            self.parts = step(self.batch)

    def replay(self, batch: Batch) -> Parts:
        """Do the step on `batch`; the results lie where the next replay will write."""
        for static, coming in zip(_tensors(self.batch), _tensors(batch), strict=True):
            static.copy_(coming, non_blocking=True)
        self.graph.replay()
        return self.parts


class Kept:
    """What tensors hold now, copied to the host, so that a step may be done twice."""

    def __init__(self, tensors: list[Tensor]):
        self.tensors = tensors
        self.values = [t.detach().to("cpu", copy=True) for t in tensors]

    @torch.no_grad()
    def put_back(self) -> None:
        for tensor, value in zip(self.tensors, self.values, strict=True):
            tensor.copy_(value)

    def distance(self, other: Kept, of: Kept) -> float:
        """How far the steps from `of` to this and to the `other` state are apart, in units of the latter's length."""
        apart = length = 0.0
        for own, theirs, before in zip(self.values, other.values, of.values, strict=True):
            if own.is_floating_point():
                apart += float((own.double() - theirs.double()).square().sum())
                length += float((theirs.double() - before.double()).square().sum())
        return (apart / length) ** 0.5 if length else float(apart > 0)


def _tensors(batch: Batch) -> list[Tensor]:
    found = [batch.step]
    for part in batch.parts.values():
        found += [*part.x.values(), part.ids, part.labels, part.keys, part.positions]
        found += [] if part.columns is None else [part.columns]
    return found


def _copied(batch: Batch) -> Batch:
    parts = {
        name: replace(
            part,
            x={view: x.clone() for view, x in part.x.items()},
            ids=part.ids.clone(),
            labels=part.labels.clone(),
            columns=None if part.columns is None else part.columns.clone(),
            keys=part.keys.clone(),
            positions=part.positions.clone(),
        )
        for name, part in batch.parts.items()
    }
    return Batch(parts, batch.step.clone())
