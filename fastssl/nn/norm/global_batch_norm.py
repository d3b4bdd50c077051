"""Batch norm over the batch of all ranks, of several resolutions at once, with shortcut and ReLU.

`torch.nn.SyncBatchNorm` refuses CPU tensors and stops the host once a layer. This one sends sums: for R resolutions in
lockstep, a layer's forward pass costs one all-reduce of R (2C+1) float64 numbers, its backward pass one of R 2C, and
the host waits for neither. Each resolution keeps statistics of its own.

Notation: x has N rows (N*H*W with images) of C channels; n is the number of rows over all ranks; g is the gradient with
respect to the norm's own output: zero where ReLU cut.
x_hat = (x - mean) * invstd, invstd = 1 / sqrt(var + eps). The derivative of x_hat with respect to x is symmetric,

    J g = invstd * (g - mean(g) - x_hat * mean(g * x_hat)),

so that reverse mode, J (weight * g), and forward mode, weight * (J dx), share their one message [sum g, sum g * x_hat].

Whatever touches a whole x does so in the four functions at the end of this file: as few passes over memory as torch's
operators allow or, where `_on_kernels`, as `batch_norm_triton` needs.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl import dist
from fastssl.machine import runs_triton

if TYPE_CHECKING:
    from fastssl.nn.norm.triton_kernels import Mask

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
        if self._by_batch and (self._num_ranks > 1 or _must_be_ours() or _on_kernels(*xs)):
            return self._fused(xs, residuals or (), relu)
        ys = [self._by_torch(x) for x in xs]
        return [_finish(y, residual, relu) for y, residual in zip(ys, residuals or len(ys) * [None], strict=True)]

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
    ) -> "tuple[list[Tensor], _Statistics]":
        """`lockstep`'s ys and the statistics behind them, of the named group of ranks or of this rank's rows alone."""
        weight_C = self.weight if self.affine else torch.ones_like(self.running_mean)
        bias_C = self.bias if self.affine else torch.zeros_like(self.running_mean)
        # Dynamo takes no Function that has a jvp, and needs none.
        function = _Fused if torch.compiler.is_compiling() else _FusedForwardMode
        *ys, statistics = function.apply(self.eps, relu, group_name, len(xs), weight_C, bias_C, *xs, *residuals)
        return ys, _Statistics.split(statistics)

    def _follow(self, mean_RC: Tensor, unbiased_var_RC: Tensor) -> None:
        """Move the running statistics as in one pass after the other."""
        for mean_C, var_C in zip(mean_RC, unbiased_var_RC, strict=True):
            self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(var_C.to(self.running_var.dtype), self.momentum)
        self.num_batches_tracked.add_(len(mean_RC))


class Lockstep(nn.Module):
    """A module that takes several resolutions layer by layer together, so that batch norm can send one message for all.

    Subclasses write `lockstep`; `forward` is a list of one.
    """

    def lockstep(self, xs: Sequence[Tensor]) -> list[Tensor]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.lockstep([x])[0]


class LockstepSequential(Lockstep, nn.Sequential):
    """Layers in sequence; a batch norm takes the ReLU that follows it along. Without layers, the identity.

    Layers that have no `lockstep` get one resolution after the other.
    """

    def lockstep(self, xs: Sequence[Tensor]) -> list[Tensor]:
        outs, layers = list(xs), list(self)
        while layers:
            layer = layers.pop(0)
            if isinstance(layer, GlobalBatchNorm) and layers and isinstance(layers[0], nn.ReLU):
                layers.pop(0)
                outs = layer.lockstep(outs, relu=True)
            elif isinstance(layer, GlobalBatchNorm | Lockstep):
                outs = layer.lockstep(outs)
            else:
                outs = [layer(x) for x in outs]
        return outs


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
    mean = dist.mean_over_ranks(torch.cat(running))
    torch._foreach_copy_(running, mean.split([len(buffer) for buffer in running]))


class _Statistics(NamedTuple):
    """Of all ranks' rows, float64, per resolution: mean [R, C], biased variance [R, C], number of rows [R, 1]."""

    mean_RC: Tensor
    var_RC: Tensor
    n_R1: Tensor

    @classmethod
    def split(cls, packed: Tensor) -> "_Statistics":
        num_channels = packed.shape[1] // 2
        return cls(*packed.split([num_channels, num_channels, 1], dim=1))

    def invstd_RC(self, eps: float) -> Tensor:
        return (self.var_RC + eps).rsqrt()

    def affine_2RC(self, weight_C: Tensor, bias_C: Tensor, eps: float, like: Tensor) -> Tensor:
        """Scale and shift of x, which make weight * x_hat + bias of it."""
        scale_RC = weight_C * self.invstd_RC(eps)
        return _rounded([scale_RC, bias_C - self.mean_RC * scale_RC], like)


