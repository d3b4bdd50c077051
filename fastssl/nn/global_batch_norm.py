"""Batch norm over the batch of all ranks.

`torch.nn.SyncBatchNorm` refuses CPU tensors and stops the host once a layer. This one sends sums: a layer's forward
pass costs one all-reduce of 2C+1 float64 numbers, its backward pass one of 2C, and the host waits for neither.

Notation: x has N rows (N*H*W with images) of C channels; n is the number of rows over all ranks;
x_hat = (x - mean) * invstd, invstd = 1 / sqrt(var + eps). The derivative of x_hat with respect to x is symmetric,

    J g = invstd * (g - mean(g) - x_hat * mean(g * x_hat)),

so that reverse mode, J (weight * g), and forward mode, weight * (J dx), share their one message [sum g, sum g * x_hat].
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl import dist


class GlobalBatchNorm(_BatchNorm):
    """Batch norm of [N, C] or [N, C, H, W] with the statistics of all ranks' rows together; ranks may differ in N.

    Parameters, buffers and state-dict keys are `nn.BatchNorm2d`'s, and so are the values: on every rank, the output,
    the gradient with respect to the input and the running statistics are those of `nn.BatchNorm2d` on the concatenated
    batch. Running variance is the unbiased one (SimCLRv2's TensorFlow code keeps the biased one). Weight and bias get
    their gradient from this rank's rows only, as any other parameter does: DDP averages it.

    Input float32, float64, bfloat16 or float16; statistics float32 (float64 for float64); output like the input.
    In training mode all ranks must call the same layers in the same order, and each must hold a row: ValueError.
    Alone, it is torch's own kernel.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True) -> None:
        super().__init__(num_features, eps, momentum, affine)
        self.update_running_stats = True  # `frozen_running_stats` turns it off for a while

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in (2, 4) or input.shape[1] != self.num_features:
            raise ValueError(f"expected [N, {self.num_features}] or [N, {self.num_features}, H, W], got {input.shape}")
        if self.training and input.numel() == 0:
            raise ValueError("empty batch on this rank: batch norm needs at least one row on every rank")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not self.training:
            return self._torch_batch_norm(input, self.running_mean, self.running_var)
        if self.update_running_stats:
            self.num_batches_tracked.add_(1)
        if dist.world_size() > 1:
            return self._across_ranks(input)
        if self.update_running_stats:
            return self._torch_batch_norm(input, self.running_mean, self.running_var)
        return self._torch_batch_norm(input, None, None)

    def _torch_batch_norm(self, x: Tensor, running_mean: Tensor | None, running_var: Tensor | None) -> Tensor:
        return F.batch_norm(
            x, running_mean, running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )

    def _across_ranks(self, x: Tensor) -> Tensor:
        weight_C = self.weight if self.affine else torch.ones_like(self.running_mean)
        bias_C = self.bias if self.affine else torch.zeros_like(self.running_mean)
        # Dynamo takes no Function that has a jvp, and needs none.
        function = _Normalise if torch.compiler.is_compiling() else _NormaliseForwardMode
        y, mean_C, var_C, n = function.apply(x, weight_C, bias_C, self.eps, dist.statistics_group().group_name)
        if self.update_running_stats:
            unbiased_var_C = var_C * (n / (n - 1))
            self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased_var_C.to(self.running_var.dtype), self.momentum)
        return y


@contextmanager
def frozen_running_stats(module: nn.Module) -> Iterator[None]:
    """Within the context, training-mode passes through `module` use batch statistics and leave running ones alone.

    For passes that must not count, such as VAT's search for the adversarial direction.
    Raises TypeError where the module holds a batch norm that is not global.
    """
    for layer in module.modules():
        if isinstance(layer, _BatchNorm) and not isinstance(layer, GlobalBatchNorm):
            raise TypeError(f"can freeze the running statistics of GlobalBatchNorm only, found {type(layer).__name__}")
    layers = [layer for layer in module.modules() if isinstance(layer, GlobalBatchNorm)]
    before = [layer.update_running_stats for layer in layers]
    for layer in layers:
        layer.update_running_stats = False
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.update_running_stats = value


class _Statistics(NamedTuple):
    """Of all ranks' rows, float64: mean [C], biased variance [C], number of rows [1]."""

    mean_C: Tensor
    var_C: Tensor
    n: Tensor


