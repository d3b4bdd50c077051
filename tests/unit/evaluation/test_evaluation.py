"""Evaluation: neighbours, signs of collapse, statistics, and a fake method on the digits from end to end."""

import csv
import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from fastssl.errors import ConfigError, FastsslError
from fastssl.evaluation import accuracies, collapse, cosine, load_protocol, protocol_names
from fastssl.evaluation.embed import embed
from fastssl.evaluation.knn import knn, nearest
from fastssl.evaluation.subject import Subject, eval_mode
from fastssl.methods.base import Config, Facts, Method, Nets
from fastssl.methods.s4l import S4lConfig
from fastssl.nn.encoders.resnet import ResNet
from loaders.plan.views import UNIT, View, Whole
from loaders.store.data import DataSets
from loaders.store.digits import open_digits
from loaders.store.folder import FolderSource
from loaders.store.source import ArraySource


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


# --- k nearest neighbours ---


def knn_by_sklearn(queries, bank, labels, k):
    """Unit vectors and Euclidean distance d: cos = 1 - d^2 / 2, so the weights are those of the published protocol."""
    unit = [x / x.norm(dim=1, keepdim=True) for x in (queries, bank)]
    model = KNeighborsClassifier(min(k, len(bank)), weights=lambda d: np.exp((1 - d**2 / 2) / 0.07), algorithm="brute")
    return torch.from_numpy(model.fit(unit[1].numpy(), labels.numpy()).predict(unit[0].numpy()))


@pytest.fixture
def blobs():
    """Queries and a bank of 300 in which neighbourhoods are mixed, so that k and the weights matter."""
    torch.manual_seed(1)
    labels = torch.randint(0, 5, (300,))
    centres = torch.randn(5, 6, dtype=torch.float64)
    return torch.randn(80, 6, dtype=torch.float64), centres[labels] + 1.5 * torch.randn(300, 6).double(), labels


def test_knn_agrees_with_sklearn_for_every_k_at_once_and_in_blocks(blobs, monkeypatch):
    """Would catch votes without weights, k off by one, and neighbours lost between blocks (37 of 300 at a time)."""
    queries, bank, labels = blobs
    monkeypatch.setattr(cosine, "MAX_ELEMENTS", 37 * len(queries))
    got = knn(queries, bank, labels, 5, ks=(1, 10, 20, 100, 200))
    for k, classes in got.items():
        assert torch.equal(classes, knn_by_sklearn(queries, bank, labels, k)), k
    assert not torch.equal(got[1], got[200])  # else the comparison above would say little


def test_knn_with_fewer_labelled_images_than_k_lets_all_of_them_vote(blobs):
    """Would catch topk's refusal, and a k that silently has no answer."""
    queries, bank, labels = blobs[0], blobs[1][:15], blobs[2][:15]
    got = knn(queries, bank, labels, 5, ks=(10, 20, 200))
    assert list(got) == [10, 20, 200]
    assert torch.equal(got[20], knn_by_sklearn(queries, bank, labels, 15))
    assert torch.equal(got[20], got[200])


# --- among the five largest ---


@pytest.mark.parametrize("round_to", [None, 0])
def test_top5_is_scikit_learns(round_to):
    """With and without equal scores. Catches a rank counted from one, and ties that all count, by which a classifier
    that gives every class the same would always be right."""
    torch.manual_seed(0)
    scores, labels = torch.randn(400, 9, dtype=torch.float64), torch.randint(0, 9, (400,))
    if round_to is not None:
        scores = scores.round(decimals=round_to)
    expected = top_k_accuracy_score(labels.numpy(), scores.numpy(), k=5, labels=range(9), normalize=False)
    assert accuracies.top5_correct(scores, labels) == expected != 400
    assert accuracies.top5_correct(scores * math.nan, labels) == 0