class _Fused(torch.autograd.Function):
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
        sum_RC, sum_of_squares_RC, n_R1 = _Statistics.split(_over_ranks(message, group_name))
        mean_RC = sum_RC / n_R1
        var_RC = (sum_of_squares_RC / n_R1 - mean_RC.square()).clamp(min=0)
        statistics = _Statistics(mean_RC, var_RC, n_R1)
        scale_RC, shift_RC = statistics.affine_2RC(weight_C, bias_C, eps, xs[0])
        ys = [
            _affine(x, scale_C, shift_C, residual, relu)
            for x, scale_C, shift_C, residual in zip(xs, scale_RC, shift_RC, residuals, strict=True)
        ]
        return *ys, torch.cat(statistics, dim=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.eps, relu, ctx.group_name, ctx.num, weight_C, bias_C, *operands = inputs
        *ys, statistics = output
        xs, ctx.has_residuals = operands[: ctx.num], len(operands) > ctx.num
        ctx.rebuilds_mask = relu and not ctx.has_residuals and _on_kernels(*xs)
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
        elif not _on_kernels(*xs):
            dys, masks = [_masked(g, y) for g, y in zip(dys, ys, strict=True)], [None] * ctx.num
        local_sums_R2C, dxs, dresiduals = _weighted_J(
            dys, masks, xs, statistics, weight_C, ctx.eps, ctx.group_name, ctx.has_residuals
        )
        bias_gradient_C, weight_gradient_C = local_sums_R2C.sum(0).to(weight_C.dtype)
        return None, None, None, None, weight_gradient_C, bias_gradient_C, *dxs, *dresiduals


class _FusedForwardMode(_Fused):
    """`_Fused` with forward-mode derivative, at one message too."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _Fused.setup_context(ctx, inputs, output)
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
        of_affine = map(_affine, xs, dscale_RC, dshift_RC, dresiduals, (False,) * ctx.num)
        return *(_masked(dy + more, y) for dy, more, y in zip(dys, of_affine, ys, strict=True)), None


def _unpack(ctx: Any) -> tuple[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor | None], _Statistics]:
    """weight and bias [C]; x of each resolution, and y where it was saved; statistics."""
    weight_C, bias_C, statistics, *rest = ctx.saved_tensors
    return weight_C, bias_C, rest[: ctx.num], rest[ctx.num :] or [None] * ctx.num, _Statistics.split(statistics)


def _over_ranks(message: Tensor, group_name: str | None) -> Tensor:
    """The sum over ranks; alone, the message itself."""
    return message if group_name is None else dist.sum_over_group(message, group_name)


def _sums(x: Tensor) -> Tensor:
    """This rank's [sum of x, sum of x squared, number of rows], float64 [2C+1].

    Means and variances merge in float64: float32 sums of squares would cancel where |mean| >> std.
    """
    mean_C, var_C = (t.double() for t in _local_statistics(x))
    return torch.cat([mean_C, var_C + mean_C.square(), mean_C.new_ones(1)]) * (x.numel() // x.shape[1])


def _weighted_J(
    gs: Sequence[Tensor],
    masks: "Sequence[Mask]",
    xs: Sequence[Tensor],
    statistics: _Statistics,
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
    local_sums_R2C = torch.stack([_gradient_sums(*operands) for operands in of_sums])
    mean_g_RC, mean_g_xhat_RC = (_over_ranks(local_sums_R2C.double(), group_name) / n_R1[:, None]).unbind(1)
    # Per channel, weight * J g is a linear function of g and x.
    of_g_RC = weight_C * invstd_RC
    of_x_RC = -of_g_RC * invstd_RC * mean_g_xhat_RC
    constant_RC = -of_g_RC * mean_g_RC - of_x_RC * mean_RC
    a_RC, b_RC, c_RC = _rounded([of_g_RC, of_x_RC, constant_RC], xs[0])
    of_gradients = zip(gs, masks, xs, a_RC, b_RC, c_RC, strict=True)
    pairs = [_combine(g, mask, x, a_C, b_C, c_C, has_residuals) for g, mask, x, a_C, b_C, c_C in of_gradients]
    dxs, residual_gradients = zip(*pairs, strict=True)
    return local_sums_R2C, list(dxs), list(residual_gradients) if has_residuals else []


def _rounded(coefficients: Sequence[Tensor], x: Tensor) -> Tensor:
    """The coefficients [R, C] for loops over x, stacked: in the type of its statistics.

    Rounded before they are stacked, as the compiler stores what is stacked: else it would compute them, in float64,
    once for every element of x.
    """
    return torch.stack([c_RC.to(_statistics_dtype(x)) for c_RC in coefficients])


def _must_be_ours() -> bool:
    """Whether torch's own kernel will not do: its in-place statistics cannot be compiled, and its forward-mode
    derivatives not be traced on tensors without elements, as dry runs do."""
    return torch.compiler.is_compiling() or forward_ad._current_level >= 0


def _on_kernels(*xs: Tensor) -> bool:
    """Whether `batch_norm_triton` takes the xs. (Compiled, torch generates kernels itself.)"""
    return not torch.compiler.is_compiling() and all(
        runs_triton(x.device)
        and x.dtype != torch.float64
        and x.is_contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)
        for x in xs
    )


# The four functions that touch whole tensors; per-channel arguments and results [C] are float32 (float64 for float64).


def _kernels() -> ModuleType:
    from fastssl.nn.norm import triton_kernels as batch_norm_triton  # triton comes along with torch's CUDA builds only

    return batch_norm_triton


def _local_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of this rank's rows."""
    if _on_kernels(x):
        return _kernels().statistics(x)
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


def _affine(x: Tensor, scale_C: Tensor, shift_C: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """x * scale + shift + residual, cut at zero where `relu`."""
    if _on_kernels(x):
        return _kernels().normalise(x, scale_C, shift_C, residual, relu)
    if torch.compiler.is_compiling():
        y = x.to(scale_C.dtype) * _per_channel(scale_C, x) + _per_channel(shift_C, x)
        y = y if residual is None else y + residual
        y = y.relu() if relu else y
        # Dynamo 2.11.0 marks the output of a Function as without gradient where a `to` that converts nothing ends it:
        # every weight below would get zeros, without a word.
        return y if y.dtype == x.dtype else y.to(x.dtype)
    # torch's kernel at mean 0 and variance 1: one pass over x, also where it is in half precision. By its operator:
    # `F.batch_norm` of torch 2.10 and 2.11 refuses an eps of 0.
    mean_C, var_C = torch.zeros_like(scale_C), torch.ones_like(scale_C)
    y = torch.batch_norm(x, scale_C, shift_C, mean_C, var_C, False, 0.0, 0.0, torch.backends.cudnn.enabled)
    return _finish(y, residual, relu)


def _gradient_sums(g: Tensor, mask: "Mask", x: Tensor, mean_C: Tensor, invstd_C: Tensor) -> Tensor:
    """(sum g, sum g * x_hat) over this rank's rows, [2, C]. Only kernels take a mask."""
    if _on_kernels(x):
        return torch.stack(_kernels().gradient_sums(g, mask, x, mean_C, invstd_C))
    _, sum_g_xhat_C, sum_g_C = torch.ops.aten.native_batch_norm_backward(
        g, x, torch.ones_like(mean_C), None, None, mean_C, invstd_C, True, 0.0, output_mask=[False, True, True]
    )
    return torch.stack([sum_g_C, sum_g_xhat_C])


def _combine(
    g: Tensor,
    mask: "Mask",
    x: Tensor,
    of_g_C: Tensor,
    of_x_C: Tensor,
    constant_C: Tensor,
    has_residual: bool,
) -> tuple[Tensor, Tensor | None]:
    """of_g * g + of_x * x + constant, dtype of x; and g where it `has_residual`. Only kernels take a mask."""
    if _on_kernels(x):
        return _kernels().input_gradient(g, mask, x, of_g_C, of_x_C, constant_C, residual_gradient=has_residual)
    of_g, of_x, constant = (_per_channel(c_C, x) for c_C in (of_g_C, of_x_C, constant_C))
    return torch.addcmul(constant, x, of_x).addcmul_(g, of_g).to(x.dtype), g if has_residual else None


def _finish(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """y + residual, cut at zero where `relu`; in the memory of y."""
    y = y if residual is None else y.add_(residual)
    return y.relu_() if relu else y


def _masked(g: Tensor, y: Tensor | None) -> Tensor:
    """g, zero where ReLU cut; y is ReLU's output, or None where there was no ReLU."""
    return g if y is None else cast(Tensor, torch.ops.aten.threshold_backward(g, y, 0))


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_channel(t_C: Tensor, x: Tensor) -> Tensor:
    """t_C as a factor of x, [N, C] or [N, C, H, W]."""
    return t_C.view(-1, *(1,) * (x.dim() - 2))
