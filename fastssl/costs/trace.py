"""One training step of any method, counted without data, devices or peers.

The method's own loss and its backward pass run on fake tensors, which have shapes but no elements, at one rank's share
of the batch, beside a fake process group of all ranks. Whatever the code does (its products, messages and memory) is
what is counted; nothing here knows a method.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastssl import dist
from fastssl.errors import FastsslError
from fastssl.methods.base import Artefact, Facts, Stage
from fastssl.nn.recompute import Blocks
from loaders.batch import Batch, Part
from loaders.plan.plan import Plan
from loaders.plan.views import Balanced, Stream, View

_aten = torch.ops.aten


class Untraceable(FastsslError):
    """The step cannot be run without data; the message says why."""


@dataclass(frozen=True)
class Message:
    """One collective that this rank takes part in; `num_bytes` is the size of a gather's result, else of what this
    rank puts in."""

    op: str  # all_reduce, all_gather_into_tensor, reduce_scatter_tensor
    about: Literal["statistics", "rows"]  # batch norm's own group, or what a loss exchanges
    num_bytes: int


@dataclass(frozen=True)
class TokenBlocks:
    """Bytes of the residual blocks that have no convolution, as a transformer's, of one step.

    num      blocks
    inputs   what goes into them
    outputs  of their products, attention among them
    kept     for backward, by an eager step, their inputs included
    traffic  what their products read and write, each tensor once a kernel, forward and backward
    """

    num: int = 0
    inputs: int = 0
    outputs: int = 0
    kept: int = 0
    traffic: int = 0


@dataclass(frozen=True)
class Trace:
    """Counts of one step on one rank of `world`: forward and backward, without DDP's gradient buckets and the update.

    flops              multiply-adds count two; "convolutions", "linear layers" (products with a weight), "attention"
                       (its products, those of its backward pass included that it computes again), and "similarities"
                       (all other products)
    conv_io_bytes      inputs and outputs of the convolutions that are trained: (inputs, outputs)
    conv_traffic_bytes what convolutions read and write, each tensor once a kernel; backward is two kernels, one for
                       the gradient of the input and one for that of the weight
    tokens             of blocks without convolutions
    recomputes         whether there are blocks that `--step eager-recompute` would compute again
    messages           in order
    norm_channels      of each batch norm of the online network
    embedding_width    of the online network's last linear layer; 0 without any
    num_parameters     trained
    num_moments        numbers that the optimiser keeps for each
    gradient_bytes     what their gradients travel as
    fixed_bytes        everything else that lies beside them: other networks, buffers
    batch_bytes        the batch's pixels as the loss gets them
    saved_bytes        alive at the end of the forward pass, inputs and weights apart
    peak_bytes         the most alive at any time, gradients made so far included
    """

    plan: Plan
    world: int
    flops: Mapping[str, int]
    conv_io_bytes: tuple[int, int]
    conv_traffic_bytes: int
    tokens: TokenBlocks
    recomputes: bool
    messages: tuple[Message, ...]
    norm_channels: tuple[int, ...]
    embedding_width: int
    num_parameters: int
    num_moments: int
    gradient_bytes: int
    fixed_bytes: int
    batch_bytes: int
    saved_bytes: int
    peak_bytes: int


def trace_step(stage: Stage, facts: Facts, world: int) -> Trace:
    """Trace a training step of `stage` as one of `world` ranks sees it; seconds, whatever the sizes.

    `world` must divide the batches (`loaders.plan.plan.check_world`). To be called before the ranks are joined.
    Raises Untraceable where the loss needs what an earlier stage makes, or has shapes that depend on values, or an
    operation without a rule for shapes.
    """
    assert stage.do == "train" and not td.is_initialized()
    try:
        with dist.first_of(world), FakeTensorMode(allow_fallback_kernels=False):
            return _counted(stage, facts, world)
    except (
        fake_tensor.DataDependentOutputException,
        fake_tensor.DynamicOutputShapeException,
        fake_tensor.UnsupportedOperatorException,
    ) as error:
        raise Untraceable(f"the loss cannot run on shapes alone ({error})") from error


_TRACED: dict[str, Trace | Untraceable] = {}


def traced(stage: Stage, facts: Facts, world: int) -> Trace:
    """What `trace_step` gives or raises, asked of it once a process; stages that compute the same share it."""
    key = repr((stage.config, stage.gradients, facts, world))
    if key not in _TRACED:
        try:
            _TRACED[key] = trace_step(stage, facts, world)
        except Untraceable as error:
            _TRACED[key] = error
    if isinstance(found := _TRACED[key], Untraceable):
        raise found
    return found


def _counted(stage: Stage, facts: Facts, world: int) -> Trace:
    method = stage.config.build(facts, _NotMade())
    plan, nets = method.plan(), method.nets()
    for name, module in nets.modules().items():
        module.train(name != "frozen")
    batch = _fake_batch(plan, facts.channels, world)
    pixels = [x for part in batch.parts.values() for x in part.x.values()]
    trained = [p for p in nets.online.parameters() if p.requires_grad]
    lasting = [t for module in nets.modules().values() for t in (*module.parameters(), *module.buffers())]

    counter = _Counter(lasting + pixels)
    watched = _TokenBlocksOf(nets.online, counter)
    with counter, _LinearLayers() as linear, watched:
        total = method.loss(nets, batch)["total"]
        saved_bytes = counter.live_bytes
        total.backward()
    widths = [m.out_features for m in nets.online.modules() if isinstance(m, nn.Linear)]
    products, num_parameters = counter.flops["products"], sum(p.numel() for p in trained)
    return Trace(
        plan=plan,
        world=world,
        flops={
            "convolutions": counter.flops["convolutions"],
            "linear layers": linear.flops,
            "attention": counter.flops["attention"],
            "similarities": products - linear.flops,
        },
        conv_io_bytes=(counter.conv_inputs, counter.conv_outputs),
        conv_traffic_bytes=counter.conv_traffic,
        tokens=watched.found(),
        recomputes=any(isinstance(m, Blocks) for m in nets.online.modules()),
        messages=tuple(counter.messages),
        norm_channels=tuple(m.num_features for m in nets.online.modules() if isinstance(m, _BatchNorm)),
        embedding_width=widths[-1] if widths else 0,
        num_parameters=num_parameters,
        num_moments=method.config.optimizer.num_moments,
        gradient_bytes=num_parameters * (2 if stage.gradients == "bf16" else 4),
        fixed_bytes=_num_bytes(lasting) - _num_bytes(trained),
        batch_bytes=_num_bytes(pixels),
        saved_bytes=saved_bytes,
        peak_bytes=counter.peak_bytes,
    )


class _NotMade(Mapping[str, Artefact]):
    """The inputs of a stage whose earlier stages have not run."""

    def __getitem__(self, name: str) -> Artefact:
        raise Untraceable(f"the loss needs {name!r}, which an earlier stage makes")

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0


def num_rows(stream: Stream, view: View) -> int:
    """Images that a step puts through the networks as `view`, over all ranks."""
    return stream.batch_global * view.copies * len(view.turns)


def _fake_batch(plan: Plan, channels: int, world: int) -> Batch:
    parts = {}
    for stream in plan.streams:
        images = stream.batch_global // world
        x = {
            view.name: torch.empty(num_rows(stream, view) // world, channels, view.size, view.size).to(
                memory_format=torch.channels_last
            )
            for view in stream.views
        }
        ids, labels, columns, keys, positions = (torch.zeros(images, dtype=torch.int64) for _ in range(5))
        parts[stream.name] = Part(
            x, ids, labels, columns if isinstance(stream.order, Balanced) else None, keys, positions
        )
    return Batch(parts, torch.zeros((), dtype=torch.int64))


class _TokenBlocksOf:
    """While it is entered, watches the residual blocks of a network that have no convolution."""

    def __init__(self, network: nn.Module, counter: _Counter) -> None:
        groups = [m for m in network.modules() if isinstance(m, Blocks)]
        blocks = [block for group in groups for block in group]
        self._blocks: list[Any] = [b for b in blocks if not any(isinstance(m, nn.Conv2d) for m in b.modules())]
        self._counter = counter
        self._inputs = self._kept = 0
        self._products = Counter[str]()

    def __enter__(self) -> None:
        for block in self._blocks:
            block.lockstep = partial(self._watched, block.lockstep)

    def __exit__(self, *_: object) -> None:
        for block in self._blocks:
            del block.lockstep

    def _watched(self, lockstep: Callable[[Sequence[Tensor]], list[Tensor]], xs: Sequence[Tensor]) -> list[Tensor]:
        before, products = self._counter.live_bytes, self._counter.products.copy()
        ys = lockstep(xs)
        self._inputs += _num_bytes(xs)
        self._kept += self._counter.live_bytes - before
        self._products += self._counter.products - products
        return ys

    def found(self) -> TokenBlocks:
        traffic = 3 * self._products["traffic"]  # either gradient's kernel reads and writes as much as the product's
        return TokenBlocks(len(self._blocks), self._inputs, self._products["outputs"], self._kept, traffic)


class _LinearLayers(TorchFunctionMode):
    """FLOPs of products with weights: forward, and as often again as gradients of input and weight are needed."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight, *_ = args
            gradients = (x.requires_grad + weight.requires_grad) * torch.is_grad_enabled()
            self.flops += 2 * x.numel() * weight.shape[0] * (1 + gradients)
        return func(*args, **(kwargs or {}))


