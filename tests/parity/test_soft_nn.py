"""Soft nearest neighbours against PAWS's formula written as loops in Python floats."""

import math

import pytest
import torch

from fastssl.evaluation import cosine
from fastssl.evaluation.soft_nn import soft_nn


def soft_nn_by_loops(queries, support, labels, num_classes, tau):
    """p_k = sum over supports of class k of exp(cos / tau), over the sum of all (methods paper, equation 1)."""

    def unit(row):
        norm = max(math.sqrt(sum(v * v for v in row)), 1e-12)
        return [v / norm for v in row]

    predictions = []
    for q in map(unit, queries):
        weights = [math.exp(sum(a * b for a, b in zip(q, s, strict=True)) / tau) for s in map(unit, support)]
        mass = [0.0] * num_classes
        for weight, label in zip(weights, labels, strict=True):
            mass[label] += weight
        predictions.append([m / sum(weights) for m in mass])
    return predictions


@pytest.fixture
def problem():
    torch.manual_seed(0)
    queries, support = torch.randn(7, 5, dtype=torch.float64) * 3, torch.randn(23, 5, dtype=torch.float64) + 0.5
    return queries, support, torch.randint(0, 4, (23,))


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_matches_the_loops_in_float64(problem, tau):
    """Would catch a missing normalisation, a temperature on the wrong side, labels summed into wrong columns."""
    queries, support, labels = problem
    expected = soft_nn_by_loops(queries.tolist(), support.tolist(), labels.tolist(), 4, tau)
    got = soft_nn(queries, support, labels, 4, tau=tau)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_blocks_do_not_change_the_answer(problem, monkeypatch):
    """Would catch rows lost or counted twice at the border of two blocks (23 supports, 3 at a time)."""
    queries, support, labels = problem
    whole = soft_nn(queries, support, labels, 4)
    monkeypatch.setattr(cosine, "MAX_ELEMENTS", 3 * len(queries))
    torch.testing.assert_close(soft_nn(queries, support, labels, 4), whole, rtol=1e-12, atol=1e-15)


def test_opposite_embeddings_in_fp32_give_finite_probabilities():
    """Would catch underflow to 0 / 0 where every support is as far as can be: exp(-2 / 0.1) is 2e-9."""
    queries, support = torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0], [-2.0, 0.0], [-1.0, 0.0]])
    p = soft_nn(queries, support, torch.tensor([0, 1, 1]), 2)
    torch.testing.assert_close(p, torch.tensor([[1 / 3, 2 / 3]]))


def test_lengths_do_not_matter_and_a_zero_row_is_no_nan(problem):
    """Would catch a dot product in place of the cosine, and a division by a zero norm."""
    queries, support, labels = problem
    scaled = support * torch.linspace(0.1, 9, 23, dtype=torch.float64)[:, None]
    torch.testing.assert_close(soft_nn(queries, scaled, labels, 4), soft_nn(queries, support, labels, 4))
    shares = torch.bincount(labels, minlength=4) / 23
    torch.testing.assert_close(soft_nn(queries[:1] * 0, support, labels, 4)[0], shares.double())
