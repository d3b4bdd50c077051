"""The host's side of the finish on CUDA: a chain of ops cut into passes, and their launches."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from loaders.finish.reference import SUB_OP_ORDERS, box_radius
from loaders.finish.triton.passes import (
    AFFINE,
    BLUR_X,
    BLUR_Y,
    FLIP,
    PLAIN,
    box_weights_kernel,
    gaussian_weights_kernel,
    levels_kernel,
    means_kernel,
    pass_kernel,
)
from loaders.finish.triton.pixels import EQUALIZE, GRAYSCALE, HSV_NOISE, JITTER, NOISE, SOLARISE, TF_JITTER
from loaders.plan.ops import (
    Affine,
    ColourJitter,
    Equalize,
    Flip,
    GaussianBlur,
    GaussianKernelBlur,
    Grayscale,
    HsvNoise,
    Noise,
    Op,
    Solarise,
    TfColourJitter,
)
from loaders.plan.views import Pixels

_SAMPLINGS: dict[type[Op], tuple[tl.constexpr, ...]] = {
    Flip: (FLIP,),
    Affine: (AFFINE,),
    GaussianBlur: (BLUR_X, BLUR_Y),
    GaussianKernelBlur: (BLUR_X, BLUR_Y),
}
_POINTWISE: dict[type[Op], tl.constexpr] = {
    ColourJitter: JITTER,
    TfColourJitter: TF_JITTER,
    HsvNoise: HSV_NOISE,
    Grayscale: GRAYSCALE,
    Solarise: SOLARISE,
    Equalize: EQUALIZE,
    Noise: NOISE,
}
_JITTERS = (ColourJitter, TfColourJitter)

_BLOCK = 1024  # pixels of a program
_WARPS = 8  # four pixels a thread: half of a multiprocessor's warps fit beside each other, or more


@dataclass
class _Pass:
    """Op number `sampler` samples as `sampling` says, then the ops numbered `chain` act."""

    sampling: int = PLAIN.value
    sampler: int = 0
    chain: list[int] = field(default_factory=list)


def passes_of(ops: tuple[Op, ...]) -> list[_Pass]:
    """The chain cut into passes over the pixels."""
    passes = [_Pass()]
    for k, op in enumerate(ops):
        if type(op) in _POINTWISE:
            passes[-1].chain.append(k)
        else:
            passes += [_Pass(sampling.value, k) for sampling in _SAMPLINGS[type(op)]]
    first_is_idle = len(passes) > 1 and not passes[0].chain
    return passes[first_is_idle:]


def finish(
    crops: Tensor, ops: tuple[Op, ...], tables: tuple[np.ndarray, ...], pixels: Pixels, out: Tensor
) -> None:  # fmt: skip
    """Crops to what the network receives, written into `out`: queued on the current stream, nothing waits.

    crops    uint8 [M, S, S, C] on a CUDA device, C = 1 or 3, contiguous
    tables   one float32 [M, len(op.columns)] for each op, on the host
    out      float32, float16 or bfloat16 [M, S, S, C] on the same device, contiguous: (value - mean) / std
    """
    num_images, size, width, channels = crops.shape
    assert size == width and channels in (1, 3) and out.shape == crops.shape
    assert crops.is_contiguous() and out.is_contiguous() and crops.dtype == torch.uint8
    if num_images:
        _Call(crops, ops, tables).run(pixels, out)


class _Call:
    """One call of `finish`: what its launches share."""

    def __init__(self, crops: Tensor, ops: tuple[Op, ...], tables: tuple[np.ndarray, ...]):
        self.crops, self.ops = crops, ops
        self.num_images, self.size, _, self.channels = crops.shape
        num_equalizes = sum(isinstance(op, Equalize) for op in ops)
        self.levels = self._floats(max(1, num_equalizes), self.channels, 256)
        # the columns of all ops side by side, each jitter's followed by room for its means
        widths = [table.shape[1] + 3 * isinstance(op, _JITTERS) for op, table in zip(ops, tables, strict=True)]
        self.columns = np.cumsum([0, *widths]).tolist()
        joined = np.zeros((self.num_images, max(1, self.columns[-1])), np.float32)
        for first, table in zip(self.columns, tables, strict=False):
            joined[:, first : first + table.shape[1]] = table
        self.table = self._to_device(torch.from_numpy(joined))

    def run(self, pixels: Pixels, out: Tensor) -> None:
        source = unblurred = self.crops
        weights = self.table  # stands for none: read by blurs only
        passes = passes_of(self.ops)
        for one_pass in passes:
            if one_pass.sampling == BLUR_X.value:
                unblurred, weights = source, self._blur_weights(one_pass.sampler)
            arguments = (source, unblurred, self.table, weights, _orders(self.crops.device), self.levels)
            for place, k in enumerate(one_pass.chain):
                if isinstance(self.ops[k], _JITTERS):
                    means = self.columns[k + 1] - 3
                    kind = _POINTWISE[type(self.ops[k])].value
                    means_kernel[(self.num_images,)](
                        *arguments, **self._constants(one_pass, place), KIND=kind, AT=self.columns[k], MEANS=means
                    )
                elif isinstance(self.ops[k], Equalize):
                    levels_kernel[(self.num_images,)](
                        *arguments, **self._constants(one_pass, place), AT=self.columns[k], TABLE=self._table_of(k)
                    )
            last = one_pass is passes[-1]
            source = out if last else self._floats(self.channels, self.size, self.size)
            constants = self._constants(one_pass, len(one_pass.chain))
            pass_kernel[(self.num_images, triton.cdiv(self.size**2, constants["BLOCK"]))](
                *arguments, source, **constants, NORMALISE=_gains(pixels, self.channels) if last else None
            )

    def _constants(self, one_pass: _Pass, num_ops: int) -> dict[str, Any]:
        """What kernels are compiled for: the pass up to `num_ops` of its pointwise ops."""
        kinds = [(_POINTWISE[type(self.ops[k])].value, self.columns[k], self._table_of(k)) for k in one_pass.chain]
        blurs = one_pass.sampling in (BLUR_X.value, BLUR_Y.value)
        return {
            "COLUMNS": self.table.shape[1],
            "TABLES": self.levels.shape[1],
            "SAMPLING": one_pass.sampling,
            "COLUMN": self.columns[one_pass.sampler],
            "REACH": _reach(self.ops[one_pass.sampler]) if blurs else 0,
            "CHAIN": tuple(kinds[:num_ops]),
            "SIZE": self.size,
            "CHANNELS": self.channels,
            "BLOCK": min(_BLOCK, triton.next_power_of_2(self.size**2)),
            "num_warps": _WARPS,
        }

    def _table_of(self, k: int) -> int:
        """Which of `levels` is op k's, if it is an equalize."""
        return sum(isinstance(op, Equalize) for op in self.ops[:k])

    def _blur_weights(self, k: int) -> Tensor:
        """float32 [M, 2 * reach + 1, S], see `box_weights_kernel`."""
        op, reach = self.ops[k], _reach(self.ops[k])
        weights = self._floats(2 * reach + 1, self.size)
        taps_block = triton.next_power_of_2(2 * reach + 1)
        block = max(1, min(_BLOCK // taps_block, triton.next_power_of_2(self.size)))
        kernel = gaussian_weights_kernel if isinstance(op, GaussianKernelBlur) else box_weights_kernel
        kernel[(self.num_images, triton.cdiv(self.size, block))](
            self.table, weights, COLUMNS=self.table.shape[1], COLUMN=self.columns[k], REACH=reach, SIZE=self.size,
            TAPS_BLOCK=taps_block, BLOCK=block,
        )  # fmt: skip
        return weights

    def _floats(self, *shape: int) -> Tensor:
        return torch.empty((self.num_images, *shape), device=self.crops.device)

    def _to_device(self, values: Tensor) -> Tensor:
        return values.pin_memory().to(self.crops.device, non_blocking=True) if self.crops.is_cuda else values


def _reach(op: Op) -> int:
    """How far, in pixels, the blur of any image may look."""
    if isinstance(op, GaussianKernelBlur):
        return op.taps // 2
    assert isinstance(op, GaussianBlur)
    return 3 * (math.floor(box_radius(op.sigma[1])) + 1)


def _gains(pixels: Pixels, channels: int) -> tuple[tuple[float, float], ...]:
    """(gain, bias) of each channel."""
    mean, std = (np.broadcast_to(np.array(v), channels).tolist() for v in (pixels.mean, pixels.std))
    return tuple((1 / s, -m / s) for m, s in zip(mean, std, strict=True))


@functools.cache
def _orders(device: torch.device) -> Tensor:
    """int32 [24, 5]: the sub-ops of each order of a jitter, then the place of its contrast."""
    orders = SUB_OP_ORDERS.tolist()
    return torch.tensor([[*order, order.index(1)] for order in orders], dtype=torch.int32, device=device)
