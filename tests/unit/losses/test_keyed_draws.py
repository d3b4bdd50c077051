"""Draws on the device: the loaders' hash, numbers without bias, the same on any number of ranks."""

import itertools

import numpy as np
import pytest
import torch

from fastssl.losses.keyed_draws import below, distinct, random_bits
from loaders.plan.draws import mix, tag, uniforms

KEYS = mix(7, np.arange(40_000))


def keys(first=0, last=None):
    return torch.from_numpy(KEYS[first:last].view(np.int64))


def chi_square(counts):
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("purpose", [tag("negatives"), 2**63 + 5])
def test_it_is_the_hash_of_the_loaders(purpose):
    """The upper 31 bits of the same SplitMix64: catches a shift that repeats the sign, a wrong constant, and purposes
    that share their draws."""
    expected = np.floor(uniforms(mix(KEYS[:500], purpose), 6) * 2**31).astype(np.int64)
    assert np.array_equal(random_bits(keys(0, 500), purpose, 6).numpy(), expected)


def test_any_share_of_the_keys_gives_its_rows():
    """Catches a draw that depends on the row instead of the key: ranks would draw anew."""
    whole = distinct(random_bits(keys(0, 64), 1, 5), 63)
    halves = [distinct(random_bits(keys(*half), 1, 5), 63) for half in ((0, 32), (32, 64))]
    assert torch.equal(torch.cat(halves), whole)


def test_below_is_uniform_and_stays_below():
    """Chi-square of 400,000 draws in 7 cells: 99.9 % of uniform draws stay below 22.5. Also sizes that differ by row,
    and none at all."""
    drawn = below(random_bits(keys(), 2, 10), 7)
    assert chi_square(torch.bincount(drawn.flatten(), minlength=7).double()) < 22.5 and drawn.max() == 6
    sizes = torch.tensor([0, 1, 2, 2**31 - 1]).repeat(10_000)
    drawn = below(random_bits(keys(), 2, 3), sizes[:, None])
    assert (drawn[::4] == 0).all() and (drawn[1::4] == 0).all()
    assert drawn[2::4].unique().tolist() == [0, 1] and (drawn[3::4] < 2**31 - 1).all()


def test_distinct_draws_are_distinct_and_every_set_is_as_likely():
    """All 20 sets of three out of six, 2,000 times each but for chance (99.9 % below 43.8). Catches a repeated number
    and Floyd's algorithm with a bound that is off by one, which makes some sets rarer."""
    drawn = distinct(random_bits(keys(), 3, 3), 6).sort(dim=1).values
    sets, counts = drawn.unique(dim=0, return_counts=True)
    assert sets.tolist() == [list(s) for s in itertools.combinations(range(6), 3)]
    assert chi_square(counts.double()) < 43.8
    assert distinct(random_bits(keys(0, 5), 3, 4), 4).sort(dim=1).values.tolist() == [[0, 1, 2, 3]] * 5