class _Counter(TorchDispatchMode):
    """Sees every operation that reaches a kernel, forward and backward."""

    def __init__(self, lasting: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops: Counter[str] = Counter()
        self.conv_inputs = self.conv_outputs = self.conv_traffic = 0
        self.products = Counter[str]()  # bytes: "outputs", and "traffic" with what goes into them
        self.messages: list[Message] = []
        self.live_bytes = self.peak_bytes = 0
        self._storages = {t.untyped_storage()._cdata for t in lasting}
        self._statistics = dist.statistics_group().group_name if dist.world_size() > 1 else ""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        out: Any = _statistics_of(*args) if packet is _aten.batch_norm_update_stats else func(*args, **kwargs)
        # torch's formulas have no entry for what works in place: addmm_ costs what addmm does.
        formula = flop_registry.get(packet) or flop_registry.get(getattr(_aten, func._opname.rstrip("_"), None))
        part = _part(packet, func)
        if part == "attention":
            self.flops[part] += _attention_flops(func, args)
        elif part == "convolutions":
            self.flops[part] += _convolution_flops(packet, args, out)
        elif formula is not None:
            self.flops[part] += formula(*args, **kwargs, out_val=out)
        if part == "attention" or (formula is not None and part == "products"):
            made = tree_leaves(out)[:1]
            self.products["outputs"] += _num_bytes(made)
            self.products["traffic"] += _num_bytes(made) + _num_bytes(t for t in args if isinstance(t, Tensor))
        if packet is _aten.convolution:
            self.conv_traffic += _num_bytes((*args[:2], out))
        elif packet is _aten.convolution_backward:
            gradient, x, weight, *_ = args
            wanted = args[-1]
            self.conv_traffic += sum(_num_bytes([gradient, x, weight]) for w in wanted[:2] if w)
            if wanted[1]:
                self.conv_inputs += _num_bytes([x])
                self.conv_outputs += _num_bytes([gradient])
        elif func.namespace == "_c10d_functional" and packet is not torch.ops._c10d_functional.wait_tensor:
            gathers = "all_gather" in func._opname
            self.messages.append(
                Message(
                    op=func._opname,
                    about="statistics" if args[-1] == self._statistics else "rows",
                    num_bytes=_num_bytes(tree_leaves(out if gathers else args[0])),
                )
            )
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._watch(tensor.untyped_storage())
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self._storages.add(key)
            self.live_bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._freed, key, num_bytes).atexit = False

    def _freed(self, key: int, num_bytes: int) -> None:
        self._storages.discard(key)
        self.live_bytes -= num_bytes


