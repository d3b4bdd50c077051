"""Predictions of single images: that they are what the protocols count, in whatever folders, and the page of doubt."""

import re

import pytest
import torch

from fastssl.errors import ConfigError
from fastssl.evaluation import classifier, soft_nn
from fastssl.evaluation.predict import images_at, predict
from fastssl.report.review import review_page
from loaders.errors import StoreError
from loaders.store.data import open_data
from tests.support.swatches import FeaturesOnly, SwatchMethod, subject_of, swatch

REDS = {"ash": (0, 0.2, 0.7), "birch": (1, 1.1, 1.6), "cedar": (2, 1.2, 2.3)}  # the last of ash looks like birch, ...


@pytest.fixture
def folders(tmp_path):
    for k, name in enumerate(REDS):
        swatch(tmp_path / "sorted" / name / "a.png", k, form="PNG")
        for i, red in enumerate(REDS[name]):
            swatch(tmp_path / "held" / name / f"{i}.png", red, form="PNG")
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "protocol", "score"),
    [(SwatchMethod, classifier, "classifier_top1"), (FeaturesOnly, soft_nn, "soft_nn_top1")],
)
def test_predictions_are_what_the_protocol_counts(folders, kind, protocol, score):
    """Other images to compare with, classes numbered otherwise, another tap."""
    subject = subject_of(folders / "sorted", {}, kind)
    subject.data = open_data((f"labelled={folders / 'sorted'}", f"validation={folders / 'held'}"))
    found = predict(subject, images_at(str(folders / "held")))
    right = [file.split("/")[0] == name for file, name in zip(found.files, found.classes, strict=True)]
    assert len(found) == 9 and 0 < sum(right) < 9
    assert sum(right) / 9 == pytest.approx(protocol.evaluate(subject)[score])
    assert torch.from_numpy(found.probabilities).sum(1).allclose(torch.ones(9))
    assert all(a != b for a, b in zip(found.classes, found.runners_up, strict=True))
    assert found.runners_up[1] == "birch" and found.margin.argmin() in (2, 5)


def test_every_image_below_a_folder_is_one_row(tmp_path):
    """Images straight in it beside folders, folders called train and val, a file that is no image."""
    for place in ("1.png", "train/x/2.png", "val/y/3.png", "deep/er/4.png"):
        swatch(tmp_path / place, 1, form="PNG")
    (tmp_path / "notes.txt").write_text("no image")
    source = images_at(str(tmp_path))
    paths = [source.path_of(i) for i in range(len(source))]
    assert paths == ["1.png", "deep/er/4.png", "train/x/2.png", "val/y/3.png"]


def test_what_cannot_be_predicted_is_named(folders, tmp_path):
    subject = subject_of(folders / "sorted", {}, SwatchMethod)
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="no images"):
        images_at(str(tmp_path / "empty"))
    with pytest.raises(StoreError, match="no such file"):
        images_at(str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="1 channels; the network takes images of 3"):
        predict(subject, images_at("digits"))


def test_the_page_of_doubt_shows_the_least_sure_first_and_loads_nothing(folders):
    subject = subject_of(folders / "sorted", {}, SwatchMethod)
    source = images_at(str(folders / "held"))
    found = predict(subject, source)
    html = review_page(folders / "run", source, found)
    shown = re.findall(r"<code>(\w+/\d\.png)</code>", html)
    assert sorted(shown) == sorted(found.files) and shown[0] == found.files[found.margin.argmin()]
    loaded = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert loaded and all(each.startswith("data:") for each in loaded) and "<script" not in html
