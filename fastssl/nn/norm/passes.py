"""The passes over whole tensors that batch norm makes: as few over memory as torch's operators allow or, where
`on_kernels`, as `triton_kernels` needs. Per-channel arguments and results [C] are float32 (float64 for float64).
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from fastssl.machine import runs_triton

if TYPE_CHECKING:
    from fastssl.nn.norm.triton_kernels import Mask


def on_kernels(*xs: Tensor) -> bool:
    """Whether `triton_kernels` take the xs. (Compiled, torch generates kernels itself.)"""
    return not torch.compiler.is_compiling() and all(
        runs_triton(x.device)
        and x.dtype != torch.float64
        and x.is_contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)
        for x in xs
    )


def _kernels() -> ModuleType:
    from fastssl.nn.norm import triton_kernels  # triton comes along with torch's CUDA builds only

    return triton_kernels


def local_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] of this rank's rows."""
    if on_kernels(x):
        mean_and_variance: tuple[Tensor, Tensor] = _kernels().statistics(x)
        return mean_and_variance
    dtype = statistics_dtype(x)
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


def affine(x: Tensor, scale_C: Tensor, shift_C: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """x * scale + shift + residual, cut at zero where `relu`."""
    if on_kernels(x):
        y: Tensor = _kernels().normalise(x, scale_C, shift_C, residual, relu)
        return y
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
    return finish(y, residual, relu)


def gradient_sums(g: Tensor, mask: Mask, x: Tensor, mean_C: Tensor, invstd_C: Tensor) -> Tensor:
    """(sum g, sum g * x_hat) over this rank's rows, [2, C]. Only kernels take a mask."""
    if on_kernels(x):
        return torch.stack(_kernels().gradient_sums(g, mask, x, mean_C, invstd_C))
    _, sum_g_xhat_C, sum_g_C = torch.ops.aten.native_batch_norm_backward(
        g, x, torch.ones_like(mean_C), None, None, mean_C, invstd_C, True, 0.0, output_mask=[False, True, True]
    )
    return torch.stack([sum_g_C, sum_g_xhat_C])


def combine(
    g: Tensor,
    mask: Mask,
    x: Tensor,
    of_g_C: Tensor,
    of_x_C: Tensor,
    constant_C: Tensor,
    has_residual: bool,
) -> tuple[Tensor, Tensor | None]:
    """of_g * g + of_x * x + constant, dtype of x; and g where it `has_residual`. Only kernels take a mask."""
    if on_kernels(x):
        gradients: tuple[Tensor, Tensor | None]
        gradients = _kernels().input_gradient(g, mask, x, of_g_C, of_x_C, constant_C, residual_gradient=has_residual)
        return gradients
    of_g, of_x, constant = (_per_channel(c_C, x) for c_C in (of_g_C, of_x_C, constant_C))
    return torch.addcmul(constant, x, of_x).addcmul_(g, of_g).to(x.dtype), g if has_residual else None


def finish(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """y + residual, cut at zero where `relu`; in the memory of y."""
    y = y if residual is None else y.add_(residual)
    return y.relu_() if relu else y


def masked(g: Tensor, y: Tensor | None) -> Tensor:
    """g, zero where ReLU cut; y is ReLU's output, or None where there was no ReLU."""
    return g if y is None else cast(Tensor, torch.ops.aten.threshold_backward(g, y, 0))


def statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _per_channel(t_C: Tensor, x: Tensor) -> Tensor:
    """t_C as a factor of x, [N, C] or [N, C, H, W]."""
    return t_C.view(-1, *(1,) * (x.dim() - 2))
