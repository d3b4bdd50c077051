"""Batch norm of several resolutions over ranks as one differentiable function: the mathematics, by sums.

Notation: x has N rows (N*H*W with images) of C channels; n is the number of rows over all ranks; g is the gradient with
respect to the norm's own output: zero where ReLU cut.
x_hat = (x - mean) * invstd, invstd = 1 / sqrt(var + eps). The derivative of x_hat with respect to x is symmetric,

    J g = invstd * (g - mean(g) - x_hat * mean(g * x_hat)),

so that reverse mode, J (weight * g), and forward mode, weight * (J dx), share their one message [sum g, sum g * x_hat].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastssl import dist
from fastssl.nn.norm.passes import (
    affine,
    combine,
    gradient_sums,
    local_statistics,
    masked,
    on_kernels,
    statistics_dtype,
)

if TYPE_CHECKING:
    from fastssl.nn.norm.triton_kernels import Mask


class Statistics(NamedTuple):
    """Of all ranks' rows, float64, per resolution: mean [R, C], biased variance [R, C], number of rows [R, 1]."""

    mean_RC: Tensor
    var_RC: Tensor
    n_R1: Tensor

    @classmethod
    def split(cls, packed: Tensor) -> Statistics:
        num_channels = packed.shape[1] // 2
        return cls(*packed.split([num_channels, num_channels, 1], dim=1))

    def invstd_RC(self, eps: float) -> Tensor:
        return (self.var_RC + eps).rsqrt()

    def affine_2RC(self, weight_C: Tensor, bias_C: Tensor, eps: float, like: Tensor) -> Tensor:
        """Scale and shift of x, which make weight * x_hat + bias of it."""
        scale_RC = weight_C * self.invstd_RC(eps)
        return _rounded([scale_RC, bias_C - self.mean_RC * scale_RC], like)