@pytest.mark.parametrize("protocol", ["knn", "linear", "soft-nn", "probe"])
def test_every_protocol_tells_top5_of_more_than_five_classes(protocol):
    """Held to scikit-learn's of nothing but the ten digits; of five classes or fewer it is not told."""
    train, validation = open_digits()
    result = load_protocol(protocol).evaluate(subject_of(DataSets({"train": train, "validation": validation})))
    name = protocol.replace("-", "_")
    assert result[f"{name}_top1"] < result[f"{name}_top5"] <= 1
    few = [
        ArraySource(each.name, each.images[each.labels < 5], each.labels[each.labels < 5], each.class_names[:5])
        for each in (train, validation)
    ]
    few_classes = load_protocol(protocol).evaluate(subject_of(DataSets({"train": few[0], "validation": few[1]})))
    assert f"{name}_top1" in few_classes and f"{name}_top5" not in few_classes


def test_neighbours_are_looked_for_at_the_tap_that_is_asked_for(digits):
    """`evaluate --tap`: PAWS's appendix A takes features from before the prediction head."""
    subject = subject_of(digits)
    usual = load_protocol("soft-nn").evaluate(subject)["soft_nn"]["tap"]
    subject.tap = "backbone"
    assert usual == subject.method.taps[-1]
    assert load_protocol("soft-nn").evaluate(subject)["soft_nn"]["tap"] == "backbone"
    subject.tap = "h"
    with pytest.raises(ConfigError, match="has no tap 'h'"):
        load_protocol("soft-nn").evaluate(subject)


# --- collapse ---


def test_effective_rank_of_known_spectra():
    """Would catch squared singular values (variances) in place of the singular values, and centring."""
    torch.manual_seed(0)
    assert collapse.effective_rank(torch.eye(9)).item() == pytest.approx(9)
    assert collapse.effective_rank(torch.randn(40, 1) @ torch.randn(1, 8)).item() == pytest.approx(1, abs=1e-4)
    u, v = (torch.linalg.qr(torch.randn(n, 3, dtype=torch.float64))[0] for n in (50, 6))
    sigma = torch.tensor([6.0, 3.0, 1.0], dtype=torch.float64)
    expected = math.exp(-sum(p * math.log(p) for p in (0.6, 0.3, 0.1)))
    tall = u * sigma @ v.T
    assert collapse.effective_rank(tall).item() == pytest.approx(expected, rel=1e-6)
    assert collapse.effective_rank(tall.T).item() == pytest.approx(expected, rel=1e-6)  # fewer images than dimensions
    assert collapse.effective_rank(torch.zeros(5, 3)).item() == 1  # and not NaN, which no JSON holds


def test_entropy_of_the_mean_is_not_the_mean_entropy():
    """Would catch averaging after the entropy: sure predictions of different classes are no collapse."""
    sure = torch.eye(4).repeat(3, 1)
    assert collapse.mean_prediction_entropy(sure).item() == pytest.approx(math.log(4))
    assert collapse.prediction_confidence(sure).item() == 1
    one_class = torch.eye(4)[:1].repeat(5, 1)
    assert collapse.mean_prediction_entropy(one_class).item() == 0  # and not NaN from 0 log 0
    assert collapse.share_of_uniform(math.log(2), 4) == pytest.approx(0.5)


# --- statistics ---


def test_wilson_against_published_values():
    """Would catch the normal approximation, which gives an empty interval at 0 of 10. (Brown, Cai & DasGupta 2001:
    the score interval at 0 of n ends at z^2 / (n + z^2).)"""
    z2 = 1.959964**2
    assert accuracies.wilson(0, 10) == pytest.approx([0, z2 / (10 + z2)])
    assert accuracies.wilson(10, 10) == pytest.approx([10 / (10 + z2), 1])
    assert accuracies.wilson(81, 263) == pytest.approx([0.2553, 0.3662], abs=1e-4)  # Newcombe 1998, table I