def _part(packet: Any, func: Any) -> str:
    """Of a step's arithmetic, which part an operation belongs to, if it has any."""
    if "scaled_dot_product" in func._opname:
        return "attention"
    return "convolutions" if packet in (_aten.convolution, _aten.convolution_backward) else "products"


def _convolution_flops(packet: Any, args: tuple[Any, ...], out: Any) -> int:
    """As many forward and for each gradient that is wanted. (torch's formula takes no account of groups backward.)"""
    backward = packet is _aten.convolution_backward
    made, weight = (args[0], args[2]) if backward else (out, args[1])
    product: int = 2 * made.numel() * weight[0].numel()
    return product * (sum(args[-1][:2]) if backward else 1)


def _attention_flops(func: Any, args: tuple[Any, ...]) -> int:
    """Two products forward. Backward five: two gradients of each, and the first of them once again. (torch has no
    formula for a CPU's kernels, which count as a GPU's.)"""
    backward = "backward" in func._opname
    q, k = args[1:3] if backward else args[:2]
    product: int = 2 * q.numel() * k.shape[-2]
    return product * (5 if backward else 2)


def _statistics_of(x: Tensor, running_mean: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    """Shapes of `batch_norm_update_stats`, for which torch has none: it would run it on zeros of x's full size."""
    dtype = torch.float32 if running_mean is None else running_mean.dtype
    return x.new_empty(x.shape[1], dtype=dtype), x.new_empty(x.shape[1], dtype=dtype)


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
