"""Neighbours and votes against plain loops, and what they need at a 64th of the ImageNet job."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastssl.losses import nearest as module
from fastssl.losses.nearest import majority, nearest
from fastssl.losses.queues import LabelledQueues
from fastssl.methods.semppl import vote
from tests.support.no_waiting import NoWaiting


@pytest.mark.parametrize("elements", [1, 90, 2**23], ids=["k rows a tile", "uneven tiles", "one tile"])
@pytest.mark.parametrize("k", [1, 3])
def test_tiles_equal_the_whole_matrix(k, elements, monkeypatch):
    """Catches a tile's rows numbered from its start, a best one forgotten at the next tile, and unusable rows found."""
    monkeypatch.setattr(module, "MAX_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(0)
    query, bank = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (7, 41))
    usable = torch.rand(41, generator=generator) < 0.6
    similarity, row = nearest(query, bank, usable, k)
    expected = (query @ bank.T).masked_fill(~usable, -torch.inf).topk(k, dim=1)
    assert torch.equal(row, expected.indices)
    torch.testing.assert_close(similarity, expected.values)


def test_fewer_usable_rows_than_neighbours():
    """What is missing has similarity -inf, and no vote."""
    usable = torch.tensor([False, True, False, True])
    similarity, row = nearest(torch.ones(1, 2), torch.eye(4, 2), usable, k=3)
    assert (similarity > -torch.inf).tolist() == [[True, True, False]] and sorted(row[0, :2].tolist()) == [1, 3]
    assert majority(torch.tensor([[5, 5, 2]]), similarity).votes_N.tolist() == [2]
    nobody = majority(torch.tensor([[4, 4]]), torch.full((1, 2), -torch.inf))
    assert (nobody.label_N.item(), nobody.votes_N.item(), nobody.similarity_N.item()) == (-1, 0, -torch.inf)


@pytest.mark.parametrize("ties", ["similarity", "lowest"])
def test_majorities_equal_counting(ties):
    """2,000 ballots of six votes for four labels, every third one without some votes; similarities are eighths, so that
    sums tie exactly. Catches a tie that goes by the best single vote, or by place, and votes counted that are none."""
    rng = random.Random(0)
    labels = [[rng.randrange(4) for _ in range(6)] for _ in range(2000)]
    similar = [[rng.randrange(-8, 9) / 8 for _ in range(6)] for _ in range(2000)]
    for row in similar[::3]:
        row[rng.randrange(6)] = row[rng.randrange(6)] = float("-inf")
    got = majority(torch.tensor(labels), torch.tensor(similar), ties)
    num_ties = 0
    for ballot, weights, label, votes, total in zip(labels, similar, *(x.tolist() for x in got), strict=True):
        cast = [(y, s) for y, s in zip(ballot, weights, strict=True) if s > float("-inf")]
        counts, sums = Counter(y for y, _ in cast), Counter()
        for y, s in cast:
            sums[y] += s
        leaders = [y for y in counts if counts[y] == max(counts.values())]
        expected = min(leaders, key=lambda y: (-sums[y], y)) if ties == "similarity" else min(leaders)
        num_ties += len(leaders) > 1
        assert (label, votes, total) == (expected, counts[expected], sums[expected])
    assert num_ties > 500


def slow_vote(z_LBD, queues, neighbours, voting):
    """Of each image, the labels that its views get from the queues, one at a time."""
    used = [c for c in range(len(queues.label_C)) if queues.label_C[c] >= 0]
    asked = len(z_LBD) if voting else 1
    found = []
    for m in range(z_LBD.shape[1]):
        ballot = []
        for i in range(asked):
            for j in range(asked):
                by_cosine = sorted(used, key=lambda c: -float(z_LBD[i, m] @ queues.z_LCD[j, c]))[:neighbours]
                ballot.append(_winner([(int(queues.label_C[c]), float(z_LBD[i, m] @ queues.z_LCD[j, c]))
                                       for c in by_cosine]))  # fmt: skip
        found.append(_winner(ballot))
    return found


def _winner(ballot):
    counts, sums = Counter(y for y, _ in ballot), Counter()
    for y, s in ballot:
        sums[y] += s
    label = min(counts, key=lambda y: (-counts[y], -sums[y], y))
    return label, sums[label]


@pytest.mark.parametrize("neighbours, voting", [(1, True), (3, True), (1, False)])
def test_votes_equal_asking_one_by_one(neighbours, voting):
    """Three views and queues. Catches a view that asks its own queue only, views mistaken for images, neighbours that
    vote one by one instead of as a set, and empty slots that vote."""
    generator = torch.Generator().manual_seed(1)
    queues = LabelledQueues(3, 20, 4, 4).double()
    z_NLD = torch.randn(16, 3, 4, generator=generator, dtype=torch.float64)
    queues.put(torch.nn.functional.normalize(z_NLD, dim=2), torch.randint(-1, 4, (16,), generator=generator))
    z_LBD = torch.nn.functional.normalize(torch.randn(3, 9, 4, generator=generator, dtype=torch.float64), dim=2)
    got = vote(z_LBD, queues, neighbours=neighbours, voting=voting)
    expected = slow_vote(z_LBD, queues, neighbours, voting)
    assert got.label_N.tolist() == [label for label, _ in expected]
    assert got.similarity_N.tolist() == pytest.approx([total for _, total in expected], rel=1e-9)


def test_empty_queues_elect_nobody():
    got = vote(torch.ones(2, 3, 4), LabelledQueues(2, 5, 4, 4))
    assert got.label_N.tolist() == [-1] * 3 and got.votes_N.tolist() == [0] * 3


def test_a_64th_of_the_job_needs_little_memory_and_never_waits():
    """64 images x 4 views against 4 x 81,920 x 256: allocator events, beyond the queues. Catches the matrix of
    similarities (335 MB of it), a copy of a queue (84 MB each), and a wait for the device."""
    queues = LabelledQueues(4, 81_920, 256, 1000)
    queues.label_C.copy_(torch.arange(81_920) % 1000)
    z_LBD = torch.nn.functional.normalize(torch.randn(4, 64, 256), dim=2)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled, NoWaiting():
        vote(z_LBD, queues)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert 1e6 < max(np.cumsum(changes)) < 150e6