def test_spread_over_seeds_is_the_samples_and_one_seed_has_none():
    """Would catch the population's standard deviation, and a claim of zero spread from one seed."""
    spread = accuracies.mean_and_spread([0.9, 0.92, 0.97])
    assert spread["mean"] == pytest.approx(0.93) and spread["std"] == pytest.approx(math.sqrt(0.0026 / 2))
    assert accuracies.accuracy_cell(spread) == "93.0 ± 3.6 (3 seeds)"
    single = accuracies.mean_and_spread([0.955])
    assert single["std"] is None
    assert accuracies.accuracy_cell(single, [0.9411, 0.9658]) == "95.5 [94.1, 96.6] (single seed)"


def test_only_accuracies_are_summed_up_over_seeds():
    """Would catch the mean of seeds and ranks, and of a score that one run did not measure."""
    runs = [
        {"knn_top1": 0.8, "soft_nn_top1": 0.7, "effective_rank": 2.0, "seed": 0},
        {"knn_top1": 0.9, "effective_rank": 3.0, "seed": 1},
    ]
    spreads = accuracies.spread_over_seeds(runs)
    assert list(spreads) == ["knn_top1"]
    assert spreads["knn_top1"]["values"] == [0.8, 0.9] and spreads["knn_top1"]["mean"] == pytest.approx(0.85)


# --- protocols by name ---


def test_protocols_are_found_by_name_and_a_slip_is_put_right():
    """Would catch a helper module (cosine, embed) taken for a protocol."""
    assert {"soft-nn", "knn"} <= set(protocol_names())
    assert not {"cosine", "embed", "subject", "summary", "collapse"} & set(protocol_names())
    assert load_protocol("soft-nn").__name__ == "fastssl.evaluation.soft_nn"
    with pytest.raises(ConfigError, match="did you mean 'soft-nn'"):
        load_protocol("soft-n")
    with pytest.raises(ConfigError, match="unknown protocol 'cosine'"):
        load_protocol("cosine")


# --- a fake method, end to end ---


@dataclass(frozen=True)
class PixelsConfig(Config):
    def build(self, facts, inputs):
        return PixelsMethod(self, facts, inputs)


class PixelsMethod(Method):
    """A linear net that keeps every pixel at the first tap and half as many mixtures at the last."""

    taps = ("backbone", "z")
    plan = optimizer = rates = loss = None

    def nets(self):
        return Nets(nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, 32)))

    def embed(self, nets, x, tap):
        assert not nets.online.training and not torch.is_grad_enabled()
        return nets.online(x) if tap == "z" else x.flatten(1)


def subject_of(data, labels="per-class=10", **kwargs):
    config = PixelsConfig(dataset="digits", eval_view=View("eval", 8, Whole(), pixels=UNIT), labels=labels)
    method = config.build(None, {})  # it asks nothing of the data
    torch.manual_seed(0)
    return Subject(method, method.nets(), data, threads=1, **kwargs)


@pytest.fixture
def digits():
    train, held_out = open_digits()
    return DataSets({"train": train, "validation": held_out})


def test_digits_end_to_end(digits):
    """Would catch labels that do not belong to their rows: raw pixels classify digits well, shuffled labels do not."""
    subject = subject_of(digits, batch=100)
    soft, near = (load_protocol(name).evaluate(subject) for name in ("soft-nn", "knn"))
    count = len(digits.get("validation"))
    assert 0.75 < soft["soft_nn_top1"] < 0.97 and 0.75 < near["knn_top1"] < 0.97
    assert near["knn_top1"] == near["knn_top1_k20"] and near["knn"]["k_used"] == {
        "10": 10,
        "20": 20,
        "100": 100,
        "200": 100,
    }
    low, high = soft["soft_nn"]["top1_ci95"]
    assert low < soft["soft_nn_top1"] < high and soft["soft_nn"]["images"] == count
    assert 1 < soft["effective_rank"] <= 32  # of z, which has 32 dimensions
    assert 0.9 < soft["mean_prediction_entropy_share"] <= 1 and 0.1 < soft["prediction_confidence"] < 1
    about = subject.provenance()
    assert about["labelled"]["split"] == "10-per-class-split-0" and about["labelled"]["count"] == 100
    assert about["validation"]["count"] == count and about["validation"]["data"] == "digits (held out)"
    json.dumps([soft, near, about], allow_nan=False)