class _Normalise(torch.autograd.Function):
    """(x, weight, bias) -> y and the three of `_Statistics`, which have no gradient.

    It takes no running statistics: where a compiled graph also updates them, backward would recompute from the updated
    ones and return wrong gradients without a word.
    """

    @staticmethod
    def forward(
        x: Tensor, weight_C: Tensor, bias_C: Tensor, eps: float, group_name: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        num_rows = x.numel() // x.shape[1]
        mean_C, var_C = _local_statistics(x)
        # Float32 sums of squares would cancel where |mean| >> std; means and variances merge in float64 instead.
        mean_C, var_C = mean_C.double(), var_C.double()
        message = torch.cat([mean_C, var_C + mean_C.square(), mean_C.new_ones(1)]) * num_rows
        sum_C, sum_of_squares_C, n = dist.sum_over_group(message, group_name).split([x.shape[1], x.shape[1], 1])
        mean_C = sum_C / n
        statistics = _Statistics(mean_C, (sum_of_squares_C / n - mean_C.square()).clamp(min=0), n.clone())
        return _affine(x, statistics, weight_C, bias_C, eps), *statistics

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight_C, _, ctx.eps, ctx.group_name = inputs
        _, *statistics = output
        ctx.mark_non_differentiable(*statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight_C, *statistics)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        x, weight_C, *statistics = ctx.saved_tensors
        local_sums_2C, x_gradient = _weighted_J(g, x, _Statistics(*statistics), weight_C, ctx.eps, ctx.group_name)
        bias_gradient_C, weight_gradient_C = local_sums_2C.to(weight_C.dtype)
        return x_gradient, weight_gradient_C, bias_gradient_C, None, None


class _NormaliseForwardMode(_Normalise):
    """`_Normalise` with forward-mode derivative, at one message too."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _Normalise.setup_context(ctx, inputs, output)
        x, weight_C, *_ = inputs
        _, *statistics = output
        ctx.save_for_forward(x, weight_C, *statistics)

    @staticmethod
    def jvp(
        ctx: Any, dx: Tensor | None, dweight_C: Tensor | None, dbias_C: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        x, weight_C, *saved = ctx.saved_tensors
        statistics = _Statistics(*saved)
        # Zeros for an absent tangent: whether a rank has one must not decide whether it takes part in the message.
        dx = torch.zeros_like(x) if dx is None else dx
        dweight_C = torch.zeros_like(weight_C) if dweight_C is None else dweight_C
        dbias_C = torch.zeros_like(weight_C) if dbias_C is None else dbias_C
        _local_sums, dy = _weighted_J(dx, x, statistics, weight_C, ctx.eps, ctx.group_name)
        return dy + _affine(x, statistics, dweight_C, dbias_C, ctx.eps), None, None, None


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _local_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of this rank's rows."""
    dtype = _statistics_dtype(x)
    if torch.compiler.is_compiling():  # the native kernel cannot be traced
        var_C, mean_C = torch.var_mean(x.to(dtype), [d for d in range(x.dim()) if d != 1], correction=0)
        return mean_C, var_C
    running_mean_C = running_var_C = None
    if x.dtype != dtype and not x.is_cuda:
        # On CPU the kernel rounds its results to the type of these, else to half precision like x. Momentum 0: unread.
        running_mean_C, running_var_C = torch.zeros(2, x.shape[1], dtype=dtype)
    # var_mean takes 30 times as long on a channels-last CPU tensor.
    mean_C, var_C = torch.batch_norm_update_stats(x, running_mean_C, running_var_C, 0.0)
    return mean_C, var_C


def _affine(x: Tensor, statistics: _Statistics, weight_C: Tensor, bias_C: Tensor, eps: float) -> Tensor:
    """weight * x_hat + bias, in one pass over x."""
    dtype = _statistics_dtype(x)
    mean_C, var_C, weight_C, bias_C = (t.to(dtype) for t in (statistics.mean_C, statistics.var_C, weight_C, bias_C))
    return F.batch_norm(x, mean_C, var_C, weight_C, bias_C, training=False, eps=eps)


def _weighted_J(
    g: Tensor, x: Tensor, statistics: _Statistics, weight_C: Tensor, eps: float, group_name: str
) -> tuple[Tensor, Tensor]:
    """This rank's (sum g, sum g * x_hat), [2, C]; and weight * J g, shaped like x, after the one message."""
    dtype = _statistics_dtype(x)
    mean_C, var_C, n = statistics
    invstd_C = (var_C + eps).rsqrt()
    _, sum_g_xhat_C, sum_g_C = torch.ops.aten.native_batch_norm_backward(
        g, x, torch.ones_like(mean_C, dtype=dtype), None, None, mean_C.to(dtype), invstd_C.to(dtype), True, eps,
        output_mask=[False, True, True],
    )  # fmt: skip
    local_sums_2C = torch.stack([sum_g_C, sum_g_xhat_C])
    mean_g_C, mean_g_xhat_C = dist.sum_over_group(local_sums_2C.double(), group_name) / n
    # Per channel, weight * J g is a linear function of g and x.
    of_g = weight_C * invstd_C
    of_x = -of_g * invstd_C * mean_g_xhat_C
    constant = -of_g * mean_g_C - of_x * mean_C
    of_g, of_x, constant = (c.to(dtype).view(-1, *(1,) * (x.dim() - 2)) for c in (of_g, of_x, constant))
    return local_sums_2C, torch.addcmul(constant, x, of_x).addcmul_(g, of_g).to(g.dtype)
