"""PAWS's loss against a loop-by-loop float64 transcription of its source, value and gradient."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from fastssl.losses import similarity
from fastssl.losses.paws import (
    MIN_TARGET,
    consistency,
    gather_supports,
    label_columns,
    p_in_auroc,
    paws_loss,
    sharpen,
    sharpened_targets,
)
from fastssl.losses.similarity import BalancedLabels, DenseLabels
from loaders.plan.order import ClassIndex, balanced

IMAGES, SUPPORTS, CLASSES, WIDTH = 3, 8, 4, 5


def label_matrix(columns_S, num_columns, smoothing):
    """Smoothed one-hot rows, float64 [S, K]."""
    return F.one_hot(columns_S, num_columns).double() * (1 - smoothing) + smoothing / num_columns


def inputs(num_crops, seed=0, labels_SK=None, num_global=2):
    """Anchors, supports, labels and projections of one rank, float64; z and z_support ask for gradients."""
    generator = torch.Generator().manual_seed(seed)
    if labels_SK is None:
        labels_SK = label_matrix(torch.arange(SUPPORTS) % CLASSES, CLASSES, smoothing=0.1)
    z_ND, z_support_SD, h_GD, h_support_SD = (
        torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
        for rows in ((num_global + num_crops) * IMAGES, len(labels_SK), num_global * IMAGES, len(labels_SK))
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


def slow_paws_loss(z_ND, z_support_SD, labels_SK, h_GD, h_support_SD, tau=0.1, sharpen_T=0.25, num_global=2):
    """Steps 3 to 8 of the method's description, a row and a column at a time."""
    images = len(h_GD) // num_global
    num_views, num_columns = len(z_ND) // images, labels_SK.shape[1]
    h_GD, h_support_SD = h_GD.detach(), h_support_SD.detach()
    predictions, cross_entropy = [], 0.0
    for view in range(num_views):
        for image in range(images):
            p = slow_soft_nn(z_ND[view * images + image], z_support_SD, labels_SK, tau)
            predictions.append(slow_sharpen(p, sharpen_T))
            others = [
                slow_sharpen(slow_soft_nn(h_GD[g * images + image], h_support_SD, labels_SK, tau), sharpen_T)
                for g in range(num_global)
                if g != view
            ]
            target = [sum(q[k] for q in others) / len(others) for k in range(num_columns)]
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


@pytest.mark.parametrize(("num_global", "num_crops"), [(3, 0), (3, 2), (4, 1)])
def test_more_global_views_are_drawn_to_the_mean_of_the_others(num_global, num_crops):
    """Catches views that are paired with other images' targets, as they were where there are more than two."""
    arguments = inputs(num_crops, num_global=num_global)
    z_ND, z_support_SD = arguments[:2]
    fast, slow = (f(*arguments, num_global=num_global) for f in (paws_loss, slow_paws_loss))
    for part, slow_part in zip(fast, slow, strict=True):
        assert abs(part.item() / slow_part.item() - 1) < 1e-12
        got = torch.autograd.grad(part, [z_ND, z_support_SD], retain_graph=True)
        expected = torch.autograd.grad(slow_part, [z_ND, z_support_SD], retain_graph=True)
        assert max(map(relative_error, got, expected)) < 1e-9


@pytest.mark.parametrize("num_global", [1, 4])
def test_rows_that_are_no_whole_views_are_refused(num_global):
    with pytest.raises(ValueError, match=f"6 rows of h are not {num_global} whole views"):
        paws_loss(*inputs(2), num_global=num_global)


def targets_of(h_GD, supports, **changes):
    return replace(sharpened_targets(h_GD, supports, tau=0.1, sharpen_T=0.25), **changes)


