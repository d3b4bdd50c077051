"""Gradients held to eager's before a step trusts them: what a compiler drops it drops without a word.

The online network is called with the arguments of one real loss, cut to a few images that repeat until they fill the
shapes of the step, so that the very code that will train is run and nothing is compiled again. Eager, the reference
sees these few images once: batch statistics of images that repeat are those of the images, and a gradient of n equal
rows is n times that of one. So the reference takes the memory of a few images, and the other no more than its step.

Every parameter's gradient is compared by its own norm. What rounding alone does is measured beside it: the reference is
computed a second time from pixels that differ by one unit in the last place of the type that the network computes in.
ReLUs and batch norm make much of that (a sign that flips): 1e-5 of a gradient in float32, all of it in bfloat16 for a
ResNet-50 that is not trained yet. A gradient may be as far off as that, several times; but its length is its length in
whatever precision, and one that is lost has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

FEW_IMAGES = 8  # at least: batch norm of two rows passes no gradient on, of few little
TOLERANCE = 0.05  # of a parameter's own norm, or
TIMES_ROUNDING = 8.0  # as many times what rounding does to it
LENGTHS = 1 / 4, 4  # how much shorter or longer than eager's it may be
ALL_ROUNDING = 0.5  # from here on rounding makes the gradient what it is, and its length says little
SMALLEST = 1e-4  # norms below this share of what is usual, element for element, are rounding: biases before a norm


@dataclass(frozen=True)
class Call:
    """One call of the online network by the loss: its arguments and the precision that it was made in."""

    args: tuple[Any, ...]
    device_type: str
    autocast: torch.dtype | None
    can_be_cut: bool

    @property
    def epsilon(self) -> float:
        """The relative distance of two neighbours in the type that the network computes in."""
        dtype = self.autocast or next(x.dtype for x in pytree.tree_leaves(self.args) if isinstance(x, Tensor))
        return torch.finfo(dtype).eps

    def few(self) -> Call:
        """The call with the first images of each argument, where all arguments are rows of images."""
        return self._with(lambda x: x[: num_few(len(x))].clone()) if self.can_be_cut else self

    def filled(self, like: Sequence[int]) -> Call:
        """The inverse of `few`: its images again and again until there are as many rows as `like` says."""
        lengths = iter(like)
        return self._with(lambda x: _repeated(x, next(lengths))) if self.can_be_cut else self

    @property
    def lengths(self) -> list[int]:
        return [len(x) for x in pytree.tree_leaves(self.args) if isinstance(x, Tensor)]

    def nudged(self) -> Call:
        """The call with pixels that rounding could have made of these."""
        return self._with(lambda x: x * (1 + self.epsilon) if x.is_floating_point() else x)

    def _with(self, change: Callable[[Tensor], Tensor]) -> Call:
        args = pytree.tree_map(lambda x: change(x) if isinstance(x, Tensor) else x, self.args)
        return Call(args, self.device_type, self.autocast, self.can_be_cut)


def num_few(num_rows: int) -> int:
    """The fewest images, FEW_IMAGES at least, that fill `num_rows` rows when they repeat."""
    return next((n for n in range(FEW_IMAGES, num_rows) if num_rows % n == 0), num_rows)


def _repeated(x: Tensor, num_rows: int) -> Tensor:
    out = torch.empty((num_rows, *x.shape[1:]), dtype=x.dtype, device=x.device)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        out = torch.empty_like(out, memory_format=torch.channels_last)
    return out.copy_(x.repeat(num_rows // len(x), *(1,) * (x.dim() - 1)))


class Watched(nn.Module):
    """Calls `network`, and keeps what it was called with."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.call: Call | None = None
        self.lengths: list[int] = []

    def forward(self, *args: Any) -> Any:
        leaves = pytree.tree_leaves(args)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        device_type = tensors[0].device.type
        autocast = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        call = Call(args, device_type, autocast, can_be_cut=len(tensors) == len(leaves))
        self.call, self.lengths = call.few(), call.lengths
        return self.network(*args)


@dataclass(frozen=True)
class Compared:
    """A parameter's gradient beside eager's, in units of the latter's norm: how far they are apart, how far rounding
    alone moves it, and how long it is."""

    distance: float
    rounding: float
    length: float

    @property
    def is_right(self) -> bool:
        if not self.distance <= max(TOLERANCE, TIMES_ROUNDING * self.rounding):  # nor is what is not a number
            return False
        if self.rounding > ALL_ROUNDING:
            return self.length > 0
        return LENGTHS[0] <= self.length <= LENGTHS[1]


def compare(
    network: nn.Module,
    watched: Watched,
    eager: Callable[[], AbstractContextManager[None]],
    named: dict[str, nn.Parameter],
) -> dict[str, Compared]:
    """By parameter of `network`: its gradient through `watched.network`, beside its gradient where `network` itself
    computes within the context that `eager` gives. Leaves no gradients; running statistics move."""
    call, lengths = watched.call, watched.lengths
    assert call is not None
    with eager():
        reference, rows = _gradients(network, call, named)
        rounded, _ = _gradients(network, call.nudged(), named)
    with watched.network.no_sync() if hasattr(watched.network, "no_sync") else nullcontext():  # type: ignore[operator]
        found, _ = _gradients(watched.network, call.filled(lengths), named, rows)
    squares = sum(float(g.double().square().sum()) for g in reference.values())
    usual = (squares / sum(g.numel() for g in reference.values())) ** 0.5
    result = {}
    for name, gradient in reference.items():
        least = max(SMALLEST * usual * gradient.numel() ** 0.5, torch.finfo(torch.float32).tiny)
        norm = max(float(gradient.norm()), least)
        apart, rounding = (float((other[name] - gradient).norm()) / norm for other in (found, rounded))
        result[name] = Compared(apart, rounding, 1.0 if norm == least else float(found[name].norm()) / norm)
    return result


def _gradients(
    network: nn.Module, call: Call, named: dict[str, nn.Parameter], rows: list[int] | None = None
) -> tuple[dict[str, Tensor], list[int]]:
    """The gradient of each parameter, float32 or wider, zero where there is none, and the rows of each output that has
    a gradient. The loss is a fixed random combination of the outputs; where `rows` says how many of their rows differ,
    of the means over those that are equal."""
    for parameter in named.values():
        parameter.grad = None
    autocast = nullcontext() if call.autocast is None else torch.autocast(call.device_type, call.autocast)
    with autocast:
        outputs = network(*call.args)
    outputs = [y for y in pytree.tree_leaves(outputs) if isinstance(y, Tensor) and y.requires_grad]
    rows = [len(y) for y in outputs] if rows is None else rows
    if outputs:
        torch.autograd.backward(outputs, [_cotangent(y, n) for y, n in zip(outputs, rows, strict=True)])
    found = {}
    for name, parameter in named.items():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        wide = torch.promote_types(gradient.dtype, torch.float32)
        found[name] = gradient.detach().to("cpu", wide, copy=True)  # the device has no room to keep three of each
        parameter.grad = None
    return found, rows


def _cotangent(y: Tensor, num_rows: int) -> Tensor:
    """Normal numbers, the same for every `num_rows` rows of y, divided by how often these come."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn((num_rows, *y.shape[1:]), generator=generator).to(y)
    return (draws / (len(y) // num_rows)).repeat(len(y) // num_rows, *(1,) * (y.dim() - 1))
