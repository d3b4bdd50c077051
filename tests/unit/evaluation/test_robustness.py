"""Shifted test sets in their published layouts: the right class for every folder, the right classes to choose among."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastssl import dist
from fastssl.errors import ConfigError
from fastssl.evaluation import robustness
from loaders.errors import StoreError
from loaders.published.robustness import ALEXNET_ERROR, SHIFTS, V2_FOLDERS, objectnet_classes
from loaders.store.folder import FolderSource
from tests.support.swatches import FeaturesOnly, subject_of, swatch

WNIDS = [f"n0{7 * k + 1440764}" for k in range(12)]


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def labelled(tmp_path):
    """Twelve classes, as many as make ten sort behind one; class k is the colour of k."""
    return labelled_folder(tmp_path / "labelled", 12)


def labelled_folder(root: Path, num_classes: int) -> Path:
    for k, wnid in enumerate(WNIDS[:num_classes]):
        for i in range(2):
            swatch(root / wnid / f"{wnid}_{i}.JPEG", k + 0.1 * i)
    return root


def scores(labelled: Path, kind=None, **sets: Path):
    found = robustness.evaluate(subject_of(labelled, sets, *([kind] if kind else [])))
    json.dumps(found, allow_nan=False)
    return found


# ImageNetV2


def v2(root: Path, parts=V2_FOLDERS) -> Path:
    for part in parts:
        for k in range(12):
            swatch(root / V2_FOLDERS[part] / str(k) / f"{k:040x}.jpeg", k)
    return root


def test_folders_0_to_11_are_numbers_and_no_text(labelled, tmp_path):
    """Catches folder 10 taken for class 2, which text sorts there: a perfect classifier would score 2 of 12."""
    v2(tmp_path / "v2")
    found = scores(labelled, imagenet_v2=tmp_path / "v2")
    for part in V2_FOLDERS:
        assert found[f"imagenet_v2_{part}_top1"] == 1.0
    as_text = FolderSource(tmp_path / "v2" / V2_FOLDERS["top_images"])
    subject = subject_of(labelled, {})
    features = subject.features_of(as_text, "logits")
    assert int((features.values.argmax(dim=1) == features.labels).sum()) == 2


def test_numbers_count_the_sorted_classes_whatever_order_a_run_has_them_in(tmp_path):
    root = v2(tmp_path, ["top_images"])
    for wnids in (tuple(WNIDS), tuple(reversed(WNIDS))):
        shifted = SHIFTS["imagenet_v2"].parts(root, wnids)["top_images"]()
        assert dict(zip(shifted.source.class_names, shifted.wnids, strict=True))["10"] == (WNIDS[10],)
        right = robustness.groups(shifted, wnids)[wnids.index(WNIDS[10])]
        assert shifted.source.class_names[right] == "10"


def test_what_is_missing_of_v2_is_named(labelled, tmp_path):
    root = v2(tmp_path / "v2", ["matched_frequency", "top_images"])
    found = scores(labelled, imagenet_v2=root)
    assert "imagenet_v2_threshold_0_7_top1" not in found
    assert "imagenet_v2_threshold_0_7" in found["robustness"]["not_given"]
    assert found["robustness"]["imagenet_v2"]["top_images"]["partial"] == "12 of 10000 images"
    only = root / V2_FOLDERS["top_images"]
    assert list(SHIFTS["imagenet_v2"].parts(only, tuple(WNIDS))) == ["top_images"]  # the part's own folder will do

    next((only / "10").iterdir()).unlink()
    with pytest.raises(StoreError, match=r"top-images-format-val: folder '10' holds no image"):
        scores(labelled, imagenet_v2=root)
    (only / "10").rmdir()
    with pytest.raises(StoreError, match=r"top-images-format-val: 1 of 12 folders are missing: 10$"):
        scores(labelled, imagenet_v2=root)
    with pytest.raises(StoreError, match="no ImageNetV2; looked for imagenetv2-matched-frequency-format-val"):
        scores(labelled, imagenet_v2=tmp_path)
    with pytest.raises(StoreError, match="nowhere: no such folder"):
        scores(labelled, imagenet_v2=tmp_path / "nowhere")


# ImageNet-R, -A


def test_some_classes_are_scored_masked_and_unmasked(labelled, tmp_path):
    """Catches the one number passed off as the other, a mask by place in the set instead of by class, and top-5 hits on
    classes that the mask took out."""
    root = tmp_path / "imagenet-r"
    swatch(root / WNIDS[2] / "art_0.jpg", 2)
    swatch(root / WNIDS[2] / "art_1.jpg", 3)  # looks like class 3, which the set has not: masked it is nearest to 2
    swatch(root / WNIDS[5] / "art_2.jpg", 9.4)  # of all classes five are nearer
    swatch(root / WNIDS[5] / "art_3.jpg", 2)  # wrong either way
    (root / "README.txt").write_text("renditions")
    for path in (tmp_path, root):  # the archive's folder, or the one above
        found = scores(labelled, imagenet_r=path)
        assert found["imagenet_r_top1_unmasked"] == 1 / 4 and found["imagenet_r_top1_masked"] == 3 / 4
        details = found["robustness"]["imagenet_r"]
        assert details["top5_unmasked"] == 2 / 4 and details["top5_masked"] == 1.0
        assert details["partial"] == "4 of 30000 images" and "top1" not in details
        low, high = details["top1_masked_ci95"]
        assert low < 3 / 4 < high
    assert found["robustness"]["not_given"] == ["imagenet_v2", "imagenet_c", "imagenet_a", "objectnet"]
    swatch(root / "n00000001" / "x.jpg", 0)
    with pytest.raises(StoreError, match=r"'n00000001' is none of the 12 classes that this run knows"):
        scores(labelled, imagenet_a=root)


def test_what_is_measured_is_told_before_a_later_set_fails(labelled, tmp_path, capsys, monkeypatch):
    """Catches numbers that took hours, kept back until all sets are done and lost with the last; and lines of every
    rank, or on stdout, where JSON is read."""
    swatch(tmp_path / "r" / WNIDS[2] / "art_0.jpg", 2)
    (tmp_path / "a" / WNIDS[3]).mkdir(parents=True)
    (tmp_path / "a" / WNIDS[3] / "x.jpg").write_text("no image")
    for main in (True, False):
        monkeypatch.setattr(dist, "is_main", lambda main=main: main)
        with pytest.raises(StoreError, match=r"x\.jpg: not a JPEG"):
            scores(labelled, imagenet_r=tmp_path / "r", imagenet_a=tmp_path / "a")
        told = "imagenet_r_top1_unmasked: 1.0000\nimagenet_r_top1_masked: 1.0000\n"
        assert capsys.readouterr() == ("", told if main else "")


# ImageNet-C


ARCHIVES = {  # as they are published
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": ("spatter",),
}


def imagenet_c(root: Path, wrong: dict[str, int]) -> Path:
    """Both classes once in each of 75 parts; in the hardest `wrong[corruption]` severities they look swapped. Beside
    them an extra corruption that would be refused if it were read."""
    (root / "spatter" / "1" / "no_class").mkdir(parents=True)
    for corruption in ALEXNET_ERROR:
        for severity in range(1, 6):
            swapped = severity > 5 - wrong.get(corruption, 0)
            for k in range(2):
                path = root / corruption / str(severity) / WNIDS[k] / "ILSVRC2012_val_00000001.JPEG"
                swatch(path, 1 - k if swapped else k)
    return root


def test_corruption_errors_are_relative_to_alexnets_and_averaged_over_corruptions(tmp_path, capsys):
    """Catches errors pooled before they are divided, and accuracies where errors belong."""
    labelled = labelled_folder(tmp_path / "labelled", 2)
    found = scores(labelled, imagenet_c=imagenet_c(tmp_path / "c", {"fog": 2, "brightness": 5}))
    details = found["robustness"]["imagenet_c"]
    assert details["corruptions"]["fog"]["top1"] == pytest.approx(0.6)
    assert [details["corruptions"]["fog"]["severities"][s]["top1"] for s in "12345"] == [1, 1, 1, 0, 0]
    assert details["corruptions"]["fog"]["ce"] == pytest.approx(0.4 / 0.819324)
    assert found["imagenet_c_top1"] == pytest.approx((13 + 0.6) / 15)
    assert found["imagenet_c_mce"] == pytest.approx((0.4 / 0.819324 + 1 / 0.564592) / 15)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 75 + 2 and "imagenet_c_fog/4_top1: 0.0000" in told and told[-2] == "imagenet_c_top1: 0.9067"


def test_corruptions_are_found_in_the_folders_of_their_archives(tmp_path):
    """Catches a layout refused as users keep it, and a corruption read as another: brightness alone is swapped here."""
    labelled = labelled_folder(tmp_path / "labelled", 2)
    root = imagenet_c(tmp_path / "c", {"brightness": 5})
    flat = scores(labelled, imagenet_c=root)
    for archive, corruptions in ARCHIVES.items():
        (root / archive).mkdir()
        for corruption in corruptions:
            (root / corruption).rename(root / archive / corruption)
    found = scores(labelled, imagenet_c=root)
    assert found["imagenet_c_mce"] == flat["imagenet_c_mce"] == pytest.approx(1 / 0.564592 / 15)
    assert found["robustness"]["imagenet_c"]["corruptions"].keys() == ALEXNET_ERROR.keys()
    (root / "weather" / "fog" / "3").rename(tmp_path / "away")
    with pytest.raises(StoreError, match=r"c: 1 of 75 folders are missing: fog/3$"):
        scores(labelled, imagenet_c=root)


def test_corrupted_images_are_seen_whole(tmp_path):
    """They are published as crops: to scale and cut them as ImageNet's images are would zoom in. Here the edge decides:
    a red border of 1 pixel in 40 makes class 1 of class 0, and the usual view cuts 4."""
    labelled = labelled_folder(tmp_path / "labelled", 2)
    root = imagenet_c(tmp_path / "c", {})
    edged = root / "snow" / "1" / WNIDS[1] / "ILSVRC2012_val_00000001.JPEG"
    swatch(edged, 0, form="PNG", size=38, border=1)  # 156 of 1600 pixels: 25 of 255
    found = scores(labelled, imagenet_c=root)
    assert found["robustness"]["imagenet_c"]["corruptions"]["snow"]["severities"]["1"]["top1"] == 1.0
    usual = scores(labelled, imagenet_r=root / "snow" / "1")
    assert usual["imagenet_r_top1"] == 0.5


def test_missing_severities_and_classes_are_named(tmp_path):
    labelled = labelled_folder(tmp_path / "labelled", 2)
    root = imagenet_c(tmp_path / "c", {})
    part = root / "fog" / "3"
    (part / WNIDS[1]).rename(tmp_path / "away")
    with pytest.raises(StoreError, match=rf"fog/3: 1 of 2 folders are missing: {WNIDS[1]}"):
        scores(labelled, imagenet_c=root)
    part.rename(tmp_path / "three")
    with pytest.raises(StoreError, match=r"c: 1 of 75 folders are missing: fog/3$"):
        scores(labelled, imagenet_c=root)


# ObjectNet


def objectnet(root: Path) -> Path:
    """Three folders, of which ImageNet has two: chairs are its classes 3 and 8, mugs its 5. Labels stand in another
    order than classes."""
    order = [(5 * k + 2) % 12 for k in range(12)]  # class of each line
    mappings = {
        "folder_to_objectnet_label.json": {"chair": "Chair", "mug": "Mug (cup)", "air_freshener": "Air freshener"},
        "objectnet_to_imagenet_1k.json": {"Chair": "label 3, of two; label 8, of two", "Mug (cup)": "label 5, of two"},
        "pytorch_to_imagenet_2012_id.json": {str(k): line for line, k in enumerate(order)},
    }
    (root / "mappings").mkdir(parents=True)
    for name, content in mappings.items():
        (root / "mappings" / name).write_text(json.dumps(content))
    (root / "mappings" / "imagenet_to_label_2012_v2").write_text("".join(f"label {k}, of two\n" for k in order))
    for folder, *ks in (("chair", 3, 8, 5), ("mug", 5, 6.4), ("air_freshener", 0)):
        for i, k in enumerate(ks):
            swatch(root / "images" / folder / f"{i}.png", k, form="PNG", border=2)
    return root


def test_objectnet_through_its_mappings_without_its_border(labelled, tmp_path):
    """Catches lines taken for class numbers, one right class where two are, classes that ImageNet lacks counted in, and
    the border: with it the red is 255 in 80 of 144 pixels and nothing is known again."""
    objectnet(tmp_path / "objectnet-1.0")
    found = scores(labelled, objectnet=tmp_path)
    # Both kinds of chair and a mug are right; the other chair looks like a mug; 6.4 is nearest to 6, of three to 5.
    assert found["objectnet_top1_unmasked"] == 3 / 5 and found["objectnet_top1_masked"] == 4 / 5
    assert found["robustness"]["objectnet"]["images"] == 5
    shifted = SHIFTS["objectnet"].parts(tmp_path, tuple(WNIDS))[""]()
    assert shifted.source.sizes.tolist() == [[8, 8]] * 5
    assert shifted.wnids == ((WNIDS[3], WNIDS[8]), (WNIDS[5],))


def test_a_border_narrower_or_wider_than_two_pixels_would_show(tmp_path):
    shifted = SHIFTS["objectnet"].parts(objectnet(tmp_path / "objectnet-1.0"), tuple(WNIDS))[""]()
    (tmp_path / "inner.png").write_bytes(shifted.source.jpeg(0))
    with Image.open(tmp_path / "inner.png") as image:
        assert image.size == (8, 8) and image.getcolors() == [(64, (60, 0, 0))]


def test_mappings_that_lead_nowhere_are_named(tmp_path):
    root = objectnet(tmp_path)
    with pytest.raises(StoreError, match="12 classes are numbered, and this run knows 11"):
        objectnet_classes(root / "mappings", tuple(WNIDS[:11]))
    (root / "images" / "mug").rename(tmp_path / "away")
    with pytest.raises(StoreError, match="images: 1 of 2 folders are missing: mug$"):
        SHIFTS["objectnet"].parts(root, tuple(WNIDS))
    labels = root / "mappings" / "imagenet_to_label_2012_v2"
    labels.write_text(labels.read_text().replace("label 8", "label eight"))
    with pytest.raises(StoreError, match="the mappings do not fit each other: nothing for 'label 8, of two'"):
        objectnet_classes(root / "mappings", tuple(WNIDS))
    (root / "mappings" / "objectnet_to_imagenet_1k.json").unlink()
    with pytest.raises(StoreError, match=r"objectnet_to_imagenet_1k\.json: cannot be read: No such file"):
        objectnet_classes(root / "mappings", tuple(WNIDS))


# Classifiers


def test_a_run_without_a_classifier_gets_a_linear_one_of_its_labelled_images(labelled, tmp_path):
    """Catches a head whose classes are numbered otherwise than the run's."""
    for k in (1, 7, 10):
        swatch(tmp_path / "r" / WNIDS[k] / "x.jpg", k)
    found = scores(labelled, FeaturesOnly, imagenet_r=tmp_path / "r")
    assert found["imagenet_r_top1_unmasked"] == found["imagenet_r_top1_masked"] == 1.0
    about = found["robustness"]["classifier"]
    assert about["kind"] == "linear, on frozen features" and about["tap"] == "backbone"
    assert about["labelled_images"] == 24


def test_what_cannot_be_measured_is_said_at_the_door(labelled, tmp_path):
    with pytest.raises(ConfigError, match="give --data KEY=PATH with KEY one of imagenet_v2, imagenet_c, imagenet_r"):
        scores(labelled)
    swatch(tmp_path / "pets" / "cat" / "x.jpg", 0)
    with pytest.raises(ConfigError, match="measured on ImageNet's classes, called n01440764, .*; not on 'cat'"):
        scores(tmp_path / "pets", imagenet_r=tmp_path)
