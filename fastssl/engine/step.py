"""One optimiser step on one rank: rates, loss, backward, update, averages; done in one of four ways.

eager            the reference: what every test of exactness runs
eager-recompute  the same values with two thirds of the memory: residual blocks are computed again for backward
compiled         the online network as one graph, collectives included, inside DDP; what is cheap is computed again
graphed          the compiled step, optimiser included, captured once as a CUDA graph and replayed: for small shards,
                 where launching kernels takes longer than running them (not yet run on a GPU)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fastssl import dist
from fastssl.errors import ConfigError, FastsslError
from fastssl.methods.base import Config, Horizon, Method, Nets, Stage
from fastssl.nn.recompute import recompute_blocks
from loaders.batch import Batch

How = Literal["eager", "eager-recompute", "compiled", "graphed"]

WARM_UP_STEPS = 11  # what DDP's bookkeeping needs before its kernels can be captured


def default_how(device: torch.device) -> How:
    """Compiled on a GPU; eager on a CPU, where compiling takes longer than many a run."""
    return "compiled" if device.type == "cuda" else "eager"


def set_float32_precision(config: Config) -> None:
    """TF32 products for what a half-precision recipe computes in float32 (similarities, of embeddings that came out of
    half precision); full float32 for recipes in fp32."""
    half = config.precision != "fp32"
    torch.set_float32_matmul_precision("high" if half else "highest")
    torch.backends.cudnn.allow_tf32 = half


def keep_what_is_dear() -> None:
    """Have compiled steps keep the outputs of convolutions and products for backward and compute the rest again: batch
    norms, ReLUs, sums. A ResNet-50 then keeps 22.5 MB for each 224 image instead of 44 (`benchmarks/memory.py`); a
    budget (`activation_memory_budget`) that reaches as far computes convolutions again, too."""
    from torch._functorch import config  # takes a second to import

    config.aggressive_recomputation = True


class TrainingStep:
    """The step of one stage. Call `prepare` once with the first batch if it must, then the object for each step."""

    def __init__(self, stage: Stage, how: How, method: Method, nets: Nets, optimizer: Optimizer, device: torch.device):
        if how == "graphed" and (device.type != "cuda" or method.config.precision == "fp16"):
            raise ConfigError("--step graphed needs a GPU and a recipe in bf16 or fp32")
        self.how, self.method, self.nets, self.optimizer, self.device = how, method, nets, optimizer, device
        self.half_gradients = stage.gradients == "bf16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=method.config.precision == "fp16")
        self.num_skipped = torch.zeros((), dtype=torch.int64, device=device)  # steps that the scaler left out
        self._trained = nets
        self._graph: _Graph | None = None
        self._num_eager = 0
        if how == "eager-recompute" and not recompute_blocks(nets.online):
            raise ConfigError("--step eager-recompute: the network has no residual blocks that could be computed again")
        set_float32_precision(method.config)

    @property
    def _compiles(self) -> bool:
        return self.how in ("compiled", "graphed")

    @property
    def must_prepare(self) -> bool:
        """Whether `prepare` has anything to do."""
        return self._compiles or dist.world_size() > 1

    def __call__(self, step: int, horizon: Horizon, batch: Batch) -> dict[str, Tensor]:
        """Do step number `step`; returns the parts of the loss, detached. Never waits for the device."""
        rates = self.method.rates(step, horizon)
        if self.how == "graphed":
            parts = self._replayed(rates, batch)
        else:
            self._set_rates(rates)
            parts = self._forward_backward_update(batch)
            self.optimizer.zero_grad(set_to_none=True)
        self.method.after_step(self.nets, step, horizon)
        return parts

    def prepare(self, batch: Batch, warn: Callable[[str], None]) -> None:
        """Average gradients over the ranks, and compile; a throw-away pass on `batch` settles both, and all it changed
        is put back.

        DDP orders its buckets anew after its first backward pass, which would make the first step of every process
        sum in another order than the later ones: the throw-away pass takes that place. Where compiling fails, `warn`
        is told why and the step is eager from here on.

        Raises FastsslError where a parameter gets no gradient on any path of the loss.
        """
        if self._compiles:
            problem = self._compile(batch)
            if not problem:
                return
            warn(f"not compiled, the step is eager and slower: {problem}")
            self.how = "eager"
        self._trained = replace(self.nets, online=self._averaged(self.nets.online))
        if dist.world_size() > 1:
            self._throw_away(batch)

    def _compile(self, batch: Batch) -> str:
        """Have the loss call a compiled network; `nets.online` itself stays as it is, for evaluations. Returns what
        stood in the way, if anything did."""
        from torch._dynamo.exc import TorchDynamoException  # takes a second to import

        # A rank that cannot compile at all would leave the others waiting in the first collective of their graphs.
        try:
            x = torch.ones(8, device=self.device, requires_grad=True)
            torch.compile(lambda x: x.cos().square(), fullgraph=True)(x).sum().backward()
            problem = ""
        except (TorchDynamoException, OSError) as error:
            problem = _first_line(error)
        if not dist.all_true(not problem):
            return problem or "another rank has no working compiler"
        keep_what_is_dear()
        online = torch.compile(self.nets.online, fullgraph=True, dynamic=False)
        self._trained = replace(self.nets, online=self._averaged(online))  # type: ignore[arg-type]
        try:
            self._throw_away(batch)
        except TorchDynamoException as error:  # the same on all ranks: they compile the same code
            return _first_line(error)
        return ""

    def _averaged(self, online: nn.Module) -> nn.Module:
        """`online` averaging its gradients over the ranks."""
        if dist.world_size() == 1:
            return online
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        with warnings.catch_warnings():
            # What is to replace broadcast_buffers is not in every torch that we support.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            averaged = DistributedDataParallel(
                online, device_ids=device_ids, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        if self.half_gradients:
            averaged.register_comm_hook(None, bf16_compress_hook)
        return averaged

    def _throw_away(self, batch: Batch) -> None:
        before = {
            name: {key: value.clone() for key, value in module.state_dict().items()}
            for name, module in self.nets.saved().items()
        }
        try:
            self.method.loss(self._trained, batch)["total"].backward()
            unused = [n for n, p in self.nets.online.named_parameters() if p.requires_grad and p.grad is None]
        finally:
            for name, module in self.nets.saved().items():
                module.load_state_dict(before[name])
            self.optimizer.zero_grad(set_to_none=True)
        if unused:
            more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
            raise FastsslError(
                f"{', '.join(unused[:3])}{more} of the online network get no gradient: set requires_grad=False on what "
                "the loss does not use"
            )

    def _set_rates(self, rates: tuple[float, ...]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _forward_backward_update(self, batch: Batch) -> dict[str, Tensor]:
        parts = self.method.loss(self._trained, batch)
        self.scaler.scale(parts["total"]).backward()
        self.scaler.step(self.optimizer)
        if self.scaler.is_enabled():
            (found_inf,) = self.scaler._found_inf_per_device(self.optimizer).values()
            self.num_skipped += (found_inf != 0).to(torch.int64)
        self.scaler.update()
        return {name: value.detach() for name, value in parts.items()}

    def _replayed(self, rates: tuple[float, ...], batch: Batch) -> dict[str, Tensor]:
        """The same as a graph, once enough steps have run without."""
        if self._graph is None and self._num_eager < WARM_UP_STEPS:
            self._num_eager += 1
            self._set_rates(rates)
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                parts = self._forward_backward_update(batch)
                self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.current_stream().wait_stream(side)
            return parts
        if self._graph is None:
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = torch.tensor(rate, device=self.device)
            self._graph = _Graph(self._forward_backward_update, batch)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"].fill_(rate)
        return self._graph.replay(batch)


class _Graph:
    """A captured step, with the batch and the results in fixed places."""

    def __init__(self, step: Callable[[Batch], dict[str, Tensor]], batch: Batch):
        self.batch = _copied(batch)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.parts = step(self.batch)

    def replay(self, batch: Batch) -> dict[str, Tensor]:
        for static, coming in zip(_tensors(self.batch), _tensors(batch), strict=True):
            static.copy_(coming, non_blocking=True)
        self.graph.replay()
        return self.parts


def _tensors(batch: Batch) -> list[Tensor]:
    found = [batch.step]
    for part in batch.parts.values():
        found += [*part.x.values(), part.ids, part.labels, part.keys, part.positions]
        found += [] if part.columns is None else [part.columns]
    return found


def _copied(batch: Batch) -> Batch:
    parts = {
        name: replace(
            part,
            x={view: x.clone() for view, x in part.x.items()},
            ids=part.ids.clone(),
            labels=part.labels.clone(),
            columns=None if part.columns is None else part.columns.clone(),
            keys=part.keys.clone(),
            positions=part.positions.clone(),
        )
        for name, part in batch.parts.items()
    }
    return Batch(parts, batch.step.clone())


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
