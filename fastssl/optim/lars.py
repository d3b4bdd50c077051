"""LARS: momentum SGD whose step is scaled, tensor by tensor, to the norm of the weights.

One step is a few operations however many tensors there are, and never waits for the host. On CUDA it is two Triton
passes (:mod:`fastssl.optim.lars_triton`); elsewhere about twenty operations on whole lists: gradients are copied once
into a flat buffer in which every tensor fills whole rows; a tensor's trust ratio then reaches its elements as a
[rows, 1] column that broadcasts. A list of 0-dim ratios would not do: torch's foreach kernels fuse only lists whose
shapes agree, and fall back to one launch per tensor for any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fastssl.machine import runs_triton
from fastssl.optim.optimiser import Optimiser
from fastssl.optim.param_groups import Rule, as_one, lars_groups

if TYPE_CHECKING:
    from fastssl.optim.lars_triton import Fused

Form = Literal["paws", "simclr", "byol"]
FORMS = ("paws", "simclr", "byol")
ROW = 1024  # elements; wide enough that the ratio column costs nothing, narrow enough that padding does not either


@dataclass(frozen=True)
class _Segment:
    """One parameter group's part of the flat buffers."""

    params: list[Tensor]
    grads: list[Tensor]  # views of the flat scratch, shaped and strided like the parameters
    buffers: list[Tensor]  # the same views of the flat momentum
    grad_RC: Tensor
    buffer_RC: Tensor
    tensor_of_row_R1: Tensor  # int64: which of `params` a row belongs to