def test_four_turns_outvote_the_image_as_it_is():
    """Would catch the unturned logits scored under the other name. Class 0's logit is the upper left pixel, class 1's
    half the other three: lit there alone, an image is of class 0 as it is, and of class 1 by its four turns."""
    images = np.zeros((4, 2, 2, 1), np.uint8)
    images[:, 0, 0] = 200
    source = ArraySource("corners", images, np.array([1, 1, 1, 0]), ("0", "1"))
    eval_view = View("eval", 2, Whole(), pixels=UNIT)
    config = S4lConfig("digits", eval_view, precision="fp32", encoder=ResNet(10, base_width=4), view=eval_view)
    method = config.build(Facts(2, 1, 0), {})
    nets = method.nets()
    nets.online.trunk, nets.online.fc = nn.Flatten(), nn.Linear(4, 2, bias=False)
    nets.online.fc.weight.data = torch.tensor([[1, 0, 0, 0], [0, 0.5, 0.5, 0.5]])
    subject = Subject(method, nets, DataSets({"train": source, "validation": source}), threads=1)
    assert load_protocol("classifier").evaluate(subject)["classifier_top1"] == 1 / 4
    found = load_protocol("turned-classifier").evaluate(subject)
    assert found["turned_classifier_top1"] == 3 / 4 and found["turned_classifier"]["images"] == 4
    with pytest.raises(ConfigError, match="PixelsMethod has no turned-logits to classify by"):
        load_protocol("turned-classifier").evaluate(subject_of(DataSets({"train": source, "validation": source})))


def test_features_are_the_pixels_of_the_images_named_by_the_ids(digits):
    """Would catch a slot reused before its rows were read, and ids that number the subset instead of the source."""
    features = subject_of(digits, batch=7).features("labelled", "backbone")
    train = digits.get("labelled")
    assert features.ids.tolist() == sorted(set(features.ids.tolist())) and len(features.ids) == 100
    assert torch.equal(features.labels, torch.from_numpy(train.labels[features.ids.numpy()]))
    expected = train.images[features.ids.numpy()].reshape(100, 64) / 255
    np.testing.assert_allclose(features.values.numpy(), expected, atol=1e-6)


def test_protocols_share_a_pass(digits, monkeypatch):
    """Would catch embedding the same images again for every protocol."""
    subject = subject_of(digits)
    calls = []
    original = subject.method.embed
    subject.method.embed = lambda nets, x, tap: calls.append(tap) or original(nets, x, tap)
    load_protocol("knn").evaluate(subject)
    first = len(calls)
    load_protocol("knn").evaluate(subject)
    assert first == len(calls) > 0 and subject.features("validation", "backbone") is subject.features(
        "validation", "backbone"
    )


@pytest.mark.parametrize("most", [1, 3, 9, 40])
def test_of_equally_near_images_the_first_ones_are_kept(most):
    """Of cosines that come three at a time; catches an order of ties that is torch's."""
    cosine = torch.randint(0, 5, (60, 15), generator=torch.Generator().manual_seed(0)) / 4
    slow = [sorted(range(15), key=lambda m: (-row[m], m))[:most] for row in cosine.tolist()]  # noqa: B023
    assert nearest(cosine, most).tolist() == slow


def test_modes_come_back_part_by_part():
    """Would catch a `train()` afterwards that wakes a batch norm the method keeps frozen."""
    nets = PixelsMethod(None, None, {}).nets()
    nets.online.train()
    nets.online[0].eval()
    with pytest.raises(KeyError), eval_mode(nets):
        assert not any(part.training for part in nets.online.modules())
        raise KeyError  # a failing protocol must not leave the training in eval mode
    assert [part.training for part in nets.online] == [False, True, True] and nets.online.training


