"""SemPPL on two ranks: one process's numbers, one process's queues, two messages of known size."""

from dataclasses import replace

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from fastssl import dist
from fastssl.losses.semppl import SimClr
from fastssl.methods.base import Horizon
from loaders.batch import Batch
from tests.parity.test_semppl import BATCH, LABELS, batches, double, method
from tests.ranks.pool import run_ranks
from tests.ranks.test_paws_loss_ranks import Messages

WORLD = 2
# In the second batch all labelled images are on one rank.
SETTINGS = {
    "SemPPL": {"own_entry": False},
    "on SimCLR": {"base": SimClr(), "same_view_pairs": False, "small_odd_view": None},
}


def share(batch):
    """This rank's rows of a batch."""
    part, world = batch.parts["images"], dist.world_size()
    own = slice(BATCH * dist.rank() // world, BATCH * (dist.rank() + 1) // world)
    tensors = {name: getattr(part, name)[own] for name in ("ids", "labels", "keys", "positions")}
    return Batch({"images": replace(part, x={name: x[own] for name, x in part.x.items()}, **tensors)}, batch.step)


def three_steps(settings):
    """Losses, gradients, votes, metrics and queues; the ring of nine slots closes."""
    semppl_ = method(**settings)
    nets = double(semppl_.nets())
    trained = nets
    if dist.world_size() > 1:
        trained = replace(nets, online=DistributedDataParallel(nets.online, broadcast_buffers=False))
    optimizer, found = semppl_.optimizer(nets), []
    for step, batch in enumerate(map(share, batches())):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.3
        optimizer.zero_grad()
        parts = semppl_.loss(trained, batch)
        parts["total"].backward()
        truth = {"images": batch.parts["images"].ids % 3}
        found.append({
            "parts": torch.stack(list(parts.values())).detach(),
            "gradient": torch.cat([p.grad.flatten() for p in nets.online.parameters()]),
            "votes": semppl_._seen[3].label_N,
            "metrics": {n: float(v) for n, v in semppl_.metrics(nets, batch, truth).items() if n.startswith("pseudo")},
            "queue": [t.clone() for t in nets.state.buffers()],
        })  # fmt: skip
        optimizer.step()
        semppl_.after_step(nets, step, Horizon(3, 3))
    return found, [p.detach() for p in (nets.target or nets.online).parameters()]


def messages(precision):
    """What the loss sends outside batch norm, and backward for SimCLR."""
    semppl_ = method(precision=precision)
    nets = semppl_.nets()
    with Messages() as mode:
        semppl_.loss(nets, share(next(batches(dtype=torch.float32))))["total"].backward()
    return [m for m in mode.sent if m[0] != "all_reduce"]  # batch norm's


def on_a_rank():
    return {name: three_steps(s) for name, s in SETTINGS.items()}, messages("fp32"), messages("bf16")


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(WORLD, on_a_rank)


@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks_equal_one_process(name, ranks):
    """Losses, gradients, pseudo-labels and what is said of them, queues and averages, over three steps. Catches
    negatives or positives that depend on the rank, queues filled in another order, and precision averaged over ranks
    in place of images."""
    alone, weights = three_steps(SETTINGS[name])
    of_ranks = [found[name][0] for found, *_ in ranks]
    for step, expected in enumerate(alone):
        together = [steps[step] for steps in of_ranks]
        for what in ("parts", "gradient"):
            mean = sum(rank[what] for rank in together) / WORLD
            assert ((mean - expected[what]).norm() / expected[what].norm()).item() < 1e-8, (step, what)
        assert torch.equal(torch.cat([rank["votes"] for rank in together]), expected["votes"])
        for rank in together:
            assert rank["metrics"] == pytest.approx(expected["metrics"])
            for own, buffer in zip(rank["queue"], expected["queue"], strict=True):
                torch.testing.assert_close(own, buffer, rtol=1e-8, atol=1e-10)
    for found, *_ in ranks:
        for own, w in zip(found[name][1], weights, strict=True):
            torch.testing.assert_close(own, w, rtol=1e-7, atol=1e-9)
    assert sum(y >= 0 for y in sum(LABELS, [])) > 9  # the ring did close


@pytest.mark.parametrize("which, bytes_each", [(1, 4), (2, 2)], ids=["float32", "bfloat16"])
def test_two_messages_of_known_size(which, bytes_each, ranks):
    """Target embeddings of all large views, once, for negatives and queues both; and the labels. For the ImageNet job
    on 64 ranks, 4,096 x 4 x 256 numbers: 8.4 MB received by each, in bfloat16."""
    rows, views, width = BATCH // WORLD, 2, 6
    for sent in (rank[which] for rank in ranks):
        assert sent == [
            ("all_gather_into_tensor", rows * views * width, rows * views * width * bytes_each),
            ("all_gather_into_tensor", rows, rows * 8),
        ]
