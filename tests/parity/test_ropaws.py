"""RoPAWS's targets against loops in float64, in their limits, and on two ranks against one."""

import math

import pytest
import torch
from torch.nn import functional as F

from fastssl import dist
from fastssl.losses.ropaws import in_domain_targets
from fastssl.losses.similarity import DenseLabels, soft_nearest_neighbours, unit_rows
from tests.ranks.pool import run_ranks

IMAGES, SUPPORTS, CLASSES, WIDTH, WORLD = 6, 8, 4, 5, 2


def inputs(seed=0, images=IMAGES):
    """Projections of both views, view-major, unit supports and their smoothed labels, float64."""
    generator = torch.Generator().manual_seed(seed)
    h_GD = torch.randn(2 * images, WIDTH, generator=generator, dtype=torch.float64)
    support_SD = unit_rows(torch.randn(SUPPORTS, WIDTH, generator=generator, dtype=torch.float64))
    one_hot_SK = F.one_hot(torch.arange(SUPPORTS) % CLASSES, CLASSES).double()
    return h_GD, support_SD, 0.9 * one_hot_SK + 0.1 / CLASSES


def slow_view(h, supports, labels_SK, tau, prior_tau, label_ratio):
    """One view's P, by loops, and by walking: what reaches an image from supports in one step, two, three, ..."""

    def cosine(a, b):
        return sum(float(x) * float(y) for x, y in zip(a, b, strict=True)) / (float(a.norm()) * float(b.norm()))

    num, columns = len(h), labels_SK.shape[1]
    ratio = label_ratio * num / len(supports)
    direct, onward = [], []
    for i in range(num):
        to_supports = [cosine(h[i], s) for s in supports]
        w = math.exp((max(to_supports) - 1) / prior_tau)
        weights = [ratio * math.exp(c / tau) for c in to_supports]
        others = [0.0 if j == i else math.exp(cosine(h[i], h[j]) / tau) for j in range(num)]
        total = sum(weights) + sum(others)
        direct.append([w / total * sum(x * float(y[k]) for x, y in zip(weights, labels_SK, strict=True))
                       for k in range(columns)])  # fmt: skip
        onward.append([w * x / total for x in others])
    p = [list(row) for row in direct]
    for _ in range(400):
        p = [[direct[i][k] + sum(onward[i][j] * p[j][k] for j in range(num)) for k in range(columns)]
             for i in range(num)]  # fmt: skip
    return torch.tensor(p, dtype=torch.float64)


def spread(p_MK):
    return p_MK + (1 - p_MK.sum(dim=1, keepdim=True)) / p_MK.shape[1]


@pytest.mark.parametrize(("tau", "prior_tau", "label_ratio"), [(0.1, 3.0, 5.0), (0.5, 0.3, 0.2), (1.0, 10.0, 1.0)])
def test_it_equals_loops(tau, prior_tau, label_ratio):
    """Catches a prior, ratio or diagonal that is lost, and supports' and images' columns that are taken for another."""
    h_GD, support_SD, labels_SK = inputs()
    settings = {"tau": tau, "prior_tau": prior_tau, "label_ratio": label_ratio}
    p_GK, p_in_B = in_domain_targets(h_GD, support_SD, DenseLabels(labels_SK), **settings)
    slow = [slow_view(view, support_SD, labels_SK, **settings) for view in h_GD.chunk(2)]
    assert torch.allclose(p_GK, torch.cat([spread(p) for p in slow]), rtol=1e-12, atol=1e-14)
    assert torch.allclose(p_in_B, sum(p.sum(dim=1) for p in slow) / 2, rtol=1e-12)
    assert bool((p_in_B < 1).all()) and torch.allclose(p_GK.sum(dim=1), torch.ones(len(p_GK), dtype=torch.float64))


def test_where_every_image_is_of_a_class_and_supports_outweigh_images_it_is_paws():
    h_GD, support_SD, labels_SK = inputs()
    labels = DenseLabels(labels_SK)
    p_GK, p_in_B = in_domain_targets(h_GD, support_SD, labels, prior_tau=1e12, label_ratio=1e12)
    assert torch.allclose(p_GK, soft_nearest_neighbours(h_GD, support_SD, labels, 0.1), rtol=1e-9)
    assert torch.allclose(p_in_B, torch.ones_like(p_in_B), rtol=1e-9)


def test_a_lone_image_has_no_neighbours():
    h_GD, support_SD, labels_SK = inputs(images=1)
    labels = DenseLabels(labels_SK)
    p_GK, p_in_B = in_domain_targets(h_GD, support_SD, labels)
    w = ((unit_rows(h_GD) @ support_SD.T).amax(dim=1, keepdim=True) - 1).div(3).exp()
    assert torch.allclose(p_GK, spread(w * soft_nearest_neighbours(h_GD, support_SD, labels, 0.1)), rtol=1e-12)
    assert torch.allclose(p_in_B, w.mean().view(1), rtol=1e-12)


def test_strangers_are_told_apart():
    """An image at a support is of its class; those far from all supports, which have only each other, are of none."""
    supports_SD = torch.eye(8, dtype=torch.float64)[:4]
    strangers_BD = torch.eye(8, dtype=torch.float64)[4:6].repeat(2, 1)
    view_BD = torch.cat([supports_SD + 0.01, strangers_BD + 0.01])
    labels = DenseLabels(torch.eye(4, dtype=torch.float64))
    p_GK, p_in_B = in_domain_targets(torch.cat([view_BD, view_BD]), supports_SD, labels, prior_tau=0.5)
    assert p_in_B[:4].min() > 0.9 and p_in_B[4:].max() < 0.3
    assert p_GK[:4].argmax(dim=1).tolist() == [0, 1, 2, 3]


def test_chunks_change_nothing(monkeypatch):
    from fastssl.losses import similarity

    h_GD, support_SD, labels_SK = inputs()
    whole = in_domain_targets(h_GD, support_SD, DenseLabels(labels_SK))
    monkeypatch.setattr(similarity, "MAX_ELEMENTS", 2 * (IMAGES + SUPPORTS))
    pieces = in_domain_targets(h_GD, support_SD, DenseLabels(labels_SK))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(whole, pieces, strict=True))


def own_share():
    h_GD, support_SD, labels_SK = inputs()
    own = [view.chunk(WORLD)[dist.rank()] for view in h_GD.chunk(2)]
    return in_domain_targets(torch.cat(own), support_SD, DenseLabels(labels_SK))


def test_two_ranks_equal_one():
    """Catches neighbours of other ranks that are not seen, and a rank that takes another's rows."""
    h_GD, support_SD, labels_SK = inputs()
    p_GK, p_in_B = in_domain_targets(h_GD, support_SD, DenseLabels(labels_SK))
    ranks = run_ranks(WORLD, own_share)
    together = torch.cat([torch.cat([p.chunk(2)[view] for p, _ in ranks]) for view in range(2)])
    assert torch.allclose(together, p_GK, rtol=1e-9)
    assert torch.allclose(torch.cat([p_in for _, p_in in ranks]), p_in_B, rtol=1e-9)