def test_labels_stand_in_for_views():
    """Appendix D.1: an image's label is the target of all its views; one whose class is not among the supports, or
    that has no label, keeps those of its views."""
    z_ND, z_support_SD, labels_SK, h_GD, h_support_SD = inputs(1)
    supports = gather_supports(z_support_SD, h_support_SD, labels_SK)
    columns = [2, -1, 0]
    targets = targets_of(h_GD, supports, column_B=torch.tensor(columns))
    views = targets_of(h_GD, supports).of_anchors(torch.arange(3 * IMAGES))
    found = targets.of_anchors(torch.arange(3 * IMAGES))
    for row, target in enumerate(found):
        column = columns[row % IMAGES]
        expected = views[row] if column < 0 else torch.eye(CLASSES, dtype=torch.float64)[column]
        assert torch.equal(target, expected)
    cross_entropy = consistency(z_ND, targets, supports, tau=0.1, sharpen_T=0.25).cross_entropy
    slow = sum(
        -(target[k] * torch.log(p[k]))
        for row, target in enumerate(found)
        for p in [slow_soft_nn(z_ND[row], z_support_SD, labels_SK, 0.1)]
        for k in range(CLASSES)
    ) / len(z_ND)
    assert relative_error(cross_entropy, slow) < 1e-12
    got, expected = (
        torch.autograd.grad(part, [z_ND, z_support_SD], retain_graph=True) for part in (cross_entropy, slow)
    )
    assert max(map(relative_error, got, expected)) < 1e-9


def test_labels_find_their_columns():
    """Of the classes 7, 3, 5, sampled in that order; a hidden label and a class that was not sampled have none."""
    labels, columns = torch.tensor([7, 7, 3, 3, 5, 5]), torch.tensor([0, 0, 1, 1, 2, 2])
    assert label_columns(torch.tensor([3, -1, 5, 9, 7]), labels, columns, 3).tolist() == [1, -1, 2, -1, 0]


def test_entropy_is_that_of_predictions():
    """Appendix D.2, of predictions that are not sharpened."""
    z_ND, z_support_SD, labels_SK, h_GD, h_support_SD = inputs(2)
    supports = gather_supports(z_support_SD, h_support_SD, labels_SK)
    entropy = consistency(z_ND, targets_of(h_GD, supports), supports, tau=0.1, sharpen_T=0.25, entropy=True).entropy
    slow = sum(-(q * torch.log(q)) for z in z_ND for q in slow_soft_nn(z, z_support_SD, labels_SK, 0.1)) / len(z_ND)
    assert relative_error(entropy, slow) < 1e-12
    got, expected = (torch.autograd.grad(part, [z_ND, z_support_SD], retain_graph=True) for part in (entropy, slow))
    assert max(map(relative_error, got, expected)) < 1e-9


def terms_of(z_ND, z_support_SD, columns_S, h_GD, h_support_SD, *, sharpen_T, column_B=None):
    """PAWS's cross-entropy, with labels for targets, and entropy; nothing smoothed."""
    labels_SK = F.one_hot(columns_S).double()
    supports = gather_supports(z_support_SD, h_support_SD, labels_SK)
    targets = sharpened_targets(h_GD, supports, tau=0.1, sharpen_T=sharpen_T)
    of_views = consistency(z_ND, targets, supports, tau=0.1, sharpen_T=sharpen_T, entropy=True)
    targets = replace(targets, column_B=column_B)
    of_labels = consistency(z_ND, targets, supports, tau=0.1, sharpen_T=sharpen_T)
    return {"views": of_views.cross_entropy, "labels": of_labels.cross_entropy, "entropy": of_views.entropy}


@pytest.mark.parametrize("sharpen_T", [0.25, 1.0])
def test_of_uniform_predictions_only_labels_draw_away(sharpen_T):
    """Propositions 1 and 2 and D.2 at p = 1/K. A support a class, along one axis each, and anchors between them all:
    p is uniform, and the gradient in z is that in the logits, p - target. A sharpened uniform prediction is uniform,
    and entropy stationary at its maximum: of the three, a label alone gives a gradient, which is (1/K - y) / tau."""
    between_ND = torch.ones(2, 5, dtype=torch.float64).div(5**0.5).requires_grad_()
    axes_SD, columns_S = torch.eye(5, dtype=torch.float64), torch.arange(5)
    label = torch.tensor([3])
    terms = terms_of(between_ND, axes_SD, columns_S, between_ND, axes_SD, sharpen_T=sharpen_T, column_B=label)
    found = {name: torch.autograd.grad(term, between_ND, retain_graph=True)[0] for name, term in terms.items()}
    expected = (torch.full((5,), 0.2, dtype=torch.float64) - torch.eye(5, dtype=torch.float64)[3]) / 0.1 / 2
    assert (found["labels"] - expected).abs().max() < 1e-12
    assert found["views"].abs().max() < 1e-12 and found["entropy"].abs().max() < 1e-12


