"""The linear probe: both solvers against plain transcriptions, and a choice that no validation image takes part in."""

import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn import functional as F

from fastssl.errors import ConfigError
from fastssl.evaluation import linear, load_protocol
from fastssl.evaluation.linear import choose_head, held_out, in_words, linear_heads
from fastssl.evaluation.logistic import logistic_regression
from loaders.store.data import DataSets
from loaders.store.digits import open_digits
from loaders.store.source import ArraySource
from tests.unit.evaluation.test_evaluation import subject_of


def blobs(count, num_classes, width, spread, seed=0):
    """Features float64 around the classes' centres, not of unit scale and not centred, and labels."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % num_classes
    centres = torch.randn(num_classes, width, generator=g, dtype=torch.float64)
    noise = torch.randn(count, width, generator=g, dtype=torch.float64)
    return 3 * (centres[labels] + spread * noise) + 2, labels


def scaled(x):
    return x / x.square().mean().sqrt()


@pytest.mark.parametrize("solver", ["l-bfgs", "sgd"])
def test_separable_classes_are_all_found(solver):
    """Would catch labels beside the wrong rows, heads that forget the features' scale, and a choice at the
    end of many settings that are as good."""
    x, labels = blobs(90, 3, 5, spread=0.05)
    queries, truth = blobs(200, 3, 5, spread=0.05)
    head, about = choose_head(x, labels, held_out(labels, torch.arange(90)), 3, solver=solver)
    assert torch.equal(head.classes(queries)[0], truth)
    accuracies = about["held_out"]["top1"]
    assert len(accuracies) == (9 if solver == "l-bfgs" else 13) and max(accuracies.values()) == 1
    best = [setting for setting, accuracy in accuracies.items() if accuracy == 1]
    assert in_words(about["chosen"]) == best[(len(best) - 1) // 2] and len(best) > 2
    assert about["chosen"].get("weight_decay", 0) == 0  # SemPPL's linear evaluation has none
    assert about["held_out"]["images"] == 3 * 6 and about["solver"] == solver


def test_a_head_among_many_is_trained_as_if_alone():
    """Would catch one learning rate or decay for all, a shared momentum, and a loss averaged over heads."""
    x, labels = blobs(40, 4, 6, spread=1.5)
    settings = ((0.01, 0.0), (0.3, 0.01), (5.0, 0.0), (5.0, 0.1))
    together = linear_heads(x, labels, 4, settings, batch=16, epochs=3)
    for s, setting in enumerate(settings):
        alone = linear_heads(x, labels, 4, [setting], batch=16, epochs=3)
        torch.testing.assert_close(together.weight_SKD[s], alone.weight_SKD[0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(together.bias_SK[s], alone.bias_SK[0], rtol=1e-12, atol=1e-14)


def test_the_best_pair_of_rate_and_decay_is_chosen_and_trained_again():
    """Would catch scores beside the wrong pairs, and a last training without the decay that was chosen."""
    x, labels = blobs(96, 2, 60, spread=3.0)
    decays = (0.01, 1.0)
    held = held_out(labels, torch.arange(96))
    head, about = choose_head(x, labels, held, 2, decays=decays, solver="sgd")
    pairs = [(rate, decay) for rate in linear.RATES for decay in decays]
    each = linear_heads(x[~held], labels[~held], 2, pairs).classes(x[held])
    right = (each == labels[held]).double().mean(dim=1).tolist()
    assert list(about["held_out"]["top1"].values()) == right
    named = [f"rate={rate:.3g}, weight_decay={decay:.3g}" for rate, decay in pairs]
    assert list(about["held_out"]["top1"]) == named
    rate, decay = chosen = tuple(about["chosen"].values())
    assert right[pairs.index(chosen)] == max(right) > min(right)
    again, without = (linear_heads(x, labels, 2, [(rate, d)]).weight_SKD for d in (decay, 0.0))
    torch.testing.assert_close(head.weight_SKD, again)
    assert (head.weight_SKD - without).norm() > 0.01 * without.norm()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_head_equals_torchs_own_layer_and_optimizer(decay):
    """Would catch momentum that is not Nesterov's, another cosine, a rate not per 256 images, a bias not trained, decay
    of the bias, of features as they are, or past the momentum, and heads left in the scale they were trained in."""
    x, labels = blobs(32, 4, 6, spread=1.5)
    layer = nn.Linear(6, 4, dtype=torch.float64)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    peak, steps = 0.8 * 32 / 256, 25
    groups = [{"params": [layer.weight], "weight_decay": decay}, {"params": [layer.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=peak, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(layer(scaled(x)), labels).backward()
        optimizer.step()
        schedule.step()
    heads = linear_heads(x, labels, 4, [(0.8, decay)], epochs=steps)  # 1,024 images a step are all 32
    torch.testing.assert_close(heads.logits(x)[0], layer(scaled(x)).detach(), rtol=1e-9, atol=1e-11)
    assert layer.weight.abs().max() > 0.05


def test_a_batch_is_of_every_image_once_an_epoch_in_changing_order():
    """Would catch the same partial batch left out of every epoch: the last class of a set sorted by class is one."""
    x, labels = torch.eye(6, dtype=torch.float64), torch.tensor([0, 0, 0, 0, 1, 1])
    heads = linear_heads(x, labels, 2, [(1.0, 0.0)], batch=4, epochs=50)
    assert (heads.classes(x)[0] == labels).all() and heads.weight_SKD[0].abs().min() > 0


def test_sgd_comes_to_the_optimum_that_l_bfgs_finds():
    """Would catch a gradient of something else than the mean cross-entropy."""
    x, labels = blobs(60, 3, 2, spread=1.0)
    nearly_free = logistic_regression(x, labels, 3, [1e5])
    heads = linear_heads(x, labels, 3, [(2.0, 0.0)], epochs=3000)
    best, found = (float(F.cross_entropy(h.logits(x)[0], labels)) for h in (nearly_free, heads))
    assert 0.1 < best < 1 and found == pytest.approx(best, abs=1e-5)  # classes that overlap


def test_l_bfgs_is_at_the_minimum_of_its_objective_for_every_c():
    """Would catch C taken for its inverse, a mean for the sum, a penalised bias, and a path that stops at its start."""
    x, labels = blobs(60, 4, 5, spread=1.0)
    labels[labels == 3] = 4  # classes 0, 1, 2 and 4 of five
    cs = (0.01, 1.0, 100.0)
    heads = logistic_regression(x, labels, 5, cs)
    assert (heads.bias_SK[:, 3] == -math.inf).all() and not (heads.classes(x) == 3).any()
    rms = float(x.square().mean().sqrt())
    for s, c in enumerate(cs):
        weight = (heads.weight_SKD[s, [0, 1, 2, 4]] * rms).requires_grad_()
        bias = heads.bias_SK[s, [0, 1, 2, 4]].clone().requires_grad_()
        columns = torch.where(labels == 4, 3, labels)
        summed = F.cross_entropy(scaled(x) @ weight.T + bias, columns, reduction="sum")
        ((summed * c + weight.square().sum() / 2) / (c * len(x))).backward()
        assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 2e-4, c
    norms = heads.weight_SKD.square().sum(dim=(1, 2)).tolist()
    assert norms == sorted(norms) and norms[0] < norms[2] / 10


def test_two_classes_of_several():
    """Would catch scikit-learn's single row of weights for two classes, read as the first class's."""
    x, labels = blobs(40, 2, 3, spread=1.0)
    heads = logistic_regression(x, 2 * labels, 3, [1.0])  # classes 0 and 2
    theirs = LogisticRegression(C=1.0).fit(scaled(x).numpy(), labels.numpy())
    assert heads.classes(x)[0].tolist() == (2 * theirs.predict(scaled(x).numpy())).tolist()
    margin = heads.logits(x)[0, :, 2] - heads.logits(x)[0, :, 0]
    assert margin.tolist() == pytest.approx(theirs.decision_function(scaled(x).numpy()), abs=1e-3)


def test_a_rate_that_diverges_leaves_the_others_as_they_are_and_is_never_right():
    """Would catch NaN spreading over the heads that share a batch, and NaN's argmax taken for class 0."""
    x, labels = (t.float() if t.is_floating_point() else t for t in blobs(40, 4, 6, spread=1.0))
    settings = [(0.1, 1e-3), (1e39, 1e-3)]  # the second rate is infinite in float32
    heads = linear_heads(x, labels, 4, settings, batch=16, epochs=5)
    alone = linear_heads(x, labels, 4, settings[:1], batch=16, epochs=5)
    assert not heads.weight_SKD[1].isfinite().all()
    torch.testing.assert_close(heads.weight_SKD[0], alone.weight_SKD[0], rtol=1e-5, atol=1e-7)
    assert (heads.classes(x)[1] == -1).all() and (heads.classes(x)[0] >= 0).all()


