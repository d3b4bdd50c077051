"""Collectives: values and gradients on three ranks against one process, and the identity alone."""

import time

import pytest
import torch
import torch.distributed as td

from fastssl import dist
from tests.ranks.pool import RanksFailed, run_ranks

WORLD = 3  # two ranks would not tell W from W^2 - W


@pytest.fixture(scope="module")
def ranks():
    """What `_everything` returned on each rank."""
    return run_ranks(WORLD, _everything)


def _everything():
    return {
        "gradient": _gradient(),
        "ragged": [dist.gather_ragged(_ROWS[:n][_share(n)]) for n in (7, 2, 0)],
        "ragged_int": dist.gather_ragged(torch.arange(5)[_share(5)]),
        "gathered": dist.gather_rows(torch.full((2, 1), dist.rank())),
        "together": _together(),
        "mean": dist.mean_over_ranks(torch.tensor([1.0 * dist.rank()])),
        "votes": [dist.all_true(True), dist.all_true(dist.rank() != 1)],
        "object": dist.broadcast_object({"from": dist.rank()}, source=1),
        "main": (dist.is_main(), dist.rank(), dist.local_rank(), dist.world_size()),
        "own_group": dist.statistics_group().group_name != td.group.WORLD.group_name,
        "silenced": _silenced(),
        "barrier_s": _barrier_wait_s(),
    }  # fmt: skip


def _silenced():
    """Within `silenced`: (sum of batch norm's group, gathered rows, their gradient, mean), collectives begun, and the
    sum once more afterwards."""
    own, group = torch.full((2,), 1.0 + dist.rank()), dist.statistics_group().group_name
    found = {}
    for messages in ("statistics", "rows"):
        rows = own.view(2, 1).clone().requires_grad_()
        begun = dist.num_collectives()
        with dist.silenced(messages):
            summed = dist.sum_over_group(own, group)
            gathered = dist.gather_rows(rows)
            gathered.sum().backward()
            mean = dist.mean_over_ranks(own)
        num = dist.num_collectives() - begun
        found[messages] = summed.tolist(), gathered.flatten().tolist(), rows.grad.flatten().tolist(), mean.tolist(), num
    return found | {"afterwards": dist.sum_over_group(own, group).tolist()}


