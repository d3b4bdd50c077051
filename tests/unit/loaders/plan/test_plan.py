"""The plan: the same global batches on any number of ranks, crops keyed by position, boxes by torchvision's law."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest

from loaders.errors import PlanError
from loaders.plan.boxes import centre_boxes, random_resized_boxes
from loaders.plan.draws import mix
from loaders.plan.ops import ColourJitter, Flip, GaussianBlur, Grayscale
from loaders.plan.plan import Plan, StreamFacts, check_world
from loaders.plan.views import (
    Balanced,
    Centre,
    Complement,
    Listed,
    PerClass,
    Rrc,
    Sequential,
    Shuffled,
    Stream,
    View,
    parse_subset,
)

OPS = (Flip(), ColourJitter(0.8, 0.8, 0.8, 0.8, 0.2), Grayscale(0.2), GaussianBlur(0.5))
GLOBAL = View("global", 224, Rrc((0.14, 1.0)), OPS, copies=2)
SMALL = View("small", 96, Rrc((0.05, 0.14)), OPS, copies=6)


def paws_plan(batch=64, classes=8, per_class=6, num_images=1000, num_classes=16, seed=0, empty=False):
    rng = np.random.default_rng(1)
    labels = rng.permutation(np.arange(num_images) % num_classes)
    labels = np.where(empty & (labels == 3), 2, labels)
    sizes = rng.integers(100, 500, (num_images, 2)).astype(np.int32)
    facts = StreamFacts(None, labels, sizes, num_classes)
    streams = (
        Stream("unlabelled", "unlabelled", (GLOBAL, SMALL), Shuffled(), batch),
        Stream("support", "labelled", (replace(GLOBAL, copies=2),), Balanced(classes, per_class), classes * per_class),
    )
    return Plan(streams, "unlabelled", seed).bind({"unlabelled": facts, "support": facts})


def rows_as_set(rows):
    """(position, id, column, every box, every parameter) of each image, whatever rank it is on."""
    found = set()
    for b in range(len(rows.ids)):
        numbers = [rows.positions[b], rows.ids[b], -1 if rows.columns is None else rows.columns[b], int(rows.keys[b])]
        for view in rows.views:
            for copy in range(view.view.copies):
                row = copy * len(rows.ids) + b
                numbers += [*view.boxes[row], *(x for table in view.tables for x in table[row])]
        found.add(tuple(numbers))
    return found


@pytest.mark.parametrize("stream", ["unlabelled", "support"])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_global_batch(stream, world):
    bound = paws_plan()
    for step in (0, 1, 37):
        whole = rows_as_set(bound.rows(stream, step))
        parts = [rows_as_set(bound.rows(stream, step, rank, world)) for rank in range(world)]
        assert set.union(*parts) == whole and sum(map(len, parts)) == len(whole)


def test_a_support_image_is_cropped_anew_each_time_it_is_drawn():
    """1,000 draws of one image give 1,000 boxes: keyed by position, not by image."""
    labels = np.zeros(1, np.int64)
    facts = StreamFacts(None, labels, np.array([[375, 500]], np.int32), 1)
    view = View("support", 224, Rrc((0.14, 1.0)), OPS)
    bound = Plan((Stream("support", "labelled", (view,), Balanced(1, 1), 1),), "support", 0).bind({"support": facts})
    boxes = {tuple(bound.rows("support", step).views[0].boxes[0]) for step in range(1000)}
    assert len(boxes) == 1000


def test_copies_and_views_differ_and_seeds_matter():
    rows = paws_plan().rows("unlabelled", 3)
    first, second = np.split(rows.views[0].boxes, 2)
    assert (first != second).any(axis=1).all()
    assert (rows.ids != paws_plan(seed=1).rows("unlabelled", 3).ids).any()
    np.testing.assert_array_equal(rows.ids, paws_plan().rows("unlabelled", 3).ids)


def test_boxes_follow_torchvisions_law():
    """Area and aspect against a transcription of torchvision's RandomResizedCrop.get_params in its own generator."""

    def reference(height, width, rng):
        for _ in range(10):
            area = height * width * rng.uniform(0.14, 1.0)
            aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                top, left = rng.randint(0, height - h), rng.randint(0, width - w)
                return left, top, left + w, top + h
        w, h = width, height  # 500 x 375 is within the allowed aspects
        return 0, 0, w, h

    num = 20_000
    rng = random.Random(0)
    expected = np.array([reference(375, 500, rng) for _ in range(num)], float)
    got = random_resized_boxes(Rrc((0.14, 1.0)), np.tile([[375, 500]], (num, 1)), mix(np.arange(num)))
    assert (got[:, :2] >= 0).all() and (got[:, 2] <= 500).all() and (got[:, 3] <= 375).all()
    assert (got == np.rint(got)).all()

    def describe(b):
        w, h = b[:, 2] - b[:, 0], b[:, 3] - b[:, 1]
        return {"area": w * h / (375 * 500), "log aspect": np.log(w / h), "left": b[:, 0], "top": b[:, 1]}

    for name, values in describe(got).items():
        ours, theirs = np.sort(values), np.sort(describe(expected)[name])
        grid = np.quantile(theirs, np.linspace(0.02, 0.98, 49))
        distance = np.abs(np.searchsorted(ours, grid) - np.searchsorted(theirs, grid)).max() / num
        assert distance < 1.95 * math.sqrt(2 / num), name  # Kolmogorov-Smirnov at 0.1 %


