"""The keyed order: permutations that are permutations, cheap at any size, and class-balanced batches."""

import time

import numpy as np
import pytest

from loaders.plan.draws import mix, uniforms
from loaders.plan.order import ClassIndex, balanced, balanced_classes, permute, shuffled


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 31, 100, 1000, 4097])
def test_permute_is_a_permutation(size):
    assert sorted(permute(np.arange(size), size, mix(7, size))) == list(range(size))


@pytest.mark.parametrize("size", [3, 5, 7, 10, 13, 33])
def test_pairs_of_values_are_uniform(size):
    """A Feistel network that is too narrow favours some pairs: chi-square of the first two values over many keys."""
    keys = mix(np.arange(40_000))
    first, second = permute(0, size, keys), permute(1, size, keys)
    counts = np.bincount(first * size + second, minlength=size * size).reshape(size, size)
    assert (counts.diagonal() == 0).all()
    expected = len(keys) / (size * (size - 1))
    off_diagonal = counts[~np.eye(size, dtype=bool)]
    chi_square, freedom = ((off_diagonal - expected) ** 2 / expected).sum(), size * (size - 1) - 1
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_planning_costs_the_same_for_a_billion_images():
    def seconds(size: int) -> float:
        start = time.perf_counter()
        for step in range(10):
            shuffled(np.arange(4096) + step * 4096, size, 4096, mix(1))
        return time.perf_counter() - start

    small, large = (min(seconds(size) for _ in range(5)) for size in (10_000, 10**9))
    assert large < 3 * small  # equal up to how often cycle-walking repeats


def test_epochs_visit_every_image_once_and_differ():
    """ImageNet at 4,096: 312 steps, 3,215 ids left out, other ones each epoch."""
    num_images, batch = 1_281_167, 4096
    steps = num_images // batch
    left_out = []
    for epoch in range(2):
        positions = epoch * steps * batch + np.arange(steps * batch)
        ids = shuffled(positions, num_images, batch, mix(3))
        assert len(np.unique(ids)) == steps * batch
        left_out.append(set(range(num_images)) - set(ids.tolist()))
    assert steps == 312 and [len(ids) for ids in left_out] == [3215, 3215]
    assert len(left_out[0] & left_out[1]) < 50


def test_uniforms_are_uniform_and_independent_of_where_they_start():
    u = uniforms(mix(np.arange(20_000)), 4)
    assert np.abs(u.mean(axis=0) - 0.5).max() < 0.01
    assert np.abs(np.corrcoef(u.T) - np.eye(4)).max() < 0.03
    np.testing.assert_array_equal(u[:, 2:], uniforms(mix(np.arange(20_000)), 2, first=2))


def test_mix_separates_the_order_of_its_parts():
    assert mix(1, 2) != mix(2, 1) and mix(0) != mix(0, 0)
    np.testing.assert_array_equal(mix(5, np.arange(3)), [mix(5, i) for i in range(3)])


@pytest.fixture
def index():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(12), rng.integers(5, 40, 12))
    rng.shuffle(labels)
    return ClassIndex.of(np.arange(len(labels)), labels, 12), labels


def test_balanced_batches_hold_each_class_equally_often_without_repeats(index):
    class_index, labels = index
    for step in range(50):
        ids, columns = balanced(np.arange(5 * 4), step, class_index, classes_global=5, per_class=4, key=mix(1))
        assert len(set(ids.tolist())) == 20
        np.testing.assert_array_equal(columns, np.repeat(np.arange(5), 4))
        classes = balanced_classes(step, 12, 5, mix(1))[1]
        np.testing.assert_array_equal(labels[ids], classes[columns])


def test_classes_are_passed_over_before_one_comes_again():
    """12 classes in blocks of 5: two steps a pass share no class, and the two left over change with the pass."""
    left = set()
    for pass_ in range(40):
        both = np.concatenate([balanced_classes(2 * pass_ + i, 12, 5, mix(1))[1] for i in range(2)])
        assert len(set(both.tolist())) == 10
        left |= set(range(12)) - set(both.tolist())
    assert left == set(range(12))


def test_every_image_of_a_class_is_drawn_about_equally_often(index):
    class_index, labels = index
    drawn = np.concatenate([balanced(np.arange(60), s, class_index, 12, 5, mix(4))[0] for s in range(4000)])
    of_class = np.bincount(drawn, minlength=len(labels))[labels == 3]
    expected = 4000 * 5 / len(of_class)
    # Draws within a step are without replacement, so the spread is below a binomial's.
    assert np.abs(of_class - expected).max() < 5 * np.sqrt(expected)
