"""One optimiser step on one rank: rates, loss, backward, update, averages; done in one of four ways.

eager            the reference: what every test of exactness runs
eager-recompute  the same values with two thirds of the memory: residual blocks are computed again for backward
compiled         the online network as one graph, collectives included, inside DDP; what is cheap is computed again
graphed          the compiled step, optimiser included, captured once as a CUDA graph and replayed: for small shards,
                 where launching kernels takes longer than running them (not yet run on a GPU)
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from fastssl import dist
from fastssl.engine import gradient_check
from fastssl.engine.graph import Graph, Kept
from fastssl.engine.settings import How
from fastssl.errors import ConfigError, FastsslError
from fastssl.machine import no_room_for_code, runs_triton
from fastssl.methods.base import Config, Horizon, Method, Nets, Stage
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.nn.recompute import recompute_blocks, recomputing
from fastssl.optim.fused import fuse
from loaders.batch import Batch

WARM_UP_STEPS = 11  # what DDP's bookkeeping needs before its kernels can be captured
NUM_AHEAD = 2  # steps by which the host may run ahead of the device: each holds a batch, and clocks tell nothing


def default_how(device: torch.device) -> How:
    """Compiled on a GPU for which Triton generates kernels, and where none is at hand, as on one that does; else eager,
    as on a CPU, where compiling takes longer than many a run."""
    planned = device.type == "cuda" and not torch.cuda.is_available()
    return "compiled" if planned or runs_triton(device) else "eager"


def set_float32_precision(config: Config) -> None:
    """TF32 products for what a half-precision recipe computes in float32 (similarities, of embeddings that came out of
    half precision); full float32 for recipes in fp32."""
    half = config.precision != "fp32"
    torch.set_float32_matmul_precision("high" if half else "highest")
    torch.backends.cudnn.allow_tf32 = half


def keep_what_is_dear(dear_alone: bool = True) -> None:
    """Have compiled steps keep the outputs of convolutions and products for backward and compute the rest again: batch
    norms, ReLUs, sums. A ResNet-50 then keeps 22.5 MB for each 224 image instead of 44 (`benchmarks/memory.py`), and
    reads and writes 44 of about 390 MB more; a budget (`activation_memory_budget`) that reaches as far computes
    convolutions again, too. With `dear_alone` False, as a card with room to spare may: have the compiler choose."""
    from torch._functorch import config  # takes a second to import

    config.aggressive_recomputation = dear_alone


class TrainingStep:
    """The step of one stage. Call `prepare` once with the first batch if it must, then the object for each step.

    With `keeps_all`, a compiled step keeps for backward what it likes: faster, where memory lets it.
    """

    def __init__(
        self,
        stage: Stage,
        how: How,
        method: Method[Any, Any],
        nets: Nets[Any],
        optimizer: Optimizer,
        device: torch.device,
        keeps_all: bool = False,
    ):
        if how == "graphed" and method.decay(0, Horizon(1, 1)) is not None:
            raise ConfigError("--step graphed: the recipe's weight decay moves, which no graph can follow; "
                              "choose --step compiled")  # fmt: skip
        if how == "graphed" and (device.type != "cuda" or method.config.precision == "fp16"):
            raise ConfigError("--step graphed needs a GPU and a recipe in bf16 or fp32")
        self.how, self.method, self.nets, self.optimizer, self.device = how, method, nets, optimizer, device
        self.keeps_all = keeps_all
        self.half_gradients = stage.gradients == "bf16"
        self.scaler = torch.amp.GradScaler(device.type, enabled=method.config.precision == "fp16")
        self.num_skipped = torch.zeros((), dtype=torch.int64, device=device)  # steps that the scaler left out
        self.dead: list[str] = []  # parameters to which `prepare`'s loss gave a gradient of zero
        self._trained = nets
        self._warn: Callable[[str], None] = lambda text: None
        # Graphs are captured there, and with them all that ran before on the same stream: DDP, warm-ups.
        self._stream = torch.cuda.Stream(device) if how == "graphed" else None
        self._graph: Graph | None = None
        self._num_eager = 0
        self._behind: deque[torch.cuda.Event] = deque()
        if how == "eager-recompute" and not recompute_blocks(nets.online):
            raise ConfigError("--step eager-recompute: the network has no residual blocks that could be computed again")
        set_float32_precision(method.config)
        fuse(optimizer, device)

    @property
    def _compiles(self) -> bool:
        return self.how in ("compiled", "graphed")

    @property
    def averages(self) -> bool:
        """Whether there are other ranks, with whose gradients this one's are averaged."""
        return dist.world_size() > 1

    @property
    def must_prepare(self) -> bool:
        """Whether `prepare` has anything to do."""
        return self.how != "eager" or self.averages

    def __call__(self, step: int, horizon: Horizon, batch: Batch) -> dict[str, Tensor]:
        """Do step number `step`; returns the parts of the loss, detached. Waits for the device no further than for the
        end of the step NUM_AHEAD before."""
        rates = self.method.rates(step, horizon)
        self._set_decay(self.method.decay(step, horizon))
        parts = (self._replayed if self.how == "graphed" else self._launched)(rates, batch)
        self.method.after_step(self.nets, step, horizon)
        self._stay_close()
        return parts

    def without_averaging(self) -> AbstractContextManager[None]:
        """Within it ranks keep their own gradients, as an eager step alone can."""
        online = self._trained.online
        return online.no_sync() if isinstance(online, DistributedDataParallel) else nullcontext()

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """The parts of the loss, as a step computes them."""
        return self.method.loss(self._trained, batch)

    def _stay_close(self) -> None:
        if self.device.type == "cuda":
            self._behind.append(torch.cuda.current_stream(self.device).record_event())
            if len(self._behind) > NUM_AHEAD:
                self._behind.popleft().synchronize()

    # ------------------------------------------------------------------------------------------------- before step 1

    def prepare(self, batch: Batch, warn: Callable[[str], None]) -> None:
        """Average gradients over the ranks, compile, and compare with eager's what is not eager; throw-away passes on
        `batch` settle all three, and whatever they changed is put back.

        DDP orders its buckets anew after its first backward pass, which would make the first step of every process
        sum in another order than the later ones: the throw-away pass takes that place. Where compiling fails, or
        gradients are not eager's, `warn` is told why and the step is eager from here on.

        Raises FastsslError where a parameter gets no gradient on any path of the loss.
        """
        self._warn = warn
        if self.how != "eager":
            problem = self._prepared(batch)
            if not problem:
                self._warn_of_the_dead()
                return
            warn(f"--step {self.how} is not used, the step is eager and takes more time or memory: {problem}")
            self.how, self._stream, self.dead = "eager", None, []
            recompute_blocks(self.nets.online, again=False)
        self._trained = replace(self.nets, online=self._averaged(self.nets.online))
        if self.averages and (unused := self._throw_away(batch)):
            raise FastsslError(
                f"{named(unused)} of the online network get no gradient: set requires_grad=False on what the loss does "
                "not use"
            )
        self._warn_of_the_dead()

    def _warn_of_the_dead(self) -> None:
        if self.dead:
            num = sum(p.requires_grad for p in self.nets.online.parameters())
            self._warn(
                f"{len(self.dead)} of {num} parameters get a gradient of zero from the loss ({named(self.dead)})"
            )

    def _prepared(self, batch: Batch) -> str:
        """Set up whatever is not eager; what stands in its way, if anything does."""
        if self._compiles and (problem := self._no_compiler()):
            return problem
        from torch._dynamo.exc import TorchDynamoException  # takes a second to import

        online = self.nets.online
        if self._compiles:
            keep_what_is_dear(not self.keeps_all)
            online = torch.compile(online, fullgraph=True, dynamic=False)
        with self._on_own_stream():
            watched = gradient_check.Watched(self._averaged(online))
            self._trained = replace(self.nets, online=watched)
            try:
                unused = self._throw_away(batch)
            except TorchDynamoException as error:  # the same on all ranks: they compile the same code
                return _first_line(error)
            problem = f"{named(unused)} get no gradient" if unused else self._differs(watched)
        self._trained = replace(self.nets, online=watched.network)
        return _of_any_rank(problem)

    def _no_compiler(self) -> str:
        """What keeps any rank from compiling at all. (It would leave the others waiting in the first collective of
        their graphs.)"""
        from torch._dynamo.exc import TorchDynamoException

        problem = no_room_for_code("TORCHINDUCTOR_CACHE_DIR")
        try:
            if not problem:
                x = torch.ones(8, device=self.device, requires_grad=True)
                torch.compile(lambda x: x.cos().square(), fullgraph=True)(x).sum().backward()
        except (TorchDynamoException, OSError) as error:
            problem = _first_line(error)
        if not dist.all_true(not problem):
            return problem or "another rank has no working compiler"
        return ""

    def _differs(self, watched: gradient_check.Watched) -> str:
        """Which gradients are not those of an eager step, if any are not."""
        online = self.nets.online
        # Blocks that are computed again take no more memory, where the network cannot be shown few images.
        again = self._compiles and watched.call is not None and not watched.call.can_be_cut

        def eager() -> AbstractContextManager[None]:
            return recomputing(online, again)

        parameters = {name: p for name, p in online.named_parameters() if p.requires_grad}
        with self._put_back():
            compared = gradient_check.compare(online, watched, eager, parameters)
        wrong = {name: found for name, found in compared.items() if not found.is_right}
        if not wrong:
            return ""
        lost = sum(found.length == 0 for found in wrong.values())
        return (
            f"its gradients of {len(wrong)} of {len(parameters)} parameters are not those of an eager step, {lost} of "
            f"them zero ({named(list(wrong))})"
        )

    def _averaged(self, online: nn.Module) -> nn.Module:
        """`online` averaging its gradients over the ranks."""
        if not self.averages:
            return online
        with warnings.catch_warnings():
            # What is to replace broadcast_buffers is not in every torch that we support.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            averaged = DistributedDataParallel(online, broadcast_buffers=False, gradient_as_bucket_view=True)
        if self.half_gradients:
            averaged.register_comm_hook(None, bf16_compress_hook)
        return averaged

    def _throw_away(self, batch: Batch) -> list[str]:
        """One backward pass, of which nothing stays; the parameters that got no gradient."""
        with self._put_back():
            try:
                self.method.loss(self._trained, batch)["total"].backward()
                gradients = {n: p.grad for n, p in self.nets.online.named_parameters() if p.requires_grad}
                self.dead = [
                    name for name, gradient in gradients.items() if gradient is not None and not gradient.any()
                ]
                return [name for name, gradient in gradients.items() if gradient is None]
            finally:
                self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def _put_back(self) -> Iterator[None]:
        """Afterwards all that a checkpoint holds of the networks is what it was. Norms whose scale is zero, as some are
        when training begins, let gradients through meanwhile."""
        before = {
            name: {key: value.to("cpu", copy=True) for key, value in module.state_dict().items()}
            for name, module in self.nets.saved().items()
        }
        with torch.no_grad():
            for layer in self.nets.online.modules():
                if isinstance(layer, GlobalBatchNorm) and layer.weight is not None and not layer.weight.any():
                    layer.weight.fill_(1.0)
        try:
            yield
        finally:
            for name, module in self.nets.saved().items():
                module.load_state_dict(before[name])

    @contextmanager
    def _on_own_stream(self) -> Iterator[None]:
        """On the stream of the graph, where there will be one, between what comes before and after on the usual one."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(self._stream)

    # --------------------------------------------------------------------------------------------------- each step

    def _set_rates(self, rates: tuple[float, ...]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _set_decay(self, decay: float | None) -> None:
        for group in self.optimizer.param_groups[::2] if decay is not None else ():
            group["weight_decay"] = decay

    def _forward_backward_update(self, batch: Batch) -> dict[str, Tensor]:
        parts = self.method.loss(self._trained, batch)
        self.scaler.scale(parts["total"]).backward()
        self.scaler.step(self.optimizer)
        if self.scaler.is_enabled():
            (found_inf,) = self.scaler._found_inf_per_device(self.optimizer).values()
            self.num_skipped += (found_inf != 0).to(torch.int64)
        self.scaler.update()
        return {name: value.detach() for name, value in parts.items()}

    def _launched(self, rates: tuple[float, ...], batch: Batch) -> dict[str, Tensor]:
        self._set_rates(rates)
        parts = self._forward_backward_update(batch)
        self.optimizer.zero_grad(set_to_none=True)
        return parts

    def _replayed(self, rates: tuple[float, ...], batch: Batch) -> dict[str, Tensor]:
        """The same as a graph, once enough steps have run without."""
        if self._graph is None and self._num_eager < WARM_UP_STEPS:
            self._num_eager += 1
            with self._on_own_stream():
                return self._launched(rates, batch)
        if self._graph is None:
            return self._captured(rates, batch)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"].fill_(rate)
        return self._graph.replay(batch)

    def _captured(self, rates: tuple[float, ...], batch: Batch) -> dict[str, Tensor]:
        """Capture the graph and do this step with it; compiled, and so from here on, where that is not the step that
        its kernels do when they are launched one by one."""
        assert self._stream is not None
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = torch.tensor(rate, device=self.device)
        before = Kept(self._state())
        with self._on_own_stream():
            launched = self._forward_backward_update(batch)
            self.optimizer.zero_grad(set_to_none=True)
        after = Kept(self._state())
        before.put_back()
        try:
            graph = Graph(self._forward_backward_update, batch, self._stream)
            parts = graph.replay(batch)
            apart = Kept(self._state()).distance(after, before)
            problem = "" if apart <= gradient_check.TOLERANCE else f"a replay moves the weights {apart:.1g} x otherwise"
        except RuntimeError as error:
            problem = _first_line(error)
        if not (problem := _of_any_rank(problem)):
            self._graph = graph
            return parts
        self._warn(f"--step graphed is not used, the step is compiled and slower where it is short: {problem}")
        after.put_back()
        self.optimizer.zero_grad(set_to_none=True)  # what a capture left is the graph's
        self.how = "compiled"
        return launched

    def _state(self) -> list[Tensor]:
        """All that a step changes."""
        found = [t for module in self.nets.saved().values() for t in (*module.parameters(), *module.buffers())]
        return found + [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]


def named(names: list[str]) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _of_any_rank(problem: str) -> str:
    """The same answer on all ranks: a problem of this one, or else of the first that has any."""
    if dist.all_true(not problem):
        return ""
    return problem or next(filter(None, dist.gather_objects(problem)))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
