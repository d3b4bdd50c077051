"""How uniform draws become a copy's sub-policy, its two operations and their signs."""

import numpy as np
import pytest

from loaders.plan.autoaugment import SUB_POLICIES, AutoAugment
from loaders.plan.draws import mix, uniforms

M = 250_000


@pytest.fixture(scope="module")
def chosen():
    return AutoAugment().chosen(uniforms(mix(7, np.arange(M)), AutoAugment.NUM_DRAWS))


def within_4_sigma(count, num, p):
    return abs(count - num * p) <= 4 * np.sqrt(num * p * (1 - p))


def test_every_sub_policy_comes_one_time_in_25(chosen):
    """Catches one that never comes, and a draw that rounds."""
    counts = np.bincount(chosen[:, 0], minlength=25)
    assert len(SUB_POLICIES) == len(counts) == 25
    assert all(within_4_sigma(count, M, 1 / 25) for count in counts), counts


@pytest.mark.parametrize("number", range(25))
def test_its_operations_come_with_their_probabilities_and_even_signs(chosen, number):
    """Catches one coin for both operations, 1 - p, the other operation's p, and a sign that hangs on the coin."""
    of = chosen[chosen[:, 0] == number, 1:]
    assert set(np.unique(of)) <= {-1, 0, 1}
    (_, p, _), (_, q, _) = SUB_POLICIES[number]
    applied = of != 0
    for k, probability in ((0, p), (1, q)):
        assert within_4_sigma(applied[:, k].sum(), len(of), probability)
        assert within_4_sigma((of[:, k] > 0).sum(), applied[:, k].sum(), 0.5)
    both = applied.all(axis=1)
    assert within_4_sigma(both.sum(), len(of), p * q)
    assert within_4_sigma((of[both, 0] == of[both, 1]).sum(), both.sum(), 0.5)


def test_the_edges_of_the_draws():
    """A draw next to 1 is the last sub-policy, an operation of probability 1 always comes and one of 0 never."""
    almost = np.nextafter(1, 0)
    numbers = {steps: k for k, steps in enumerate(SUB_POLICIES)}
    (never,) = [k for steps, k in numbers.items() if steps[0][1] == 0]
    always = next(k for steps, k in numbers.items() if steps[1][1] == 1)
    u = np.array([[almost] * 5, [(never + 0.5) / 25, 0, 0, 0, 0], [(always + 0.5) / 25, almost, almost, 0, almost]])
    assert AutoAugment().chosen(u).tolist() == [[24, 0, 0], [never, 0, -1], [always, 0, 1]]
