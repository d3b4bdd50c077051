"""Queues of labelled embeddings against plain lists."""

import numpy as np
import pytest
import torch

from fastssl.losses.keyed_draws import random_bits
from fastssl.losses.queues import LabelledQueues
from fastssl.methods.base import Facts
from fastssl.recipes.resolve import resolve
from loaders.errors import PlanError
from loaders.plan.plan import StreamFacts
from tests.support.no_waiting import NoWaiting

CLASSES = 3


def filled(labels, capacity=None):
    """Two queues of width 1 that hold numbers 0, 1, ... and 100, 101, ... with these labels."""
    queues = LabelledQueues(2, capacity or len(labels), 1, CLASSES)
    number = torch.arange(float(len(labels)))
    queues.put(torch.stack([number, number + 100], dim=1)[:, :, None], torch.tensor(labels))
    return queues


def test_rings_equal_lists_that_forget():
    """Twelve steps of up to five images, some labelled, into seven slots. Catches unlabelled rows that take a slot, a
    pointer that moves by the batch, rows lost where the ring closes, queues that go apart, a wrong slot returned."""
    generator = torch.Generator().manual_seed(0)
    queues, listed = LabelledQueues(2, 7, 4, CLASSES), []
    for _ in range(12):
        z_NLD = torch.randn(5, 2, 4, generator=generator)
        label_N = torch.randint(-2, CLASSES, (5,), generator=generator).clamp_min(-1)
        slots = queues.put(z_NLD, label_N)
        listed = (listed + [(z, y) for z, y in zip(z_NLD, label_N.tolist(), strict=True) if y >= 0])[-7:]
        for z, y, slot in zip(z_NLD, label_N.tolist(), slots.tolist(), strict=True):
            assert (slot == -1) if y < 0 else torch.equal(queues.z_LCD[:, slot], z) and queues.label_C[slot] == y
        held = {tuple(z.flatten().tolist()) + (y,) for z, y in listed}
        used = queues.used_C.nonzero()[:, 0].tolist()
        assert {tuple(queues.z_LCD[:, c].flatten().tolist()) + (int(queues.label_C[c]),) for c in used} == held
        oldest_first = [(int(queues.next) + c) % 7 for c in range(7)]
        assert [int(queues.label_C[c]) for c in oldest_first if c in used] == [y for _, y in listed]
    assert len(listed) == 7


def test_draws_are_of_the_class_and_uniform():
    """Class 1 has slots 1, 3 and 4: each is drawn a third of 3,000 times (five standard deviations are 129). A class
    without entries and a missing label find nothing; so does every label of empty queues."""
    queues = filled([0, 1, 0, 1, 1, 0])
    bits = random_bits(torch.arange(1000), 1, 3)
    slots, found = queues.draw(torch.full((1000,), 1), bits)
    assert found.all()
    counts = torch.bincount(slots.flatten(), minlength=6)
    assert counts[[0, 2, 5]].sum() == 0 and (counts[[1, 3, 4]] - 1000).abs().max() < 129
    assert queues.draw(torch.tensor([0, 2, -1]), bits[:3])[1].tolist() == [True, False, False]
    slots, found = LabelledQueues(2, 4, 1, CLASSES).draw(torch.tensor([0, -1]), bits[:2])
    assert not found.any() and slots.max() < 4


def test_ones_own_entry_can_be_left_out():
    """Rows that own slots 1, 3 and 4 never draw these, and both others equally often; a row without a slot draws all;
    the only one of its class finds nothing."""
    queues = filled([0, 1, 2, 1, 1, 0])
    own = torch.tensor([1, 3, 4, -1]).repeat(500)
    slots, found = queues.draw(torch.ones_like(own), random_bits(torch.arange(2000), 1, 4), own)
    assert found.all()
    for row, others in enumerate(([3, 4], [1, 4], [1, 3], [1, 3, 4])):
        counts = torch.bincount(slots[row::4].flatten(), minlength=6)
        share = 2000 / len(others)
        assert counts[others].sum() == 2000 and (counts[others] - share).abs().max() < 5 * share**0.5
    alone = queues.draw(torch.tensor([2]), random_bits(torch.arange(1), 1, 2), torch.tensor([2]))
    assert alone[1].tolist() == [False]


def test_a_random_start_is_full_of_unit_vectors():
    torch.manual_seed(0)
    queues = LabelledQueues(2, 3000, 8, CLASSES, random_start=True)
    assert queues.used_C.all()
    torch.testing.assert_close(queues.z_LCD.norm(dim=2), torch.ones(2, 3000))
    assert queues.z_LCD.mean(dim=1).abs().max() < 0.05
    assert (torch.bincount(queues.label_C, minlength=CLASSES) - 1000).abs().max() < 130


def test_more_rows_than_slots_are_refused():
    with pytest.raises(AssertionError):
        filled([0, 1, 2], capacity=2)


def test_writes_and_draws_never_wait_for_the_device():
    """Catches a boolean index and a count that the host would ask for."""
    queues = filled([0, 1, -1, 1], capacity=9)
    with NoWaiting():
        own = queues.put(torch.ones(4, 2, 1), torch.tensor([2, -1, 0, 1]))
        queues.draw(torch.tensor([2, 1, 0, 1]), random_bits(torch.arange(4), 1, 3), own)


def test_a_class_without_a_label_is_refused_at_the_door():
    """Pseudo-labels could never name it, and nothing would say so."""
    (stage,) = resolve("semppl.rn50_300ep", ("labels=all", "masks=off"))
    plan = stage.config.build(Facts(3, 3, 0), {}).plan()
    sizes = np.full((5000, 2), 300, np.int32)
    labels = np.arange(5000) % 2
    with pytest.raises(PlanError, match="1 of 3 classes have no labelled image, first class 2"):
        plan.bind({"images": StreamFacts(None, labels, sizes, 3)})
    labels[7] = 2
    plan.bind({"images": StreamFacts(None, labels, sizes, 3)})
