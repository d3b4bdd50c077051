"""Less memory for some arithmetic: what a residual block keeps for its backward pass, and what it computes again.

A bottleneck keeps its input, the raw outputs of its two narrow convolutions and the messages it got; the 1x1
convolutions that widen (a tenth of the products of a ResNet-50's step), batch norms and ReLUs run again. No message is
sent twice, and running statistics move once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.nn.norm.lockstep import Lockstep, LockstepSequential
from fastssl.nn.norm.running_stats import running_stats_updated

_MESSAGES = (torch.ops._c10d_functional.all_reduce.default, torch.ops._c10d_functional.wait_tensor.default)


class Blocks(LockstepSequential):
    """Residual blocks in sequence; while `recompute`, each is `recomputed` in training."""

    recompute = False

    def lockstep(self, xs: Sequence[Tensor]) -> list[Tensor]:
        again = self.recompute and self.training and torch.is_grad_enabled()
        outs = list(xs)
        for block in self:
            assert isinstance(block, Lockstep)
            outs = recomputed(block, outs) if again else block.lockstep(outs)
        return outs


def recompute_blocks(module: nn.Module, again: bool = True) -> int:
    """Let all `Blocks` within `module` recompute from now on, or no longer; how many there are."""
    groups = [m for m in module.modules() if isinstance(m, Blocks)]
    for group in groups:
        group.recompute = again
    return len(groups)


@contextmanager
def recomputing(module: nn.Module, again: bool) -> Iterator[None]:
    """Within the context, all `Blocks` within `module` recompute, or none does."""
    before = {m: m.recompute for m in module.modules() if isinstance(m, Blocks)}
    recompute_blocks(module, again)
    try:
        yield
    finally:
        for group, value in before.items():
            group.recompute = value


def recomputed(block: Lockstep, xs: Sequence[Tensor]) -> list[Tensor]:
    """`block.lockstep(xs)`, keeping little for backward: the same values, gradients and running statistics, which may
    be frozen meanwhile (`frozen_running_stats`) and free again when backward computes the block again."""
    updates = {layer: layer.update_running_stats for layer in block.modules() if isinstance(layer, GlobalBatchNorm)}

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        first, again = create_selective_checkpoint_contexts(_policy)
        return first, _leaving_buffers(block, updates, again)

    ys: list[Tensor]
    ys = checkpoint(block.lockstep, list(xs), use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    return ys


def _policy(ctx: Any, op: Callable[..., Any], *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if op in _MESSAGES:
        return CheckpointPolicy.MUST_SAVE
    if op is torch.ops.aten.convolution.default:
        out_channels, in_channels, *kernel = args[1].shape
        widens = kernel == [1, 1] and out_channels > in_channels
        return CheckpointPolicy.MUST_RECOMPUTE if widens else CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.MUST_RECOMPUTE


@contextmanager
def _leaving_buffers(
    block: Lockstep, updates: Mapping[GlobalBatchNorm, bool], context: AbstractContextManager[None]
) -> Iterator[None]:
    """`context`, in which running statistics are updated as in the first pass, and after which the block's buffers are
    what they were. (Selective checkpointing insists on the very same operations when it computes again, so running
    statistics move then, too, if they did in the first pass.)"""
    before = [buffer.clone() for buffer in block.buffers()]
    try:
        with running_stats_updated(updates), context:
            yield
    finally:
        for buffer, value in zip(block.buffers(), before, strict=True):
            buffer.data.copy_(value)  # .data: autograd may hold the buffer, and its version must not move
