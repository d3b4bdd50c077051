"""LARS: momentum SGD whose step is scaled, tensor by tensor, to the norm of the weights.

One step is about twenty operations however many tensors there are, and never waits for the host. Gradients are copied
once into a flat buffer in which every tensor fills whole rows; a tensor's trust ratio then reaches its elements as a
[rows, 1] column that broadcasts. A list of 0-dim ratios would not do: torch's foreach kernels fuse only lists whose
shapes agree, and fall back to one launch per tensor for any other.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

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


class _Flat:
    """Flat scratch and momentum for the parameters that have a gradient, and per-group views of both."""

    def __init__(self, params_by_group: list[list[Tensor]]):
        self.params = [p for params in params_by_group for p in params]
        kinds = {(p.dtype, p.device) for p in self.params}
        if len(kinds) != 1:
            raise ValueError(f"LARS needs parameters of one dtype on one device, not {sorted(map(str, kinds))}")
        num_rows = sum(_num_rows(p) for p in self.params)
        self.grad_RC = self.params[0].new_zeros(num_rows, ROW)
        self.buffer_RC = torch.zeros_like(self.grad_RC)
        self.segments: list[_Segment] = []
        start = 0
        for params in params_by_group:
            rows = torch.tensor([_num_rows(p) for p in params], dtype=torch.int64)
            stop = start + int(rows.sum())
            starts = [start + before for before in (rows.cumsum(0) - rows).tolist()]
            self.segments.append(
                _Segment(
                    params=params,
                    grads=[_view(self.grad_RC, row, p) for row, p in zip(starts, params, strict=True)],
                    buffers=[_view(self.buffer_RC, row, p) for row, p in zip(starts, params, strict=True)],
                    grad_RC=self.grad_RC[start:stop],
                    buffer_RC=self.buffer_RC[start:stop],
                    tensor_of_row_R1=torch.arange(len(params)).repeat_interleave(rows)[:, None].to(self.grad_RC.device),
                )
            )
            start = stop
        self.grads = [view for segment in self.segments for view in segment.grads]

    def holds(self, params_by_group: list[list[Tensor]]) -> bool:
        """Whether this layout was made for exactly these tensors."""
        return len(params_by_group) == len(self.segments) and all(
            len(params) == len(segment.params) and all(a is b for a, b in zip(params, segment.params, strict=True))
            for params, segment in zip(params_by_group, self.segments, strict=True)
        )


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling with classical momentum, in the three forms the field uses.

    With w a tensor, g its gradient, λ the weight decay, m the momentum and t the trust coefficient:

    - ``"paws"`` (facebookresearch/suncet): v ← m·v − lr·r·(g + λw), w ← w + v, r = t‖w‖ / (‖g‖ + λ‖w‖ + eps), where a
      tensor with ‖w‖ = 0 or ‖g‖ = 0 takes the raw g, undecayed;
    - ``"simclr"`` (google-research/simclr): the same with r = t‖w‖ / ‖g + λw‖, or 1 if either norm is 0; no eps;
    - ``"byol"`` (BYOL; SemPPL): the simclr ratio, v ← m·v + r·(g + λw), w ← w − lr·v.

    The first two keep the rate inside the momentum buffer, so a later change of rate does not rescale what has
    accumulated. The rate is read from ``group["lr"]``, a Python float, at every step. A group with
    ``lars_exclude=True`` takes the raw gradient: no ratio, no decay.

    All parameters need one floating dtype and one device, and dense gradients; one without a gradient is left alone,
    momentum included. Under a `torch.amp.GradScaler` the unscaling, and on overflow the skipping, happen on the device.

    Raises ValueError for an unknown form, negative settings, or parameters of several dtypes or devices.
    """

    _step_supports_amp_scaling = True  # GradScaler then hands us `grad_scale` and `found_inf` and does not synchronise

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
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
        self._flat: _Flat | None = None
        super().__init__(params, {**defaults, "form": form, "lars_exclude": False})

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Reached from load_state_dict, unpickling and deepcopy: momenta are then tensors of their own and must be
        # copied into a new flat buffer at the next step.
        super().__setstate__(state)
        self._flat = None

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
        flat = self._flat_for([params for _, params in groups])
        torch._foreach_copy_(flat.grads, [p.grad for p in flat.params if p.grad is not None])
        grad_scale = getattr(self, "grad_scale", None)
        if grad_scale is not None:
            flat.grad_RC.div_(grad_scale)

        # From here the scratch holds the step; on overflow it may hold NaN, and the old momentum has to survive it.
        found_inf = getattr(self, "found_inf", None)
        for (group, _), segment in zip(groups, flat.segments, strict=True):
            gain = 1.0 if group["form"] == "byol" else -group["lr"]
            segment.grad_RC.mul_(gain if group["lars_exclude"] else _decay_and_ratio(segment, gain, group))
            out_RC = segment.buffer_RC if found_inf is None else segment.grad_RC
            torch.add(segment.grad_RC, segment.buffer_RC, alpha=group["momentum"], out=out_RC)
        if found_inf is not None:
            skip = found_inf != 0
            torch.where(skip, flat.buffer_RC, flat.grad_RC, out=flat.buffer_RC)
            flat.grad_RC.masked_fill_(skip, 0.0)
        for (group, _), segment in zip(groups, flat.segments, strict=True):
            delta = segment.buffers if found_inf is None else segment.grads
            torch._foreach_add_(segment.params, delta, alpha=-group["lr"] if group["form"] == "byol" else 1.0)
        return loss

    def _flat_for(self, params_by_group: list[list[Tensor]]) -> _Flat:
        """The flat buffers for these tensors; made anew, momenta kept, at the first step and if the set changes."""
        if self._flat is None or not self._flat.holds(params_by_group):
            flat = _Flat(params_by_group)
            for segment in flat.segments:
                for p, buffer in zip(segment.params, segment.buffers, strict=True):
                    if "momentum_buffer" in self.state[p]:
                        buffer.copy_(self.state[p]["momentum_buffer"])
                    self.state[p]["momentum_buffer"] = buffer
            self._flat = flat
        return self._flat


