"""Ranks and the collectives between them.

Every function works alone too: without a process group there is one rank, and a collective is the identity. gloo (CPU)
and NCCL (GPU) run the same code. All ranks must call the collectives in the same order.

`init` makes three groups. The default one carries DDP's gradient buckets and most of what is below; the second carries
nothing but batch-norm messages, which DDP's buckets overtake during backward: two kinds of message in one queue would
wait for each other, and on gloo a difference of order between ranks silently adds the wrong tensors. The third, always
gloo, carries what hosts say to each other while their devices work.
"""

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as td
from torch import Tensor
from torch.nn import functional as F

T = TypeVar("T")

# Torch's flight recorder keeps the last collectives of NCCL, and writes them where one of them does not end.
FLIGHT_RECORDER = {"TORCH_FR_BUFFER_SIZE": "2000", "TORCH_NCCL_DUMP_ON_TIMEOUT": "1"}

Messages = Literal["statistics", "rows"]  # of batch norm, of the loss

_statistics_group: td.ProcessGroup | None = None
_silent: Messages | None = None
_host_group: td.ProcessGroup | None = None
_store: td.Store | None = None


def init(backend: str, *, init_method: str = "env://", timeout_s: float = 600.0, join_timeout_s: float = 600.0) -> None:
    """Join the other ranks; `backend` is "gloo" or "nccl" (which also selects this rank's GPU).

    Reads RANK, LOCAL_RANK and WORLD_SIZE, and for `env://` MASTER_ADDR and MASTER_PORT, as torchrun sets them.
    Raises RuntimeError where one of the first three is missing, torch's DistError where the ranks have not come
    together within `join_timeout_s`, SharedGpu where two ranks have one GPU. A later collective fails after
    `timeout_s`.
    """
    global _statistics_group, _host_group, _store
    missing = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name not in os.environ]
    if missing:
        raise RuntimeError(f"{', '.join(missing)} not set: start the ranks with torchrun or `fastssl train --gpus N`")
    device = torch.device("cuda", local_gpu()) if backend == "nccl" else None
    if device is not None:
        torch.cuda.set_device(device)
        for name, value in FLIGHT_RECORDER.items():
            os.environ.setdefault(name, value)
    own = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _store, rank, world = next(td.rendezvous(init_method, *own, timeout=timedelta(seconds=join_timeout_s)))
    _store.set_timeout(timedelta(seconds=timeout_s))
    td.init_process_group(
        backend,
        store=td.PrefixStore("groups", _store),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout_s),
        device_id=device,
    )
    _statistics_group = td.new_group(timeout=timedelta(seconds=timeout_s), pg_options=_first_in_line(backend))
    _host_group = td.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    if device is not None:
        _check_own_gpu(str(getattr(torch.cuda.get_device_properties(device), "uuid", local_rank())))


class SharedGpu(RuntimeError):
    """Two ranks have one GPU."""


def _first_in_line(backend: str) -> Any:
    """Options of the group of batch-norm messages: a layer waits for each of them, and they are small, so that on a GPU
    they go before what of DDP's buckets has not begun."""
    if backend != "nccl":
        return None
    options = td.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = True
    return options


def _check_own_gpu(gpu: str) -> None:
    """Raise SharedGpu, on every rank, where two of a host have the same: NCCL would not say so in these words."""
    owners = gather_objects((socket.gethostname(), gpu))
    shared = [rank for rank, owner in enumerate(owners) if owners.count(owner) > 1]
    if shared:
        ranks = ", ".join(map(str, shared))
        raise SharedGpu(f"ranks {ranks} share GPUs on {owners[shared[0]][0]}: start one rank for each GPU")


def shutdown() -> None:
    """Leave the groups; does nothing alone."""
    global _statistics_group, _host_group, _store
    _statistics_group = _host_group = _store = None
    if td.is_initialized():
        td.destroy_process_group()


@contextmanager
def first_of(world: int) -> Iterator[None]:
    """This process, which must be alone, as the first of `world` ranks whose messages go nowhere: to count them."""
    global _statistics_group
    if world == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers "fake"

    td.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    _statistics_group = td.new_group()
    try:
        yield
    finally:
        shutdown()


def rank() -> int:
    return td.get_rank() if td.is_initialized() else 0


def world_size() -> int:
    return td.get_world_size() if td.is_initialized() else 1