class Fused(torch.autograd.Function):
    """(x of each resolution, their residuals) -> their y and the statistics, packed, which have no gradient.

    It takes no running statistics: where a compiled graph also updates them, backward would recompute from the updated
    ones and return wrong gradients without a word. Backward keeps x and, for ReLU's mask, y, which the layer that
    reads y keeps anyway; a residual is not needed. The kernels rebuild the mask from x where there is no residual.
    """

    @staticmethod
    def forward(
        eps: float, relu: bool, group_name: str | None, num: int, weight_C: Tensor, bias_C: Tensor, *operands: Tensor
    ) -> tuple[Tensor, ...]:
        xs, residuals = operands[:num], operands[num:] or (None,) * num
        message = torch.stack([_sums(x) for x in xs])
        sum_RC, sum_of_squares_RC, n_R1 = Statistics.split(_over_ranks(message, group_name))
        mean_RC = sum_RC / n_R1
        var_RC = (sum_of_squares_RC / n_R1 - mean_RC.square()).clamp(min=0)
        statistics = Statistics(mean_RC, var_RC, n_R1)
        scale_RC, shift_RC = statistics.affine_2RC(weight_C, bias_C, eps, xs[0])
        ys = [
            affine(x, scale_C, shift_C, residual, relu)
            for x, scale_C, shift_C, residual in zip(xs, scale_RC, shift_RC, residuals, strict=True)
        ]
        return *ys, torch.cat(statistics, dim=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.eps, relu, ctx.group_name, ctx.num, weight_C, bias_C, *operands = inputs
        *ys, statistics = output
        xs, ctx.has_residuals = operands[: ctx.num], len(operands) > ctx.num
        ctx.rebuilds_mask = relu and not ctx.has_residuals and on_kernels(*xs)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight_C, bias_C, statistics, *xs, *(ys if relu and not ctx.rebuilds_mask else ()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gs: Tensor | None) -> tuple[Tensor | None, ...]:
        weight_C, bias_C, xs, ys, statistics = _unpack(ctx)
        dys = [torch.zeros_like(x) if g is None else g for g, x in zip(gs[: ctx.num], xs, strict=True)]
        masks: Sequence[Mask] = ys
        if ctx.rebuilds_mask:
            masks = list(zip(*statistics.affine_2RC(weight_C, bias_C, ctx.eps, xs[0]), strict=True))
        elif not on_kernels(*xs):
            dys, masks = [masked(g, y) for g, y in zip(dys, ys, strict=True)], [None] * ctx.num
        local_sums_R2C, dxs, dresiduals = _weighted_J(
            dys, masks, xs, statistics, weight_C, ctx.eps, ctx.group_name, ctx.has_residuals
        )
        bias_gradient_C, weight_gradient_C = local_sums_R2C.sum(0).to(weight_C.dtype)
        return None, None, None, None, weight_gradient_C, bias_gradient_C, *dxs, *dresiduals


class FusedForwardMode(Fused):
    """`Fused` with forward-mode derivative, at one message too."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        Fused.setup_context(ctx, inputs, output)
        _, relu, _, num, weight_C, bias_C, *operands = inputs
        *ys, statistics = output
        ctx.save_for_forward(weight_C, bias_C, statistics, *operands[:num], *(ys if relu else ()))

    @staticmethod
    def jvp(
        ctx: Any, _0: None, _1: None, _2: None, _3: None, dweight_C: Tensor | None, dbias_C: Tensor | None,
        *doperands: Tensor | None,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        weight_C, _, xs, ys, statistics = _unpack(ctx)
        # Zeros for an absent tangent: whether a rank has one must not decide whether it takes part in the message.
        dxs = [torch.zeros_like(x) if dx is None else dx for x, dx in zip(xs, doperands[: ctx.num], strict=True)]
        dweight_C = torch.zeros_like(weight_C) if dweight_C is None else dweight_C
        dbias_C = torch.zeros_like(weight_C) if dbias_C is None else dbias_C
        no_masks = [None] * ctx.num
        _, dys, _ = _weighted_J(dxs, no_masks, xs, statistics, weight_C, ctx.eps, ctx.group_name, False)
        dscale_RC, dshift_RC = statistics.affine_2RC(dweight_C, dbias_C, ctx.eps, xs[0])
        dresiduals = doperands[ctx.num :] or (None,) * ctx.num
        of_affine = map(affine, xs, dscale_RC, dshift_RC, dresiduals, (False,) * ctx.num)
        return *(masked(dy + more, y) for dy, more, y in zip(dys, of_affine, ys, strict=True)), None


def _unpack(ctx: Any) -> tuple[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor | None], Statistics]:
    """weight and bias [C]; x of each resolution, and y where it was saved; statistics."""
    weight_C, bias_C, statistics, *rest = ctx.saved_tensors
    return weight_C, bias_C, rest[: ctx.num], rest[ctx.num :] or [None] * ctx.num, Statistics.split(statistics)


def _over_ranks(message: Tensor, group_name: str | None) -> Tensor:
    """The sum over ranks; alone, the message itself."""
    return message if group_name is None else dist.sum_over_group(message, group_name)


def _sums(x: Tensor) -> Tensor:
    """This rank's [sum of x, sum of x squared, number of rows], float64 [2C+1].

    Means and variances merge in float64: float32 sums of squares would cancel where |mean| >> std.
    """
    mean_C, var_C = (t.double() for t in local_statistics(x))
    return torch.cat([mean_C, var_C + mean_C.square(), mean_C.new_ones(1)]) * (x.numel() // x.shape[1])


def _weighted_J(
    gs: Sequence[Tensor],
    masks: Sequence[Mask],
    xs: Sequence[Tensor],
    statistics: Statistics,
    weight_C: Tensor,
    eps: float,
    group_name: str | None,
    has_residuals: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """This rank's (sum g, sum g * x_hat), [R, 2, C]; after the one message, weight * J g of each resolution; and, where
    it `has_residuals`, g. Where a mask is given, g is what it lets through."""
    mean_RC, _, n_R1 = statistics
    invstd_RC = statistics.invstd_RC(eps)
    means_RC, invstds_RC = _rounded([mean_RC, invstd_RC], xs[0])
    of_sums = zip(gs, masks, xs, means_RC, invstds_RC, strict=True)
    local_sums_R2C = torch.stack([gradient_sums(*operands) for operands in of_sums])
    mean_g_RC, mean_g_xhat_RC = (_over_ranks(local_sums_R2C.double(), group_name) / n_R1[:, None]).unbind(1)
    # Per channel, weight * J g is a linear function of g and x.
    of_g_RC = weight_C * invstd_RC
    of_x_RC = -of_g_RC * invstd_RC * mean_g_xhat_RC
    constant_RC = -of_g_RC * mean_g_RC - of_x_RC * mean_RC
    a_RC, b_RC, c_RC = _rounded([of_g_RC, of_x_RC, constant_RC], xs[0])
    of_gradients = zip(gs, masks, xs, a_RC, b_RC, c_RC, strict=True)
    pairs = [combine(g, mask, x, a_C, b_C, c_C, has_residuals) for g, mask, x, a_C, b_C, c_C in of_gradients]
    dxs, residual_gradients = zip(*pairs, strict=True)
    return local_sums_R2C, list(dxs), list(residual_gradients) if has_residuals else []


def _rounded(coefficients: Sequence[Tensor], x: Tensor) -> Tensor:
    """The coefficients [R, C] for loops over x, stacked: in the type of its statistics.

    Rounded before they are stacked, as the compiler stores what is stacked: else it would compute them, in float64,
    once for every element of x.
    """
    return torch.stack([c_RC.to(statistics_dtype(x)) for c_RC in coefficients])
