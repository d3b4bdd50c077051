"""What the batch norms within a module normalise by, and whether their running statistics move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl import dist
from fastssl.nn.norm.global_batch_norm import BatchNormMode, GlobalBatchNorm


@contextmanager
def frozen_running_stats(module: nn.Module) -> Iterator[None]:
    """Within the context, training-mode passes through `module` use batch statistics and leave running ones alone.

    For passes that must not count, such as VAT's search for the adversarial direction.
    Raises TypeError where the module holds a batch norm that is not global.
    """
    for layer in module.modules():
        if isinstance(layer, _BatchNorm) and not isinstance(layer, GlobalBatchNorm):
            raise TypeError(f"can freeze the running statistics of GlobalBatchNorm only, found {type(layer).__name__}")
    with running_stats_updated({layer: False for layer in module.modules() if isinstance(layer, GlobalBatchNorm)}):
        yield


@contextmanager
def running_stats_updated(updates: Mapping[GlobalBatchNorm, bool]) -> Iterator[None]:
    """Within the context, whether training-mode passes through each of these layers move its running statistics."""
    before = {layer: layer.update_running_stats for layer in updates}

    def put(values: Mapping[GlobalBatchNorm, bool]) -> None:
        for layer, value in values.items():
            layer.update_running_stats = value

    put(updates)
    try:
        yield
    finally:
        put(before)


def set_batch_norm_mode(module: nn.Module, mode: BatchNormMode) -> None:
    """What the batch norms within `module` normalise by in training mode; weights and biases are trained in each.

    - ``"train"``: the statistics of all ranks' rows, as always;
    - ``"local"``: of this rank's rows alone, as networks that nobody synchronised. Results depend on the number of
      ranks, and running statistics differ between ranks until `average_running_stats`;
    - ``"frozen"``: the running statistics, which stay as they are.
    """
    for layer in module.modules():
        if isinstance(layer, GlobalBatchNorm):
            layer.mode = mode


@torch.no_grad()
def average_running_stats(module: nn.Module) -> None:
    """Give all ranks the mean of their running statistics, in one message; every rank must call it."""
    layers = [layer for layer in module.modules() if isinstance(layer, GlobalBatchNorm)]
    running = [buffer for layer in layers for buffer in (layer.running_mean, layer.running_var)]
    if not running:
        return
    mean = dist.mean_over_ranks(torch.cat(running))
    torch._foreach_copy_(running, mean.split([len(buffer) for buffer in running]))
