"""Batch norm over the batch of all ranks, of several resolutions at once, with shortcut and ReLU.

`torch.nn.SyncBatchNorm` refuses CPU tensors and stops the host once a layer. This one sends sums: for R resolutions in
lockstep, a layer's forward pass costs one all-reduce of R (2C+1) float64 numbers, its backward pass one of R 2C, and
the host waits for neither. Each resolution keeps statistics of its own.

The mathematics stand in `fused`, what touches a whole tensor in `passes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl import dist
from fastssl.nn.norm.fused import Fused, FusedForwardMode, Statistics
from fastssl.nn.norm.passes import finish, on_kernels

BatchNormMode = Literal["train", "local", "frozen"]


class GlobalBatchNorm(_BatchNorm):
    """Batch norm of [N, C] or [N, C, H, W] with the statistics of all ranks' rows together; ranks may differ in N.

    Parameters, buffers and state-dict keys are `nn.BatchNorm2d`'s, and so are the values: on every rank, the output,
    the gradient with respect to the input and the running statistics are those of `nn.BatchNorm2d` on the concatenated
    batch. Running variance is the unbiased one (SimCLRv2's TensorFlow code keeps the biased one). Weight and bias get
    their gradient from this rank's rows only, as any other parameter does: DDP averages it.

    Input float32, float64, bfloat16 or float16; statistics float32 (float64 for float64); output like the input,
    memory format included. In training mode all ranks must call the same layers in the same order.

    Alone on a CPU, neither compiled nor in forward mode, it is torch's own kernel.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True) -> None:
        super().__init__(num_features, eps, momentum, affine)
        self.update_running_stats = True  # `frozen_running_stats` turns it off for a while
        self.mode: BatchNormMode = "train"  # `set_batch_norm_mode` changes it

    def forward(self, input: Tensor) -> Tensor:
        return self.lockstep([input])[0]

    def lockstep(
        self, xs: Sequence[Tensor], residuals: Sequence[Tensor] | None = None, *, relu: bool = False
    ) -> list[Tensor]:
        """Norm of each x with its own statistics, plus its residual, then ReLU: what as many passes would return.

        Running statistics change as in passes in the order of `xs`, so the last weighs most. A residual has its x's
        shape and dtype. Raises ValueError for another shape, and in training where a rank's x has no row, or x one row
        in all.
        """
        for x in xs:
            self._check_input_dim(x)
        for x, residual in zip(xs, residuals or (), strict=residuals is not None):
            if (residual.shape, residual.dtype) != (x.shape, x.dtype):
                raise ValueError(f"{residual.dtype} {residual.shape} added to the norm of {x.dtype} {x.shape}")
        if self._by_batch and (self._num_ranks > 1 or _must_be_ours() or on_kernels(*xs)):
            return self._fused(xs, residuals or (), relu)
        ys = [self._by_torch(x) for x in xs]
        return [finish(y, residual, relu) for y, residual in zip(ys, residuals or len(ys) * [None], strict=True)]

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4) or input.shape[1] != self.num_features:
            raise ValueError(f"expected [N, {self.num_features}] or [N, {self.num_features}, H, W], got {input.shape}")
        if self._by_batch and input.numel() == 0:
            raise ValueError("empty batch on this rank: batch norm needs at least one row on every rank")
        if self._by_batch and input.numel() == self.num_features and self._num_ranks == 1:
            raise ValueError("batch norm needs more than one row to have a variance")

    @property
    def _by_batch(self) -> bool:
        """Whether the batch's statistics count now, and not the running ones."""
        return self.training and self.mode != "frozen"

    @property
    def _num_ranks(self) -> int:
        """Whose rows make the batch."""
        return 1 if self.mode == "local" else dist.world_size()

    def _by_torch(self, x: Tensor) -> Tensor:
        if self._by_batch and self.update_running_stats:
            self.num_batches_tracked.add_(1)
        unread = self._by_batch and not self.update_running_stats
        running_mean_C, running_var_C = (None, None) if unread else (self.running_mean, self.running_var)
        return F.batch_norm(
            x, running_mean_C, running_var_C, self.weight, self.bias, self._by_batch, self.momentum, self.eps
        )

    def _fused(self, xs: Sequence[Tensor], residuals: Sequence[Tensor], relu: bool) -> list[Tensor]:
        group_name = dist.statistics_group().group_name if self._num_ranks > 1 else None
        ys, (mean_RC, var_RC, n_R1) = self._normalised(xs, residuals, relu, group_name)
        if self.update_running_stats:
            self._follow(mean_RC, var_RC * (n_R1 / (n_R1 - 1)))
        return ys

    def _normalised(
        self, xs: Sequence[Tensor], residuals: Sequence[Tensor], relu: bool, group_name: str | None
    ) -> tuple[list[Tensor], Statistics]:
        """`lockstep`'s ys and the statistics behind them, of the named group of ranks or of this rank's rows alone."""
        weight_C = self.weight if self.affine else torch.ones_like(self.running_mean)
        bias_C = self.bias if self.affine else torch.zeros_like(self.running_mean)
        # Dynamo takes no Function that has a jvp, and needs none.
        function = Fused if torch.compiler.is_compiling() else FusedForwardMode
        *ys, statistics = function.apply(self.eps, relu, group_name, len(xs), weight_C, bias_C, *xs, *residuals)  # type: ignore[no-untyped-call]
        return ys, Statistics.split(statistics)

    def _follow(self, mean_RC: Tensor, unbiased_var_RC: Tensor) -> None:
        """Move the running statistics as in one pass after the other."""
        for mean_C, var_C in zip(mean_RC, unbiased_var_RC, strict=True):
            self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(var_C.to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked.add_(len(mean_RC))


def _must_be_ours() -> bool:
    """Whether torch's own kernel will not do: its in-place statistics cannot be compiled, and its forward-mode
    derivatives not be traced on tensors without elements, as dry runs do."""
    return torch.compiler.is_compiling() or forward_ad._current_level >= 0
