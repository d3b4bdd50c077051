"""Training images that stand in for the validation images: as users write them, and with nothing else opened."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.errors import ConfigError
from loaders.errors import StoreError
from loaders.labels.subsets import resolve
from loaders.loader import bind
from loaders.plan.plan import Plan
from loaders.plan.views import All, Complement, Listed, PerClass, Sequential, Stream, View, Whole, parse_subset
from loaders.store.data import DataSets, open_data
from loaders.store.digits import open_digits
from tests.unit.evaluation.test_evaluation import subject_of


@pytest.fixture
def digits():
    train, validation = open_digits()
    return DataSets({"train": train, "validation": validation})


def test_some_of_each_class_among_others_as_users_write_it():
    """Would catch `not:` that ends at the first word, and a split seed lost before ` of `."""
    assert parse_subset("per-class=12 of not:simclr-10") == PerClass(12, 0, Complement(Listed("simclr-10")))
    assert parse_subset("not:per-class=12@3 of not:per-class=10") == Complement(
        PerClass(12, 3, Complement(PerClass(10)))
    )
    assert parse_subset("per-class=12") == PerClass(12, 0, All())
    assert parse_subset("lists/two of three.txt") == Listed("lists/two of three.txt")
    with pytest.raises(ValueError, match="write per-class=COUNT"):
        parse_subset("per-class=many of all")


def test_some_of_each_class_among_others_leaves_out_the_others(digits):
    """Would catch keys of positions in place of ids, and an overlap with what was to be left out."""
    source = digits.get("train")
    labelled, held_out = (
        resolve(parse_subset(text), source) for text in ("per-class=10", "per-class=12 of not:per-class=10")
    )
    assert np.bincount(source.labels[held_out.ids]).tolist() == [12] * 10
    assert not np.intersect1d(labelled.ids, held_out.ids).size
    both = resolve(PerClass(22), source)  # the smallest keys come first
    assert np.array_equal(np.union1d(labelled.ids, held_out.ids), both.ids)
    assert held_out.name == "12-per-class-split-0-of-all-but-10-per-class-split-0"
    with pytest.raises(StoreError, match=r"class '\d' has \d+ images left, 150 were asked for"):
        resolve(parse_subset("per-class=150 of not:per-class=10"), source)


@pytest.fixture
def folder(tmp_path):
    """Four training images of two classes beside validation images that are none."""
    for split, names in (("train", "abcd"), ("val", "xy")):
        for i, name in enumerate(names):
            path = tmp_path / split / "mn"[i % 2] / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            if split == "train":
                Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(path)
            else:
                path.write_text("no image")
    return tmp_path


def test_without_validation_nothing_of_it_is_opened(folder, tmp_path):
    """Would catch headers read, or files listed, of images that nobody may look at yet."""
    assert "validation" in open_data((str(folder),)).sources
    data = open_data((str(folder), f"validation={folder / 'nowhere'}"), validation=False)
    assert set(data.sources) == {"train"} and len(data.get("train")) == 4
    (tmp_path / "val.beton").write_text("no beton")
    with pytest.raises(StoreError, match="val.beton"):
        open_data((str(folder),))
    assert open_data((str(folder),), validation=False).sources == {}
    assert set(open_data(("digits",), validation=False).sources) == {"train"}


def test_a_label_list_of_validation_images_is_told_as_such(folder):
    """Would catch a typo's message where somebody is about to train on the validation images."""
    for path in (folder / "val").rglob("*.png"):
        Image.new("RGB", (8, 8)).save(path)
    (folder / "mine.txt").write_text("a.png\nx.png\ny.png\nz.png\n")
    view = View("eval", 8, Whole())
    data = open_data((str(folder),))
    plan = Plan((Stream("s", "labelled", (view,), Sequential(), 1, ids=Listed("mine")),), "s", 0)
    with pytest.raises(
        StoreError, match=r"3 of its 4 images are not in .*train, first x.png; 2 of them are validation im"
    ):
        bind(plan, data)
    (folder / "mine.txt").write_text("a.png\nz.png\n")
    with pytest.raises(StoreError, match=r"1 of its 2 images are not in .*train, first z.png$"):
        bind(plan, data)


def test_held_out_images_stand_in_for_validation_and_keep_their_ids(digits):
    """Would catch the validation images measured all the same, and a list's hash that is not told."""
    without = DataSets({"train": digits.get("train")})
    text = "per-class=3 of not:per-class=10"
    subject = subject_of(without, held_out=text)
    chosen = resolve(parse_subset(text), digits.get("train"))
    labelled, held_out = subject.labelled_and_validation("backbone")
    assert held_out.ids.tolist() == chosen.ids.tolist() and len(labelled.ids) == 100
    pixels = torch.from_numpy(digits.get("train").images[chosen.ids]).flatten(1) / 255
    torch.testing.assert_close(held_out.values, pixels)
    about = subject.provenance()["validation"]
    assert (about["split"], about["split_sha256"], about["count"]) == (chosen.name, chosen.sha256, 30)
    with pytest.raises(ConfigError, match="no validation split"):
        subject_of(without).check()