def test_near_collapse_labels_draw_away_linearly_and_the_rest_cubically():
    """Rows v + eps * noise, as eps falls tenfold, down to a full collapse, of which nothing draws away: cosines are
    stationary at equal directions. Catches a label target that is a prediction after all."""
    generator = torch.Generator().manual_seed(0)
    v_D, columns_S = torch.randn(8, generator=generator, dtype=torch.float64), torch.arange(15) % 5
    noise = [torch.randn(rows, 8, generator=generator, dtype=torch.float64) for rows in (6, 15, 6, 15)]
    norms = {}
    for sharpen_T in (0.25, 1.0):
        for eps in (1e-1, 1e-2, 1e-3, 0.0):
            z_ND, z_support_SD, h_GD, h_support_SD = (v_D + eps * rows for rows in noise)
            leaves = [z_ND.requires_grad_(), z_support_SD.requires_grad_()]
            label = torch.tensor([0, 3, 4])
            terms = terms_of(*leaves, columns_S, h_GD, h_support_SD, sharpen_T=sharpen_T, column_B=label)
            for name, term in terms.items():
                gradients = torch.autograd.grad(term, leaves, retain_graph=True)
                norms[name, sharpen_T, eps] = torch.cat(gradients).norm().item()
    for (name, sharpen_T, eps), norm in norms.items():
        if eps == 0:
            assert norm < 1e-13
        elif eps > 1e-3:
            power = math.log10(norm / norms[name, sharpen_T, eps / 10])
            assert power == pytest.approx(1 if name == "labels" else 3, abs=0.1), (name, sharpen_T, eps)


def test_of_two_views_each_has_the_other_s_target_to_the_bit():
    """And crops the mean of both: weights of many views round nothing. Catches runs of two views that would differ."""
    _, z_support_SD, labels_SK, h_GD, h_support_SD = inputs(2)
    for dtype in (torch.float32, torch.float64):
        supports = gather_supports(*(rows.detach().to(dtype) for rows in (z_support_SD, h_support_SD, labels_SK)))
        targets = sharpened_targets(h_GD.to(dtype), supports, tau=0.1, sharpen_T=0.25)
        first_BK, second_BK = targets.p_GK.chunk(2)
        mean_BK = (first_BK + second_BK) / 2
        expected = torch.cat([second_BK, first_BK, mean_BK, mean_BK])
        found = targets.of_anchors(torch.arange(4 * IMAGES))
        assert torch.equal(found, torch.where(expected < MIN_TARGET, 0.0, expected))


def test_images_weigh_as_they_are_told():
    """RoPAWS's p_in: catches weights of anchors where those of images are given."""
    z_ND, z_support_SD, labels_SK, h_GD, h_support_SD = inputs(1)
    supports = gather_supports(z_support_SD, h_support_SD, labels_SK)
    found = []
    for image in range(IMAGES):
        weight_B = torch.eye(IMAGES, dtype=torch.float64)[image]
        targets = targets_of(h_GD, supports, weight_B=weight_B)
        found.append(consistency(z_ND, targets, supports, tau=0.1, sharpen_T=0.25).cross_entropy.item())
    assert sum(found) == pytest.approx(
        paws_loss(z_ND, z_support_SD, labels_SK, h_GD, h_support_SD)[0].item(), rel=1e-12
    )
    alone = paws_loss(z_ND[::IMAGES], z_support_SD, labels_SK, h_GD[::IMAGES], h_support_SD)[0].item()
    assert found[0] * IMAGES == pytest.approx(alone, rel=1e-12)


