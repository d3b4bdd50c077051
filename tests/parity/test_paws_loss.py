"""PAWS's loss against a loop-by-loop float64 transcription of its source, value and gradient."""

import math

import pytest
import torch

from fastssl.methods.paws import diagnostics, label_matrix, paws_loss

IMAGES, SUPPORTS, CLASSES, WIDTH = 3, 8, 4, 5


def inputs(num_crops, seed=0, labels_SK=None):
    """Anchors, supports, labels and projections of one rank, float64; z and z_support ask for gradients."""
    generator = torch.Generator().manual_seed(seed)
    if labels_SK is None:
        labels_SK = label_matrix(torch.arange(SUPPORTS) % CLASSES, CLASSES, smoothing=0.1).double()
    z_ND, z_support_SD, h_GD, h_support_SD = (
        torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
        for rows in ((2 + num_crops) * IMAGES, len(labels_SK), 2 * IMAGES, len(labels_SK))
    )
    return z_ND.requires_grad_(), z_support_SD.requires_grad_(), labels_SK, h_GD, h_support_SD


def slow_soft_nn(query, supports, labels_SK, tau):
    """One query's class probabilities, as a list of 0-dim tensors."""

    def cosine(a, b):
        dot = sum(a[d] * b[d] for d in range(len(a)))
        lengths = [torch.sqrt(sum(v[d] * v[d] for d in range(len(v)))) for v in (a, b)]
        return dot / (lengths[0] * lengths[1])

    weights = [torch.exp(cosine(query, supports[s]) / tau) for s in range(len(supports))]
    total = sum(weights)
    return [sum(weights[s] / total * labels_SK[s, k] for s in range(len(supports))) for k in range(labels_SK.shape[1])]


def slow_sharpen(p, temperature):
    powers = [q ** (1 / temperature) for q in p]
    return [q / sum(powers) for q in powers]


def slow_paws_loss(z_ND, z_support_SD, labels_SK, h_GD, h_support_SD, tau=0.1, sharpen_T=0.25):
    """Steps 3 to 8 of the method's description, a row and a column at a time."""
    images = len(h_GD) // 2
    num_views, num_columns = len(z_ND) // images, labels_SK.shape[1]
    h_GD, h_support_SD = h_GD.detach(), h_support_SD.detach()
    predictions, cross_entropy = [], 0.0
    for view in range(num_views):
        for image in range(images):
            p = slow_soft_nn(z_ND[view * images + image], z_support_SD, labels_SK, tau)
            predictions.append(slow_sharpen(p, sharpen_T))
            first, second = (
                slow_sharpen(slow_soft_nn(h_GD[g * images + image], h_support_SD, labels_SK, tau), sharpen_T)
                for g in (0, 1)
            )
            both = [(first[k] + second[k]) / 2 for k in range(num_columns)]
            target = [second, first][view] if view < 2 else both
            for k in range(num_columns):
                if target[k] >= 1e-4:
                    cross_entropy = cross_entropy - target[k] * torch.log(p[k]) / len(z_ND)
    me_max = 0.0
    for k in range(num_columns):
        mean = sum(p[k] for p in predictions) / len(predictions)
        if mean > 0:
            me_max = me_max + mean * torch.log(mean)
    return cross_entropy, me_max


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("num_crops", [0, 6])
def test_equals_the_transcription_in_value_and_gradient(num_crops):
    """Catches unswapped targets, targets from z, clipped targets renormalised, crops left out of me-max or given one
    view's target, sharpening after the crops' average, and a gradient that misses the supports."""
    arguments = inputs(num_crops)
    z_ND, z_support_SD = arguments[:2]
    for part, slow_part in zip(paws_loss(*arguments), slow_paws_loss(*arguments), strict=True):
        assert abs(part.item() / slow_part.item() - 1) < 1e-12
        got = torch.autograd.grad(part, [z_ND, z_support_SD], retain_graph=True)
        expected = torch.autograd.grad(slow_part, [z_ND, z_support_SD], retain_graph=True)
        assert max(map(relative_error, got, expected)) < 1e-9


def test_temperatures_are_used():
    arguments = inputs(2)
    other = {"tau": 0.3, "sharpen_T": 0.5}
    for part, slow_part in zip(paws_loss(*arguments, **other), slow_paws_loss(*arguments, **other), strict=True):
        assert abs(part.item() / slow_part.item() - 1) < 1e-12


def test_targets_are_detached():
    """No gradient reaches h, whichever way it asks for one."""
    z_ND, z_support_SD, labels_SK, h_GD, h_support_SD = inputs(2)
    sum(paws_loss(z_ND, z_support_SD, labels_SK, h_GD.requires_grad_(), h_support_SD.requires_grad_())).backward()
    assert h_GD.grad is None and h_support_SD.grad is None
    assert z_ND.grad.abs().sum() > 0 and z_support_SD.grad.abs().sum() > 0