def _decay_and_ratio(segment: _Segment, gain: float, group: dict[str, Any]) -> Tensor:
    """Add the decay to the segment's gradients and return gain times the trust ratio, one number a row, [R, 1]."""
    paws, decay = group["form"] == "paws", group["weight_decay"]
    if not paws:
        torch._foreach_add_(segment.grads, segment.params, alpha=decay)
    norms = torch.stack(torch._foreach_norm(segment.params + segment.grads))
    weight_norm_T, grad_norm_T = norms.chunk(2)
    if paws:
        torch._foreach_add_(segment.grads, segment.params, alpha=decay)
    divisor_T = torch.add(grad_norm_T, weight_norm_T, alpha=decay).add_(group["eps"]) if paws else grad_norm_T
    ratio_T = (weight_norm_T * (group["trust_coefficient"] * gain)).div_(divisor_T)
    # A zero weight has nothing to decay, so the plain gain passes its raw gradient through. A zero gradient asks for
    # no step at all: in the paws form that must also silence the decay, in the others there is nothing left to scale.
    ratio_T.masked_fill_(weight_norm_T == 0, gain).masked_fill_(grad_norm_T == 0, 0.0)
    return ratio_T.take(segment.tensor_of_row_R1)


def _num_rows(p: Tensor) -> int:
    return -(-p.numel() // ROW)


def _view(flat_RC: Tensor, row: int, p: Tensor) -> Tensor:
    """The elements of `flat_RC` from `row` on, shaped like `p` and, where `p` is dense, in its memory order."""
    return flat_RC.as_strided(p.shape, torch.empty_like(p, device="meta").stride(), row * ROW)