def local_rank() -> int:
    """Rank within this host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_gpu() -> int:
    """The number of this rank's GPU: that of the rank within its host, among those that the rank is shown; 0 where a
    launcher shows each rank its own alone (`srun --gpus-per-task 1`, `--gpu-bind`)."""
    return local_rank() % max(1, torch.cuda.device_count())


def is_main() -> bool:
    """True on the one rank that prints and writes."""
    return rank() == 0


def first_to(what: str) -> bool:
    """Whether no rank has asked this before. No collective: it answers when peers are gone, too. Where there is no
    store to ask, for the ranks never met or it went with the first of them, one rank a host and rank 1 are told yes."""
    if _store is not None:
        try:
            return _store.add(f"first to {what}", 1) == 1
        except RuntimeError:  # its rank is gone
            pass
    return local_rank() == 0 or os.environ.get("RANK") == "1"


def own_store() -> td.Store | None:
    """A connection of the caller's own to the store at which the ranks met; None alone, or where they met by a file."""
    store: Any = _store  # not all that stores can do is in torch's type stubs
    return td.PrefixStore("own", store.clone()) if store is not None and store.has_extended_api() else None


def num_collectives() -> int:
    """How many collectives this rank has begun. May be asked from any thread."""
    groups = (td.group.WORLD, _statistics_group, _host_group)
    return sum(group._get_sequence_number_for_group() for group in groups if group is not None)  # type: ignore[attr-defined]


def recorded_collectives() -> bytes | None:
    """What torch's flight recorder knows of the last collectives, as JSON; None but for NCCL, for which alone it is
    switched on. Not yet run on a GPU."""
    dump = getattr(torch._C._distributed_c10d, "_dump_fr_trace_json", None)
    return dump() if dump is not None and td.is_initialized() and td.get_backend() == "nccl" else None


def statistics_group() -> td.ProcessGroup:
    """The group of batch-norm messages. Raises RuntimeError alone, or where the ranks were not joined by `init`."""
    if _statistics_group is None:
        raise RuntimeError("no group for batch-norm statistics: join the ranks with fastssl.dist.init")
    return _statistics_group


@contextmanager
def silenced(messages: Messages) -> Iterator[None]:
    """Within it these messages are not sent, on any rank: each goes on with its own numbers, of the shapes that it
    would have got. To find out how long they take; for steps that are not compiled."""
    global _silent
    _silent = messages
    try:
        yield
    finally:
        _silent = None


def _arrived(sent: Tensor) -> Tensor:
    """What a functional collective gives, once it is there."""
    arrived: Tensor = torch.ops._c10d_functional.wait_tensor(sent)
    return arrived


def _own_sum(x: Tensor, group_name: str) -> Tensor | None:
    """What stands for the sum where its messages are silenced."""
    of_statistics = _statistics_group is not None and group_name == _statistics_group.group_name
    if _silent == "statistics" and of_statistics:
        return x.clone()
    return x * world_size() if _silent == "rows" and not of_statistics else None


def sum_over_group(x: Tensor, group_name: str) -> Tensor:
    """Sum of x over the ranks of the named group, as a new tensor without gradient.

    The functional collective, not `td.all_reduce`: torch.compile keeps it inside one graph.
    """
    if _silent is not None and (own := _own_sum(x, group_name)) is not None:
        return own
    ops = torch.ops._c10d_functional
    return _arrived(ops.all_reduce(x, "sum", group_name))


def gather_rows(x_ND: Tensor) -> Tensor:
    """Rows of all ranks in rank order, [world_size * N, ...], with gradient; every rank must hold equally many rows.

    Backward sums over ranks the gradients they hold for this rank's rows (an all-reduce, of which each rank needs its
    own slice only: a reduce-scatter). After DDP's average over ranks, the parameter gradient is that of the mean of the
    ranks' losses, each a function of all rows.
    """
    return gather_rows_together(x_ND)[0]


