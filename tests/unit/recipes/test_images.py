"""Recipes for one's own images: choices that hold from hundreds of images to millions, and what is refused."""

from dataclasses import replace

import pytest

from fastssl.errors import ConfigError
from fastssl.methods.base import Facts
from fastssl.recipes.images import SIDES, TYPICAL, Choices, Images
from fastssl.recipes.resolve import follows_images, resolve

MINE = ("paws.mine", "supervised.mine", "simclrv2.mine")


@pytest.mark.parametrize("name", MINE)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("num_images", "num_labelled"), [(200, 20), (200, 200), (9_000, 1_020), (2_000_000, 100_000)])
@pytest.mark.parametrize("num_classes", [2, 102, 20_000])
@pytest.mark.parametrize("side", [32, 100, 3_000])
def test_choices_fit_any_set(name, device, num_images, num_labelled, num_classes, side):
    """More classes a step than there are, more images of a class than it has, a batch larger than the set, no epoch."""
    num_classes = min(num_classes, num_labelled)
    images = Images(num_images, num_labelled, num_classes, max(1, num_labelled // num_classes), side, device=device)
    *before, stage = resolve(name, (), images)
    config = stage.config
    plan = config.build(Facts(num_classes, 3, 0), {}).plan()
    assert plan.stream(plan.epoch_of).batch_global <= (num_labelled if name == "supervised.mine" else num_images)
    assert config.eval_view.size <= side and config.eval_view.size in SIDES[device]
    assert 1 <= stage.length.count <= 400 and config.rate.warmup.count <= stage.length.count
    if name == "paws.mine":
        assert 2 <= config.classes_global <= num_classes
        assert 1 <= config.images_per_class <= images.smallest_class
    for labels in before:
        assert labels.config.batch_global <= num_labelled and labels.config.view.size == config.eval_view.size
        assert labels.length.count >= 1 and labels.config.labels == config.labels
    assert len(before) == (name == "paws.mine") and len(Choices(images).said()) == 6


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("num_classes", [2, 5, 13, 48, 102, 120])
def test_a_step_shows_every_class_where_there_is_room(device, num_classes):
    """An image of a class that is not among a step's supports, which is told to be of another."""
    classes, each = Choices(replace(TYPICAL, num_classes=num_classes, device=device)).support
    assert num_classes - 7 <= classes <= num_classes and each >= 2


def test_what_is_chosen_can_be_changed_and_follows_the_data():
    settings = ("epochs=3", "labels=per-class=5")
    labels, small = resolve("paws.mine", settings, replace(TYPICAL, num_images=300, side=70))
    assert (small.length.count, small.config.labels, small.config.global_view.size) == (3, "per-class=5", 64)
    assert (labels.length.count, labels.config.labels, labels.config.view.size) == (3, "per-class=5", 64)
    for grey in resolve("paws.mine", (), replace(TYPICAL, channels=1)):
        assert len(grey.config.eval_view.pixels.mean) == 1
    (from_weights,) = resolve("paws.mine", (), replace(TYPICAL, from_weights=True))
    assert from_weights == replace(resolve("paws.mine")[1], needs=from_weights.needs)
    few = replace(TYPICAL, num_images=16, num_labelled=16, num_classes=4, smallest_class=4, from_weights=True)
    assert resolve("supervised.mine", (), few)[0].config.batch_global == 8  # of the 16
    (scratch,), (tuned,) = (
        resolve("supervised.mine", (), replace(TYPICAL, from_weights=weights)) for weights in (False, True)
    )
    assert tuned.config.rate.peak < scratch.config.rate.peak and tuned.length.count < scratch.length.count
    assert [follows_images(name) for name in (*MINE, "paws.digits", "mine.py:mine")] == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_images": 30, "num_labelled": 30}, "30 images to learn from are too few"),
        ({"side": 20}, "less than the smallest crops"),
        ({"num_classes": 1}, "of one class"),
        ({"num_labelled": 0, "num_classes": 0}, "simclrv2.mine"),
    ],
)
def test_what_cannot_be_learnt_from_is_one_line(change, said):
    images = replace(TYPICAL, **change)
    for name in ("paws.mine", "supervised.mine"):
        with pytest.raises(ConfigError, match=said) as error:
            resolve(name, (), images)
        assert "\n" not in str(error.value)
    if "num_classes" in change:
        (stage,) = resolve("simclrv2.mine", (), images)
        assert stage.evaluate == () and len(Choices(images).said()) == 5