def test_a_fifth_of_small_classes_and_twelve_of_large_ones_are_held_out_whatever_their_order():
    """Would catch a class that is left without an image to learn from, and a choice by row in place of id."""
    sizes = {0: 1, 1: 2, 2: 5, 3: 6, 4: 60, 5: 100}
    labels = torch.cat([torch.full((n,), c) for c, n in sizes.items()])
    ids = torch.randperm(1000)[: len(labels)]
    held = held_out(labels, ids)
    assert torch.bincount(labels[held], minlength=6).tolist() == [0, 1, 1, 2, 12, 12]
    order = torch.randperm(len(labels))
    assert set(ids[order][held_out(labels[order], ids[order])].tolist()) == set(ids[held].tolist())


def test_what_cannot_be_probed_is_said():
    x, ids = torch.randn(4, 3), torch.arange(4)
    with pytest.raises(ConfigError, match="it needs two of a class"):
        choose_head(x, torch.arange(4), held_out(torch.arange(4), ids), 4)
    one_class = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ConfigError, match="of two classes at least"):
        choose_head(x, one_class, held_out(one_class, ids), 4)


@pytest.fixture(scope="module")
def digits():
    train, validation = open_digits()
    return DataSets({"train": train, "validation": validation})


@pytest.mark.parametrize("solver", ["l-bfgs", "sgd"])
def test_validation_labels_change_the_accuracy_alone(digits, solver, monkeypatch):
    """Would catch a rate, a C or an epoch chosen on the validation images. On raw pixels, ten labels a class."""
    if solver == "sgd":
        monkeypatch.setattr(linear, "LARGEST_FOR_LBFGS", 100 * 64 * 10 - 1)
    truth = digits.get("validation")
    poisoned = ArraySource(truth.name, truth.images, (truth.labels + 1) % 10, truth.class_names)
    honest, fooled = (
        load_protocol("linear").evaluate(subject_of(DataSets({**digits.sources, "validation": validation})))
        for validation in (truth, poisoned)
    )
    assert honest["linear_top1"] > 0.8 > 0.1 > fooled["linear_top1"]
    low, high = honest["linear"].pop("top1_ci95")
    assert low < honest["linear_top1"] < high and fooled["linear"].pop("top1_ci95")[1] < 0.15
    assert honest["linear"] == fooled["linear"]
    assert honest["linear"]["solver"] == solver and honest["linear"]["augmented"] is False
    assert honest["linear"]["held_out"]["images"] == 20 and honest["linear"]["labelled_images"] == 100