def test_fallback_box_is_the_largest_centred_one():
    """An extremely long image fits no attempt of a full-area crop."""
    box = random_resized_boxes(Rrc((1.0, 1.0)), np.array([[100, 1000], [1000, 100]]), mix(np.arange(2)))
    np.testing.assert_array_equal(box, [[433, 0, 566, 100], [0, 433, 100, 566]])


def test_centre_box_is_resize_then_crop():
    # 375 x 500 -> 256 x 341, crop 224 at left round(58.5) = 58 (to even), top 16.
    (box,) = centre_boxes(np.array([[375, 500]]), 224, 256)
    np.testing.assert_allclose(box, [58 * 500 / 341, 16 * 375 / 256, 282 * 500 / 341, 240 * 375 / 256])


def test_sequential_counts_every_image_once_over_ranks():
    labels = np.arange(103)
    facts = StreamFacts(None, labels, np.full((103, 2), 32, np.int32), 103)
    view = View("eval", 32, Centre())
    bound = Plan((Stream("images", "validation", (view,), Sequential(), 20),), "images", 0).bind({"images": facts})
    assert bound.num_steps("images") == 6
    ids = [bound.rows("images", step, rank, 3).ids for step in range(6) for rank in range(3)]
    np.testing.assert_array_equal(np.concatenate(ids), np.arange(103))


def test_hidden_labels_do_not_reach_the_method():
    labels = np.arange(10) % 2
    hidden = np.where(np.arange(10) < 4, labels, -1)
    facts = StreamFacts(None, hidden, np.full((10, 2), 32, np.int32), 2)
    bound = Plan((Stream("s", "train", (), Shuffled(), 10),), "s", 0).bind({"s": facts})
    rows = bound.rows("s", 0)
    shown = rows.ids < 4
    assert ((rows.labels >= 0) == shown).all() and (rows.labels[shown] == labels[rows.ids[shown]]).all()


def test_worlds_that_tile_the_batch_and_those_refused():
    """For 1..64 ranks: those that divide batch and support do, the others are refused with the nearest named."""
    bound = paws_plan(batch=4096, classes=960, per_class=7, num_images=20_000, num_classes=1000)
    for world in range(1, 65):
        if 4096 % world == 0 and 6720 % world == 0:
            bound.check_world(world)
        else:
            with pytest.raises(PlanError, match="nearest"):
                bound.check_world(world)
    with pytest.raises(PlanError, match="batch 4096 does not divide by 60 ranks; nearest: 32 or 64"):
        check_world(60, [4096, 6720])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 2000}, "a batch of 2000 needs as many images, there are 1000"),
        ({"classes": 17}, "wants 17 classes a batch, the data has 16"),
        ({"empty": True}, r"wants labelled images of every class; class 3 has none \(1 of 16 classes have none\)"),
    ],
)
def test_impossible_streams_are_refused_in_users_words(changes, message):
    with pytest.raises(PlanError, match=message):
        paws_plan(**changes)


def test_a_class_of_few_images_repeats_them_each_time_cropped_anew():
    """Would catch a class drawn out of another, crops that repeat too, and other draws where no class is short."""
    bound = paws_plan(per_class=100)
    assert bound.repeats("support").startswith("16 of 16 classes have fewer than 100 (the least 62)")
    assert paws_plan().repeats("support") == paws_plan().repeats("unlabelled") == ""
    whole, few = bound.rows("support", 5), paws_plan(per_class=60).rows("support", 5)
    labels = bound.facts["support"].labels
    for column in range(8):
        ids = whole.ids[whole.columns == column]
        assert len(set(labels[ids])) == 1
        size = (labels == labels[ids[0]]).sum()
        assert len(set(ids[:size])) == size and len(set(ids[size:])) == 100 - size  # once through, then anew
        assert (ids[:60] == few.ids[few.columns == column]).all()  # as where no class is short
        assert (ids[size:] != ids[: 100 - size]).any()
        boxes = whole.views[0].boxes[: len(whole.ids)][whole.columns == column]
        assert len({tuple(box) for box in boxes.tolist()}) == 100


@pytest.mark.parametrize("resize", [None, 32])
def test_a_centre_crop_larger_than_the_image_is_refused(resize):
    labels = np.zeros(4, np.int64)
    facts = StreamFacts(None, labels, np.full((4, 2), 40, np.int32), 1)
    view = View("eval", 64, Centre(resize))
    with pytest.raises(PlanError, match="give Centre a resize of 64 or more"):
        Plan((Stream("s", "validation", (view,), Sequential(), 4),), "s", 0).bind({"s": facts})


def test_labels_as_users_write_them():
    assert parse_subset("per-class=13@2") == PerClass(13, 2)
    assert parse_subset("not:per-class=4") == Complement(PerClass(4))
    assert parse_subset("simclr-10") == Listed("simclr-10")
    with pytest.raises(ValueError, match="per-class=COUNT"):
        parse_subset("per-class=ten")