def _share(total):
    """This rank's rows of `total`: unequal ones, and for few rows none."""
    return slice(total * dist.rank() // WORLD, total * (dist.rank() + 1) // WORLD)


_ROWS = torch.arange(14.0, dtype=torch.float64).view(7, 2)


def test_silenced_messages_are_not_sent_and_shapes_stay(ranks):
    """Catches a class of messages that is still sent, another that is not, and silence that lasts."""
    everyones = [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    for rank, each in enumerate(ranks):
        own = [1.0 + rank] * 2
        found = each["silenced"]
        assert found["statistics"] == (own, everyones, [3.0, 3.0], [2.0, 2.0], 3)
        assert found["rows"] == ([6.0, 6.0], own * WORLD, [1.0, 1.0], own, 1)
        assert found["afterwards"] == [6.0, 6.0]


def test_gradients_are_those_of_one_process(ranks):
    """Catches a stray factor W in either backward, gradients gathered from own rows only, rows out of rank order."""
    weight = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_()
    rows = _inputs().flatten(0, 1) @ weight.view(2, 2)
    mean = rows.sigmoid().view(WORLD, 5, 2).mean((0, 1))
    loss = torch.stack([_loss(own, rows, mean) for own in rows.split(5)]).mean()
    (expected,) = torch.autograd.grad(loss, weight)
    averaged = torch.stack([rank["gradient"] for rank in ranks]).mean(0)  # what DDP does
    assert (averaged - expected).abs().max() < 1e-14
    assert expected.abs().min() > 1e-3


def _gradient():
    weight = torch.linspace(-1, 1, 4, dtype=torch.float64).requires_grad_()
    own = _inputs()[dist.rank()] @ weight.view(2, 2)
    loss = _loss(own, dist.gather_rows(own), dist.mean_over_ranks(own.sigmoid().mean(0)))
    return torch.autograd.grad(loss, weight)[0]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_rows_together_are_those_apart(ranks, dtype):
    """Catches columns of one tensor in another, a gradient for what asks for none, and one that is not rounded."""
    for rank in ranks:
        got, apart = rank["together"][dtype]
        assert [tuple(t.shape) for t in got] == [(15, 2), (15, 1), (5, 2)]
        for value, expected in zip(got, apart, strict=True):
            assert value.dtype == torch.float64
            torch.testing.assert_close(value, expected, rtol=2**-6 if dtype else 0, atol=0)
            assert torch.equal(value, value.to(torch.bfloat16).double()) == (dtype is not None)


def _together():
    """By dtype: rows of two tensors and the gradient of the first, gathered in one message; and in one each."""
    first, second = _inputs()[dist.rank()].exp(), _inputs()[dist.rank()][:, :1].exp()
    weight = torch.arange(30.0, dtype=torch.float64).add(1).sqrt().view(15, 2)
    leaf = first.clone().requires_grad_()
    (apart,) = torch.autograd.grad((dist.gather_rows(leaf) * weight).sum(), leaf)
    result = {}
    for dtype in (None, torch.bfloat16):
        leaf = first.clone().requires_grad_()
        one, two = dist.gather_rows_together(leaf, second, dtype=dtype)
        assert one.requires_grad and not two.requires_grad
        (gradient,) = torch.autograd.grad((one * weight).sum(), leaf)
        result[dtype] = (one.detach(), two, gradient), (dist.gather_rows(first), dist.gather_rows(second), apart)
    return result


def _inputs():
    return torch.randn(WORLD, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _loss(own, rows, mean):
    position = torch.arange(len(rows), dtype=torch.float64).add(1)  # tells the order of rows
    return ((own @ rows.T) * position).tanh().mean() + (mean * mean.log()).sum()


def test_values(ranks):
    """Catches rank order, rows lost or padding kept where shards differ in length, a vote of one rank ignored."""
    for number, rank in enumerate(ranks):
        assert rank["gathered"].flatten().tolist() == [0, 0, 1, 1, 2, 2]
        assert rank["mean"].item() == 1.0
        for n, gathered in zip((7, 2, 0), rank["ragged"], strict=True):
            assert torch.equal(gathered, _ROWS[:n])
        assert rank["ragged_int"].tolist() == [0, 1, 2, 3, 4]
        assert rank["votes"] == [True, False]
        assert rank["object"] == {"from": 1}
        assert rank["main"] == (number == 0, number, number, WORLD)
        assert rank["own_group"]


def test_barrier_waits_for_the_last(ranks):
    """Catches a barrier that lets a rank through: two of the three arrive 0.3 s before the last."""
    assert all(rank["barrier_s"] > 0.2 for rank in ranks[:2])


def _barrier_wait_s():
    dist.barrier()
    if dist.rank() == WORLD - 1:
        time.sleep(0.3)
    start_s = time.perf_counter()
    dist.barrier()
    return time.perf_counter() - start_s


def test_alone_everything_is_the_identity():
    x = torch.randn(3, 2, requires_grad=True)
    assert dist.gather_rows(x) is x
    assert dist.gather_rows_together(x, x) == (x, x)
    assert dist.mean_over_ranks(x) is x
    assert torch.equal(dist.gather_ragged(x), x) and not dist.gather_ragged(x).requires_grad
    assert dist.all_true(True) and not dist.all_true(False)
    assert dist.broadcast_object("x") == "x"
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    dist.barrier()
    dist.shutdown()
    with pytest.raises(RuntimeError, match=r"fastssl\.dist\.init"):
        dist.statistics_group()


def test_alone_rows_are_rounded_as_among_many():
    """Catches one process that trains on other numbers than many ranks: value and gradient are those of bfloat16."""
    x, y = torch.tensor([[1.0, 1 + 2**-9]], requires_grad=True), torch.tensor([[3 - 2**-9]])
    rounded_x, rounded_y = dist.gather_rows_together(x, y, dtype=torch.bfloat16)
    assert rounded_x.tolist() == [[1, 1]] and rounded_y.tolist() == [[3]]
    (gradient,) = torch.autograd.grad((rounded_x * (1 + 2**-9)).sum(), x)
    assert gradient.tolist() == [[1, 1]] and gradient.dtype == torch.float32


def test_init_names_what_the_environment_lacks(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(RuntimeError, match="RANK, WORLD_SIZE not set"):
        dist.init("gloo")


def test_the_pool_shows_each_failure():
    """Catches a pool that hides a rank's traceback, or waits for ranks that cannot finish."""
    with pytest.raises(RanksFailed, match=r"rank 1 of 2:\n(.|\n)*ZeroDivisionError"):
        run_ranks(2, _fail_on_the_second)
    with pytest.raises(RanksFailed, match="rank 0 of 1:\nnot finished after 0 s"):
        run_ranks(1, time.sleep, 60, timeout_s=0.2)


def _fail_on_the_second():
    return 1 / (1 - dist.rank())