class Foreach:
    """The step of `LarsOptimizer` as operations on lists, for any floating dtype, memory order and device."""

    def __init__(self, params_by_group: list[list[Tensor]]):
        self.params = [p for params in params_by_group for p in params]
        num_rows = sum(_num_rows(p) for p in self.params)
        self._grad_RC = self.params[0].new_zeros(num_rows, ROW)
        self._buffer_RC = torch.zeros_like(self._grad_RC)
        self._segments: list[_Segment] = []
        start = 0
        for params in params_by_group:
            rows = torch.tensor([_num_rows(p) for p in params], dtype=torch.int64)
            tensor_of_row_R = torch.arange(len(params)).repeat_interleave(rows)
            stop = start + int(rows.sum())
            starts = [start + before for before in (rows.cumsum(0) - rows).tolist()]
            self._segments.append(
                _Segment(
                    params=params,
                    grads=[_view(self._grad_RC, row, p) for row, p in zip(starts, params, strict=True)],
                    buffers=[_view(self._buffer_RC, row, p) for row, p in zip(starts, params, strict=True)],
                    grad_RC=self._grad_RC[start:stop],
                    buffer_RC=self._buffer_RC[start:stop],
                    tensor_of_row_R1=tensor_of_row_R[:, None].to(self._grad_RC.device),
                )
            )
            start = stop
        self._grads = [view for segment in self._segments for view in segment.grads]
        self.buffers = [view for segment in self._segments for view in segment.buffers]

    def step(self, groups: list[dict[str, Any]], grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Update weights and momenta from the parameters' gradients. Never synchronises."""
        torch._foreach_copy_(self._grads, [p.grad for p in self.params if p.grad is not None])
        if grad_scale is not None:
            self._grad_RC.div_(grad_scale)

        # From here the scratch holds the step; on overflow it may hold NaN, and the old momentum has to survive it.
        for group, segment in zip(groups, self._segments, strict=True):
            gain = 1.0 if group["form"] == "byol" else -group["lr"]
            segment.grad_RC.mul_(gain if group["lars_exclude"] else _decay_and_ratio(segment, group).mul_(gain))
            out_RC = segment.buffer_RC if found_inf is None else segment.grad_RC
            torch.add(segment.grad_RC, segment.buffer_RC, alpha=group["momentum"], out=out_RC)
        if found_inf is not None:
            skip = found_inf != 0
            torch.where(skip, self._buffer_RC, self._grad_RC, out=self._buffer_RC)
            self._grad_RC.masked_fill_(skip, 0.0)
        for group, segment in zip(groups, self._segments, strict=True):
            delta_RC, delta = segment.grad_RC, segment.grads
            if found_inf is None:
                delta_RC, delta = segment.buffer_RC, segment.buffers
            if group["form"] == "byol":
                torch.mul(delta_RC, -group["lr"], out=segment.grad_RC)
                delta = segment.grads
            torch._foreach_add_(segment.params, delta)


@dataclass(frozen=True)
class Lars(Optimiser):
    """Settings of `LarsOptimizer`, which has the forms. By `rule` (`fastssl.optim.param_groups`) the encoder is adapted
    and decayed; a classifier above it is neither."""

    form: Form = "paws"
    rule: Rule = "paper"
    weight_decay: float = 0.0
    momentum: float = 0.9
    trust_coefficient: float = 0.001
    eps: float = 1e-8

    def build(self, parts: Sequence[Sequence[nn.Module]]) -> LarsOptimizer:
        groups = [group for part in parts for group in lars_groups(as_one(part), self.rule)]
        for group in groups[2:]:
            group["lars_exclude"] = True
        return LarsOptimizer(
            groups,
            lr=0.0,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            trust_coefficient=self.trust_coefficient,
            eps=self.eps,
            form=self.form,
        )


class LarsOptimizer(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling with classical momentum, in the three forms the field uses.

    With w a tensor, g its gradient, λ the weight decay, m the momentum and t the trust coefficient:

    - ``"paws"`` (facebookresearch/suncet): v ← m·v − lr·r·(g + λw), w ← w + v, r = t‖w‖ / (‖g‖ + λ‖w‖ + eps), where a
      tensor with ‖w‖ = 0 or ‖g‖ = 0 takes the raw g, undecayed;
    - ``"simclr"`` (google-research/simclr): the same with r = t‖w‖ / ‖g + λw‖, or 1 if either norm is 0; no eps;
    - ``"byol"`` (BYOL; SemPPL): the simclr ratio, v ← m·v + r·(g + λw), w ← w − lr·v.

    The first two keep the rate inside the momentum buffer, so a later change of rate does not rescale what has
    accumulated. The rate is read from ``group["lr"]`` at every step: a Python float, or, for a captured CUDA graph to
    read when it runs, a 0-dim float32 tensor; both give the same result. A group with ``lars_exclude=True`` takes the
    raw gradient: no ratio, no decay.

    All parameters need one floating dtype and one device, and dense gradients; one without a gradient is left alone,
    momentum included. Under a `torch.amp.GradScaler` the unscaling, and on overflow the skipping, happen on the device.
    The state is ``momentum_buffer`` for each parameter, of its shape, whatever the device. A graph can be captured
    after one ordinary step, and anew after `load_state_dict`.

    Raises ValueError for an unknown form, negative settings, or parameters of several dtypes or devices.
    """

    _step_supports_amp_scaling = True  # GradScaler then hands us `grad_scale` and `found_inf` and does not synchronise

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
        form: Form = "paws",
    ):
        if form not in FORMS:
            raise ValueError(f"unknown form of LARS {form!r}; one of {', '.join(FORMS)}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
        }
        for name, value in defaults.items():
            if value < 0:
                raise ValueError(f"{name} must not be negative, but is {value}")
        self._engine: Foreach | Fused | None = None
        self._laid_out: list[list[tuple[int, int]]] = []
        super().__init__(params, {**defaults, "form": form, "lars_exclude": False})

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Reached from load_state_dict, unpickling and deepcopy: momenta are then tensors of their own and must be
        # copied into the engine's at the next step.
        super().__setstate__(state)
        self._engine = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns the closure's value. Never synchronises."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        groups = [(group, params) for group, params in groups if params]
        if not groups:
            return loss
        engine = self._engine_for([params for _, params in groups])
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)  # GradScaler's
        engine.step([group for group, _ in groups], scale, found_inf)
        return loss

    def _engine_for(self, params_by_group: list[list[Tensor]]) -> Foreach | Fused:
        """What takes the step for these tensors; made anew, momenta kept, at the first step and where one is new or has
        moved."""
        laid_out = [[(id(p), p.data_ptr()) for p in params] for params in params_by_group]
        if self._engine is None or self._laid_out != laid_out:
            self._engine, self._laid_out = _make_engine(params_by_group), laid_out
            for p, buffer in zip(self._engine.params, self._engine.buffers, strict=True):
                if "momentum_buffer" in self.state[p]:
                    buffer.copy_(self.state[p]["momentum_buffer"])
                self.state[p]["momentum_buffer"] = buffer
        return self._engine


def _make_engine(params_by_group: list[list[Tensor]]) -> Foreach | Fused:
    """Raises ValueError for parameters of several dtypes or devices."""
    params = [p for params in params_by_group for p in params]
    kinds = {(p.dtype, p.device) for p in params}
    if len(kinds) != 1:
        raise ValueError(f"LARS needs parameters of one dtype on one device, not {sorted(map(str, kinds))}")
    if not _fits_kernels(params):
        return Foreach(params_by_group)
    from fastssl.optim.lars_triton import Fused

    return Fused(params_by_group)


def _fits_kernels(params: list[Tensor]) -> bool:
    """Whether these are float32 on a GPU that runs Triton and each fills its memory without gaps."""
    return all(runs_triton(p.device) and p.dtype == torch.float32 and p.stride() == _dense_stride(p) for p in params)


def _decay_and_ratio(segment: _Segment, group: dict[str, Any]) -> Tensor:
    """Add the decay to the segment's gradients and return the trust ratio, one number a row, [R, 1]."""
    paws, decay = group["form"] == "paws", group["weight_decay"]
    if not paws:
        torch._foreach_add_(segment.grads, segment.params, alpha=decay)
    norms = torch.stack(torch._foreach_norm(segment.params + segment.grads))
    weight_norm_T, grad_norm_T = norms.chunk(2)
    if paws:
        torch._foreach_add_(segment.grads, segment.params, alpha=decay)
    divisor_T = torch.add(grad_norm_T, weight_norm_T, alpha=decay).add_(group["eps"]) if paws else grad_norm_T
    ratio_T = (weight_norm_T * group["trust_coefficient"]).div_(divisor_T)
    # A zero weight has nothing to decay, so a ratio of 1 passes its raw gradient through. A zero gradient asks for no
    # step at all: in the paws form that must also silence the decay, in the others there is nothing left to scale.
    ratio_T.masked_fill_(weight_norm_T == 0, 1.0).masked_fill_(grad_norm_T == 0, 0.0)
    ratio_R1: Tensor = ratio_T.take(segment.tensor_of_row_R1)
    return ratio_R1


def _num_rows(p: Tensor) -> int:
    return -(-p.numel() // ROW)


def _view(flat_RC: Tensor, row: int, p: Tensor) -> Tensor:
    """The elements of `flat_RC` from `row` on, shaped like `p` and, where `p` is dense, in its memory order."""
    return flat_RC.as_strided(p.shape, _dense_stride(p), row * ROW)


def _dense_stride(p: Tensor) -> tuple[int, ...]:
    """The strides of `p` where it fills its memory without gaps, else those of a copy that does."""
    return torch.empty_like(p, device="meta").stride()