def test_what_cannot_be_evaluated_is_said_at_the_door(digits):
    """Would catch a measurement on images without labels, on no validation data, of a diverged network."""
    train, held_out = digits.get("train"), digits.get("validation")
    with pytest.raises(ConfigError, match="no validation split: give --data validation=PATH"):
        subject_of(DataSets({"train": train})).check()
    unknown = held_out.labels.copy()
    unknown[3] = -1
    blank = ArraySource("blank", held_out.images, unknown, held_out.class_names)
    with pytest.raises(ConfigError, match="1 validation images carry no label"):
        subject_of(DataSets({"train": train, "validation": blank})).check()
    with pytest.raises(ConfigError, match="no tap 'proj1'; it has backbone, z"):
        subject_of(digits).features("validation", "proj1")
    diverged = subject_of(digits)
    diverged.nets.online[2].weight.data.fill_(math.nan)
    with pytest.raises(FastsslError, match="not finite"):
        diverged.features("validation", "z")


def test_labelled_images_without_a_label_stay_out_of_the_support(digits):
    """Would catch -1 entering one-hot labels where a source mixes labelled and other images."""
    train = digits.get("train")
    partly = np.where(np.arange(len(train)) % 2, train.labels, -1)
    data = DataSets(
        {"train": ArraySource("half", train.images, partly, train.class_names), "validation": digits.get("validation")}
    )
    subject = subject_of(data, labels="all")
    labelled, _ = subject.labelled_and_validation("backbone")
    assert len(labelled.labels) == len(train) // 2 and labelled.labels.min() == 0
    assert subject.provenance()["labelled"]["count_labelled"] == len(train) // 2


def test_embedding_files_are_whole_and_say_what_they_are(digits, tmp_path):
    """Would catch a pickle, a JSON that survives beside changed arrays, and unfinished files left behind."""
    subject = subject_of(digits)
    for _ in range(2):  # written over
        about = json.loads(embed(subject, "validation", "z", tmp_path).read_text())
    arrays = {name: np.load(tmp_path / file["file"], allow_pickle=False) for name, file in about["files"].items()}
    features = subject.features("validation", "z")
    assert np.array_equal(arrays["features"], features.values.numpy()) and arrays["features"].dtype == np.float32
    assert np.array_equal(arrays["labels"], features.labels.numpy()) and np.array_equal(
        arrays["ids"], features.ids.numpy()
    )
    assert about["tap"] == "z" and about["data"] == "digits (held out)" and about["count"] == len(arrays["ids"])
    names = [
        "validation.csv",
        "validation.features.npy",
        "validation.ids.npy",
        "validation.json",
        "validation.labels.npy",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_rows_of_embeddings_say_their_file_and_class(tmp_path):
    """Would catch rows of another order than the arrays', names without their folder, and names that break a table."""
    for name in ("cat/a, b.png", "cat/deep/ü.png", 'dog/"1".png'):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(path)
    source = FolderSource(tmp_path / "data")
    config = PixelsConfig(dataset="digits", eval_view=View("eval", 8, Whole(), pixels=UNIT))
    method = config.build(None, {})
    method.facts = Facts(2, 3, 0)
    subject = Subject(method, Nets(nn.Identity()), DataSets({"train": source}), threads=1)
    about = json.loads(embed(subject, "train", "backbone", tmp_path / "out").read_text())
    with open(tmp_path / "out" / about["table"]["file"], newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["row", "id", "file", "class"]
    files = [("cat/a, b.png", "cat"), ("cat/deep/ü.png", "cat"), ('dog/"1".png', "dog")]
    assert rows == [[str(i), str(i), *each] for i, each in enumerate(files)]
    assert about["class_names"] == ["cat", "dog"]