def test_clipped_targets_are_not_renormalised():
    """Two classes, targets sharpened to [1 - d, d] with d just below 1e-4: the small entry is dropped and the large
    one stays 1 - d, so a uniform prediction costs (1 - d)·log 2, not log 2."""
    ratio = 10.0  # odds before sharpening; 10^4 after, so d = 1/(10^4 + 1) = 0.99990001e-4
    cosine = 1 - 0.1 * math.log(ratio)
    h = torch.tensor([[1.0, 0.0]] * 2, dtype=torch.float64)
    h_support_SD = torch.tensor([[1.0, 0.0], [cosine, math.sqrt(1 - cosine**2)]], dtype=torch.float64)
    z, z_support_SD = h.clone(), h[:2].clone()
    cross_entropy, _ = paws_loss(z, z_support_SD, torch.eye(2, dtype=torch.float64), h, h_support_SD)
    assert cross_entropy.item() == pytest.approx(1e4 / (1e4 + 1) * math.log(2), rel=1e-12)


def test_crops_count_in_mean_entropy():
    """Global views sit on class 0 and the crops on class 1: only with crops in the mean is it uniform, -log 2."""
    e0, e1 = torch.eye(2, dtype=torch.float64)
    z_ND = torch.stack([e0, e0, e1, e1])
    _, me_max = paws_loss(
        z_ND, torch.eye(2).double(), torch.eye(2).double(), torch.stack([e0, e0]), torch.eye(2).double()
    )
    assert me_max.item() == pytest.approx(-math.log(2), abs=1e-6)


def test_class_without_support_is_finite_and_neutral():
    """A column of zeros (a phantom class) gives p = t = 0: same loss and gradient as without it, no NaN."""
    unsmoothed = label_matrix(torch.arange(SUPPORTS) % CLASSES, CLASSES, smoothing=0.0).double()
    padded = torch.cat([unsmoothed, torch.zeros(SUPPORTS, 1, dtype=torch.float64)], dim=1)
    results = []
    for labels_SK in (unsmoothed, padded):
        arguments = inputs(2, labels_SK=labels_SK)
        parts = paws_loss(*arguments)
        results.append((*parts, *torch.autograd.grad(sum(parts), arguments[:2])))
    for without, with_phantom in zip(*results, strict=True):
        assert with_phantom.isfinite().all()
        torch.testing.assert_close(with_phantom, without, rtol=1e-12, atol=1e-15)


def test_positive_target_of_an_underflown_prediction_is_finite():
    """tau so small that the anchor's weight on the target's class underflows: finite in value and gradient."""
    e0, e1 = torch.eye(2)
    z_ND = torch.stack([e0, e0]).requires_grad_()
    z_support_SD = torch.eye(2).requires_grad_()
    loss, me_max = paws_loss(z_ND, z_support_SD, torch.eye(2), torch.stack([e1, e1]), torch.eye(2), tau=1e-3)
    assert loss.item() == pytest.approx(-math.log(torch.finfo(torch.float32).tiny), rel=1e-6)
    gradients = torch.autograd.grad(loss + me_max, [z_ND, z_support_SD])
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("anchors, globals_", [(3, 4), (5, 4), (4, 3), (0, 0)])
def test_rows_that_are_not_whole_views_are_refused(anchors, globals_):
    rows = torch.ones(anchors, 2), torch.eye(2), torch.eye(2), torch.ones(globals_, 2), torch.eye(2)
    with pytest.raises(ValueError, match="whole views"):
        paws_loss(*rows)


def test_label_matrix_by_hand():
    """Smoothing spreads over all columns, so rows sum to 1 (the authors' other variant sums to 1.7)."""
    labels_SK = label_matrix(torch.tensor([2, 0]), 4, smoothing=0.1)
    expected = torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]])
    torch.testing.assert_close(labels_SK, expected)
    assert torch.equal(label_matrix(torch.tensor([1]), 2, smoothing=0.0), torch.tensor([[0.0, 1.0]]))


def test_diagnostics_equal_their_definitions():
    """Each against loops: catches a support that classifies itself, and one direction of the views left out."""
    _, _, labels_SK, h_GD, h_support_SD = inputs(0, seed=3)
    got = diagnostics(h_GD, h_support_SD, labels_SK, tau=0.2, sharpen_T=0.25)

    unit = [row / row.norm() for row in h_GD]
    views = unit[:IMAGES], unit[IMAGES:]
    instance = 0.0
    for query, key in (views, views[::-1]):
        for i in range(IMAGES):
            weights = [math.exp((query[i] @ key[j]).item() / 0.2) for j in range(IMAGES)]
            instance -= math.log(weights[i] / sum(weights)) / (2 * IMAGES)
    assert got["instance_discrimination"].item() == pytest.approx(instance, rel=1e-12)

    support = 0.0
    for s in range(SUPPORTS):
        others = [o for o in range(SUPPORTS) if o != s]
        one_hot = torch.eye(CLASSES, dtype=torch.float64)[[o % CLASSES for o in others]]
        p = slow_soft_nn(h_support_SD[s], [h_support_SD[o] for o in others], one_hot, 0.2)
        support -= math.log(p[s % CLASSES].item()) / SUPPORTS
    assert got["support_classification"].item() == pytest.approx(support, rel=1e-12)

    sharpened = [slow_sharpen(slow_soft_nn(row, h_support_SD, labels_SK, 0.2), 0.25) for row in h_GD]
    confidence = sum(max(q.item() for q in p) for p in sharpened) / len(h_GD)
    assert got["target_confidence"].item() == pytest.approx(confidence, rel=1e-12)
    assert not any(value.requires_grad for value in got.values())
