"""LARS on CUDA as two Triton passes over all tensors of a group: their norms, then the update. Not yet run on a GPU:
held to the foreach form under Triton's interpreter, and compiled for sm_80 and sm_90.

Weights, gradients and momenta are read where they lie, through tables of addresses; a step moves each byte that it must
and no other: weights and gradients once for the norms, and all three, with two of them written, for the update. A
tensor is cut into chunks, a program each. Sums of squares go from elements to chunks in one launch and from chunks to
tensors at the beginning of the next, always in the same order: no atomics, so two runs agree to the last bit.

Gradients may move from step to step. Their table is written by kernels whose arguments the addresses are, and only when
one has changed: nothing is copied from the host, so nothing waits and nothing has to stay alive on the host for a
captured CUDA graph, which writes a table of its own each time it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 16384  # elements of a program
BLOCK = 2048  # elements it holds at a time, 8 a thread: two loads of 16 bytes, and registers for half of the warps
WARPS = 8
SUMS = 256  # chunks whose sums are added at a time

# columns of the table of tensors
_WEIGHT, _MOMENTUM, _SIZE, _FIRST = (tl.constexpr(i) for i in range(4))
_COLUMNS = tl.constexpr(4)


# ---- kernels


@triton.jit
def _chunk(tensors, gradients, tensor_of_chunk, ALIGN: tl.constexpr, CHUNK: tl.constexpr):
    """Where this program's weights, gradients and momenta begin, how many are left from there to the end of the tensor,
    and the numbers of the tensor's first chunk and of the one after its last."""
    number = tl.program_id(0)
    tensor = tl.load(tensor_of_chunk + number)
    row = tensors + tensor * _COLUMNS
    size, first = tl.load(row + _SIZE), tl.load(row + _FIRST)
    start = (number - first) * CHUNK
    left = tl.multiple_of(size - start, ALIGN // 4)
    weight = tl.multiple_of(tl.load(row + _WEIGHT).to(tl.pointer_type(tl.float32)), ALIGN)
    gradient = tl.multiple_of(tl.load(gradients + tensor).to(tl.pointer_type(tl.float32)), ALIGN)
    momentum = tl.multiple_of(tl.load(row + _MOMENTUM).to(tl.pointer_type(tl.float32)), ALIGN)
    return weight + start, gradient + start, momentum + start, left, first, first + (size + CHUNK - 1) // CHUNK


@triton.jit
def _inverse(scale):
    """What undoes the scale of the gradients; 1 without one."""
    inverse = 1.0
    if scale is not None:
        inverse = 1 / tl.load(scale)
    return inverse


@triton.jit
def _norms_kernel(tensors, gradients, tensor_of_chunk, squares, grad_scale, weight_decay,
                  FORM: tl.constexpr, ALIGN: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Sums of squares of this chunk's weights and gradients, float32 [chunks, 2].

    The paws form takes the gradient's norm before the decay, the others after it.
    """
    weights, gradients, _, left, _, _ = _chunk(tensors, gradients, tensor_of_chunk, ALIGN, CHUNK)
    unscale = _inverse(grad_scale)
    weight_squares = tl.zeros((BLOCK,), tl.float32)
    gradient_squares = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, tl.minimum(left, CHUNK), BLOCK):
        at = begin + tl.arange(0, BLOCK)
        weight = tl.load(weights + at, at < left, 0.0)
        gradient = tl.load(gradients + at, at < left, 0.0) * unscale
        if FORM != "paws":
            gradient += weight_decay * weight
        weight_squares += weight * weight
        gradient_squares += gradient * gradient
    out = squares + 2 * tl.program_id(0)
    tl.store(out, tl.sum(weight_squares))
    tl.store(out + 1, tl.sum(gradient_squares))


@triton.jit
def _trust_ratio(squares, first, last, weight_decay, trust_coefficient, eps, FORM: tl.constexpr, SUMS: tl.constexpr):
    """Of the tensor of chunks `first` to `last`, from what `_norms_kernel` has written."""
    weight_squares = tl.zeros((SUMS,), tl.float32)
    gradient_squares = tl.zeros((SUMS,), tl.float32)
    for begin in range(first, last, SUMS):
        at = begin + tl.arange(0, SUMS)
        weight_squares += tl.load(squares + 2 * at, at < last, 0.0)
        gradient_squares += tl.load(squares + 2 * at + 1, at < last, 0.0)
    weight_norm = tl.sqrt_rn(tl.sum(weight_squares))
    gradient_norm = tl.sqrt_rn(tl.sum(gradient_squares))
    divisor = gradient_norm
    if FORM == "paws":
        divisor += weight_decay * weight_norm + eps
    ratio = tl.div_rn(trust_coefficient * weight_norm, divisor)
    # as in the foreach form: a zero weight takes its raw gradient, a zero gradient asks for no step
    return tl.where(gradient_norm == 0, 0.0, tl.where(weight_norm == 0, 1.0, ratio))


@triton.jit
def _update_kernel(tensors, gradients, tensor_of_chunk, squares, lr, grad_scale, found_inf,
                   momentum, weight_decay, trust_coefficient, eps, FORM: tl.constexpr, ADAPTED: tl.constexpr,
                   ALIGN: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, SUMS: tl.constexpr):  # fmt: skip
    """This chunk's weights and momenta, in place; on overflow neither is touched."""
    weights, gradients, momenta, left, first, last = _chunk(tensors, gradients, tensor_of_chunk, ALIGN, CHUNK)
    todo = tl.minimum(left, CHUNK)
    if found_inf is not None:
        todo = tl.where(tl.load(found_inf) != 0, 0, todo)
    unscale, rate = _inverse(grad_scale), tl.load(lr)
    gain = 1.0
    if ADAPTED:
        gain = _trust_ratio(squares, first, last, weight_decay, trust_coefficient, eps, FORM, SUMS)
    if FORM != "byol":
        gain = -rate * gain
    for begin in range(0, todo, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        weight = tl.load(weights + at, at < left, 0.0)
        step = tl.load(gradients + at, at < left, 0.0) * unscale
        if ADAPTED:
            step += weight_decay * weight
        step = momentum * tl.load(momenta + at, at < left, 0.0) + gain * step
        tl.store(momenta + at, step, at < left)
        if FORM == "byol":
            step = -rate * step
        tl.store(weights + at, weight + step, at < left)


# ---- launches


@dataclass(frozen=True)
class _Segment:
    """One parameter group's part: rows `start` to `stop` of all parameters, cut into chunks."""

    start: int
    stop: int
    tensors_T4: Tensor  # int64: address of the weight and of its momentum, number of elements, first chunk
    tensor_of_chunk_C: Tensor  # int32
    squares_C2: Tensor
    lr: Tensor  # 0-dim float32

    @property
    def grid(self) -> tuple[int]:
        return (len(self.tensor_of_chunk_C),)


@dataclass(frozen=True)
class _Gradients:
    """Where the gradients of a step are."""

    layout: list[tuple[int, tuple[int, ...]]]  # address and strides of each
    copies: dict[int, Tensor]  # parameter -> where its gradient is brought into the parameter's memory order first
    table_T: Tensor  # int64 addresses
    align: int  # 16 where gradients, weights and momenta all begin at and come in multiples of 16 bytes, else 4


class Fused:
    """The step of `lars.LarsOptimizer` for float32 parameters on CUDA that fill their memory without gaps."""

    def __init__(self, params_by_group: list[list[Tensor]]):
        self.params = [p for params in params_by_group for p in params]
        self.buffers = [torch.zeros_like(p) for p in self.params]
        self._segments: list[_Segment] = []
        self._gradients: _Gradients | None = None
        start = 0
        for params in params_by_group:
            stop = start + len(params)
            self._segments.append(_segment(start, stop, params, self.buffers[start:stop]))
            start = stop

    def step(self, groups: list[dict[str, Any]], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Update weights and momenta from the parameters' gradients; queued on the current stream, nothing waits."""
        gradients = self._locate([p.grad for p in self.params if p.grad is not None])
        for group, segment in zip(groups, self._segments, strict=True):
            if not len(segment.tensor_of_chunk_C):
                continue
            segment.lr.fill_(group["lr"])
            table_T = gradients.table_T[segment.start : segment.stop]
            tables = (segment.tensors_T4, table_T, segment.tensor_of_chunk_C, segment.squares_C2)
            constants = {
                "FORM": group["form"],
                "ALIGN": gradients.align,
                "CHUNK": CHUNK,
                "BLOCK": BLOCK if gradients.align == 16 else BLOCK // 2,  # an address for each element, one by one
                "num_warps": WARPS,
            }
            adapted = not group["lars_exclude"]
            if adapted:
                _norms_kernel[segment.grid](*tables, grad_scale, group["weight_decay"], **constants)
            _update_kernel[segment.grid](
                *tables, segment.lr, grad_scale, found_inf, group["momentum"], group["weight_decay"],
                group["trust_coefficient"], group["eps"], ADAPTED=adapted, SUMS=SUMS, **constants,
            )  # fmt: skip

    def _locate(self, gradients: list[Tensor]) -> _Gradients:
        """The table of these gradients: the last step's if they lie where they lay."""
        layout = [(g.data_ptr(), g.stride()) for g in gradients]
        capturing = self.params[0].is_cuda and torch.cuda.is_current_stream_capturing()
        located = self._gradients
        if located is None or capturing or located.layout != layout:
            copies = {
                i: torch.empty_like(p)
                for i, (p, g) in enumerate(zip(self.params, gradients, strict=True))
                if not _same_memory_order(p, g)
            }
            addresses = [copies.get(i, g).data_ptr() for i, g in enumerate(gradients)]
            table_T = torch.zeros(len(addresses), dtype=torch.int64, device=self.params[0].device)
            torch._foreach_add_(table_T.unbind(), addresses)  # each kernel launch carries about a hundred of them
            fixed = [t.data_ptr() for t in self.params + self.buffers] + [4 * p.numel() for p in self.params]
            align = 16 if all(number % 16 == 0 for number in addresses + fixed) else 4
            located = _Gradients(layout, copies, table_T, align)
            if not capturing:  # what a capture writes is there only once its graph runs
                self._gradients = located
        if located.copies:
            torch._foreach_copy_(list(located.copies.values()), [gradients[i] for i in located.copies])
        return located


def _segment(start: int, stop: int, params: list[Tensor], buffers: list[Tensor]) -> _Segment:
    num_chunks_T = torch.tensor([-(-p.numel() // CHUNK) for p in params])
    first_T = num_chunks_T.cumsum(0) - num_chunks_T
    rows = zip(params, buffers, first_T.tolist(), strict=True)
    tensors_T4 = torch.tensor([(p.data_ptr(), b.data_ptr(), p.numel(), first) for p, b, first in rows])
    tensor_of_chunk_C = torch.arange(len(params), dtype=torch.int32).repeat_interleave(num_chunks_T)
    device = params[0].device
    squares_C2 = torch.empty(len(tensor_of_chunk_C), 2, device=device)
    lr = torch.empty((), device=device)
    return _Segment(start, stop, tensors_T4.to(device), tensor_of_chunk_C.to(device), squares_C2, lr)


def _same_memory_order(p: Tensor, g: Tensor) -> bool:
    """Whether element k of the one's memory belongs to element k of the other's; an axis of one has no order."""
    strides = zip(p.shape, p.stride(), g.stride(), strict=True)
    return g.dtype == p.dtype and all(a == b for size, a, b in strides if size > 1)