def test_p_in_s_auroc_is_scikit_learn_s():
    from sklearn.metrics import roc_auc_score

    p_in_B = torch.tensor([0.9, 0.2, 0.5, 0.5, 0.7, 0.1])
    known_B = torch.tensor([True, False, True, False, False, True])
    assert p_in_auroc(p_in_B, known_B).item() == pytest.approx(roc_auc_score(known_B, p_in_B))
    assert p_in_auroc(p_in_B, torch.ones(6, dtype=torch.bool)).item() == 0.5


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
    unsmoothed = label_matrix(torch.arange(SUPPORTS) % CLASSES, CLASSES, smoothing=0.0)
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


def plain_paws_loss(z_ND, z_support_SD, labels_SK, h_GD, h_support_SD, tau=0.1, sharpen_T=0.25):
    """The loss as a few products of whole matrices, every step left to autograd."""

    def soft_nn(query_ND, support_SD):
        return torch.softmax(F.normalize(query_ND) @ F.normalize(support_SD).T / tau, dim=1) @ labels_SK

    def times_log(t, p):
        return t * p.clamp_min(torch.finfo(p.dtype).tiny).log()

    images = len(h_GD) // 2
    target_GK = sharpen(soft_nn(h_GD.roll(images, dims=0), h_support_SD), sharpen_T)
    crop_BK = (target_GK[:images] + target_GK[images:]) / 2
    target_NK = torch.cat([target_GK, crop_BK.repeat(len(z_ND) // images - 2, 1)])
    p_NK = soft_nn(z_ND, z_support_SD)
    mean_K = sharpen(p_NK, sharpen_T).mean(dim=0)
    cross_entropy = -times_log(torch.where(target_NK < MIN_TARGET, 0.0, target_NK), p_NK).sum(dim=1).mean()
    return cross_entropy, times_log(mean_K, mean_K).sum()


@pytest.mark.parametrize("dtype, of_value, of_gradient", [(torch.float64, 1e-13, 1e-12), (torch.float32, 1e-6, 2e-6)])
@pytest.mark.parametrize("elements", [1, 1000, 2**30], ids=["single rows", "uneven chunks", "one chunk"])
@pytest.mark.parametrize("dense", [False, True])
def test_chunks_equal_whole_matrices(dense, elements, dtype, of_value, of_gradient, monkeypatch):
    """Catches rows lost or doubled where chunks end, a chunk that spans views and takes one view's targets, a gradient
    that only the last chunk gives, and weights kept of a chunk that is not the only one. (Whole matrices in float32
    are 1e-6 off those in float64 as well.)"""
    monkeypatch.setattr(similarity, "MAX_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(0)
    balanced_labels = BalancedLabels(12, 7, copies=2, smoothing=0.1)
    labels_SK = label_matrix(balanced_labels.columns(torch.device("cpu")), 12, 0.1)
    features = [torch.randn(rows, 16, generator=generator, dtype=torch.float64) for rows in (5 * 11, 168, 2 * 11, 168)]

    def leaves_and_parts(loss, dtype, labels):
        z_ND, z_support_SD, h_GD, h_support_SD = (x.to(dtype) for x in features)
        leaves = z_ND.requires_grad_(), z_support_SD.requires_grad_()
        return leaves, loss(*leaves, labels, h_GD, h_support_SD)

    leaves, got = leaves_and_parts(paws_loss, dtype, labels_SK if dense else balanced_labels)
    plain_leaves, expected = leaves_and_parts(plain_paws_loss, torch.float64, labels_SK)
    for part, plain in zip(got, expected, strict=True):
        assert abs(part.item() / plain.item() - 1) < of_value
    for weight in (1.0, 3.0):  # twice: backward leaves what it needs as it was
        gradients, plain = (
            torch.autograd.grad(cross_entropy + weight * me_max, rows, retain_graph=True)
            for rows, (cross_entropy, me_max) in ((leaves, got), (plain_leaves, expected))
        )
        assert max(map(relative_error, gradients, plain)) < of_gradient


@pytest.mark.parametrize("ranks, copies", [(1, 1), (1, 2), (3, 1), (4, 1), (4, 2), (8, 2)])
def test_balanced_labels_equal_their_matrix(ranks, copies):
    """Six columns of four, on 1 to 8 ranks: with 4 and 8 ranks parts break columns. Catches views mistaken for ranks,
    columns of a rank's own instead of all ranks', and smoothing that leaves the gradient's mean in."""
    labels = BalancedLabels(6, 4, copies, ranks, smoothing=0.3)
    index = ClassIndex.of(np.arange(60), np.arange(60) % 6, 6)
    parts = np.arange(24).reshape(ranks, -1)
    drawn = [np.tile(balanced(rows, 0, index, 6, 4, np.uint64(7))[1], copies) for rows in parts]
    columns_S = torch.from_numpy(np.concatenate(drawn))
    assert torch.equal(labels.columns(torch.device("cpu")), columns_S)

    dense = DenseLabels(label_matrix(columns_S, 6, 0.3))
    generator = torch.Generator().manual_seed(0)
    weight_nS = torch.randn(5, 24 * copies, generator=generator, dtype=torch.float64).softmax(dim=1)
    gradient_nK = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    p_nK = dense.predictions(weight_nS)
    torch.testing.assert_close(labels.predictions(weight_nS), p_nK, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        labels.logit_gradient(weight_nS, p_nK, gradient_nK),
        dense.logit_gradient(weight_nS, p_nK, gradient_nK),
        rtol=1e-12,
        atol=1e-15,
    )


def test_unit_rows_equal_normalize():
    """Value and gradient, for a row of zeros too (which a dead network gives): catches NaN from 0 / 0, and a backward
    that overwrites the gradient it is given, which others may hold."""
    x_ND = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_ND[2] = 0
    gradient_ND = torch.arange(12.0, dtype=torch.float64).view(4, 3)
    results = []
    for normalize in (similarity.unit_rows, F.normalize):
        leaf = x_ND.clone().requires_grad_()
        unit_ND = normalize(leaf)
        results.append((unit_ND, *torch.autograd.grad(unit_ND, leaf, gradient_ND)))
    assert gradient_ND.flatten().tolist() == list(range(12))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-15)


# -------------------------------------------------------------------------------------- of the ImageNet job: 960 x 7

ANCHORS, NUM_SUPPORTS = 8 * 4096, 960 * 7


@pytest.mark.parametrize("share, limit_mb", [(8, 64), (1, 300)])
def test_workspace_is_that_of_a_chunk(share, limit_mb):
    """Allocator events, not resident memory: beyond what it is given, and unit rows and gradients of anchors and
    supports, the loss with its backward takes 64 MB at an eighth of the batch and 300 MB for all of it. Catches the
    similarity matrix (881 MB) and targets of all views (126 MB)."""
    assert _workspace_bytes(ANCHORS // share, width=8) < limit_mb * 1e6


def test_workspace_does_not_grow_with_the_features():
    """Catches temporaries as wide as features (34 MB each at an eighth of the batch): as two narrow widths need the
    same workspace, so do the job's 2,048."""
    assert _workspace_bytes(ANCHORS // 8, width=40) <= _workspace_bytes(ANCHORS // 8, width=8)


def _workspace_bytes(anchors, width):
    """Most bytes that the loss and its backward held at once, less unit rows and gradients of anchors and supports."""
    return _peak_bytes(anchors, width) - 2 * (anchors + NUM_SUPPORTS) * width * 4


def _peak_bytes(anchors, width):
    """Most bytes that the loss and its backward held at once."""
    z_ND, z_support_SD, h_GD, h_support_SD = (
        torch.randn(rows, width) for rows in (anchors, NUM_SUPPORTS, anchors // 4, NUM_SUPPORTS)
    )
    leaves = z_ND.requires_grad_(), z_support_SD.requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        sum(paws_loss(*leaves, BalancedLabels(960, 7, smoothing=0.1), h_GD, h_support_SD)).backward()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(np.cumsum(changes))