def gather_rows_together(*rows: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """`gather_rows` of several [N, D_i] tensors of one dtype in one message; backward is one message too, of those that
    need a gradient.

    Messages travel in `dtype` (default: the tensors' own), and results come back in the tensors' own. Values and
    gradients are rounded to `dtype` alone as well, so that one rank trains on the same numbers as many.
    """
    if not td.is_initialized() and dtype is None:
        return rows
    gathered: tuple[Tensor, ...] = _GatherRows.apply(dtype, *rows)  # type: ignore[no-untyped-call]
    return gathered


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of x over ranks, with gradient: same shape, equal on all ranks.

    Backward is the identity, and that is exact under DDP. Let m = (1/W) sum_r x_r and let every rank add the same F(m)
    to its loss. Then dF/dtheta = F'(m) (1/W) sum_r dx_r/dtheta. DDP itself averages over ranks, so each must contribute
    F'(m) dx_r/dtheta: with another 1/W here, the term would weigh W times too little. It follows that F must enter the
    losses of all ranks alike. (PAWS: the mean prediction of me-max.)
    """
    if not td.is_initialized():
        return x
    mean: Tensor = _MeanOverRanks.apply(x)  # type: ignore[no-untyped-call]
    return mean


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype | None, *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = dtype or rows[0].dtype
        ctx.set_materialize_grads(False)
        gathered = _as_one(_all_gather, rows, ctx.dtype)
        needed = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(*(g for g, need in zip(gathered, needed, strict=True) if not need))
        return gathered

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        held = [g for g in gradients if g is not None]
        summed = iter(_as_one(_reduce_scatter, held, ctx.dtype))
        return None, *(None if g is None else next(summed) for g in gradients)


def _as_one(collective: Callable[[Tensor], Tensor], rows: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The collective of several tensors' rows, side by side in one message of `dtype`; results in their own dtype."""
    if len(rows) == 1:
        return (collective(rows[0].to(dtype).contiguous()).to(rows[0].dtype),)
    message = collective(torch.cat([x.to(dtype) for x in rows], dim=1))
    return tuple(y.to(rows[0].dtype) for y in message.split([x.shape[1] for x in rows], dim=1))


def _all_gather(x: Tensor) -> Tensor:
    if not td.is_initialized():
        return x
    if _silent == "rows":
        return x.repeat(world_size(), *[1] * (x.dim() - 1))
    ops = torch.ops._c10d_functional
    return _arrived(ops.all_gather_into_tensor(x, world_size(), _world_name()))


def _reduce_scatter(x: Tensor) -> Tensor:
    if not td.is_initialized():
        return x
    if _silent == "rows":
        return x[: len(x) // world_size()].clone()
    ops = torch.ops._c10d_functional
    return _arrived(ops.reduce_scatter_tensor(x, "sum", world_size(), _world_name()))


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return sum_over_group(x.contiguous(), _world_name()) / world_size()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def _world_name() -> str:
    group = td.group.WORLD
    assert group is not None
    return group.group_name


@torch.no_grad()
def gather_ragged(x_ND: Tensor) -> Tensor:
    """Rows of all ranks in rank order, without gradient; ranks may hold different numbers of rows, also none.

    Waits for the device (the lengths are needed on the host).
    """
    if not td.is_initialized():
        return x_ND.detach()
    lengths_W = gather_rows(torch.tensor([len(x_ND)], device=x_ND.device)).tolist()
    longest = max(lengths_W)
    padded_ND = F.pad(x_ND, (0, 0) * (x_ND.dim() - 1) + (0, longest - len(x_ND)))
    shards = gather_rows(padded_ND).split(longest) if longest else [x_ND]
    return torch.cat([shard[:length] for shard, length in zip(shards, lengths_W, strict=bool(longest))])


@torch.no_grad()
def least_over_ranks(x: Tensor) -> Tensor:
    """Elementwise minimum of x over ranks, equal on all of them, without gradient."""
    if not td.is_initialized():
        return x
    ops = torch.ops._c10d_functional
    return _arrived(ops.all_reduce(x.contiguous(), "min", _world_name()))


def all_true(flag: bool) -> bool:
    """Whether every rank passed True. Waits for all ranks and for the device."""
    if not td.is_initialized():
        return flag
    votes = torch.tensor(float(flag), device=message_device())
    return bool(sum_over_group(votes, _world_name()).item() == world_size())


@torch.no_grad()
def broadcast(x: Tensor, source: int) -> Tensor:
    """Rank `source`'s tensor on all ranks, written into `x`, which has its shape and dtype everywhere."""
    if td.is_initialized():
        td.broadcast(x, src=source)
    return x


@torch.no_grad()
def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of x over ranks, equal on all of them, without gradient."""
    return sum_over_group(x.contiguous(), _world_name()) if td.is_initialized() else x


def broadcast_object(value: T, source: int = 0) -> T:
    """Rank `source`'s value (anything that pickles) on all ranks; the other ranks' values are ignored."""
    if not td.is_initialized():
        return value
    box = [value]
    td.broadcast_object_list(box, src=source, device=message_device())
    return box[0]


def gather_objects(value: T) -> list[T]:
    """Every rank's value (anything that pickles), in rank order, on all ranks. No device takes part."""
    if not td.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    td.all_gather_object(values, value, group=_host_group)
    return values


def begin_greatest(value: int) -> Callable[[], int]:
    """Begin to find the greatest of the ranks' values, between hosts alone; what is returned waits for it and gives
    it. All ranks must begin in the same order."""
    if not td.is_initialized():
        return lambda: value
    greatest = torch.tensor(value)
    work = td.all_reduce(greatest, td.ReduceOp.MAX, group=_host_group, async_op=True)

    def answer() -> int:
        work.wait()
        return int(greatest)

    return answer


def barrier() -> None:
    """Return once every rank has called it."""
    all_true(True)


def message_device() -> torch.device:
    """Where a message from the host must lie: NCCL carries nothing but GPU memory."""
    on_gpu = td.is_initialized() and td.get_backend() == "nccl"
    return torch.device("cuda", local_gpu()) if on_gpu else torch.device("cpu")
