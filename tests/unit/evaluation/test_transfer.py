"""Sets to transfer to in their published layouts: the right split and class for every image, the right score."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from fastssl.errors import ConfigError
from fastssl.evaluation import divide, linear, load_protocol, transfer
from fastssl.evaluation.transfer import mean_per_class
from loaders.errors import StoreError
from loaders.plan.views import Rrc, View, Whole
from loaders.published.transfer import TRANSFERS, held_out
from loaders.store import cifar
from loaders.store.matlab import numbers, structs
from tests.support.swatches import FeaturesOnly, encoded, subject_of, swatch

VAL, TEST = {"green": 200}, {"blue": 200}  # marks of the split that an image belongs to
CLASSES = ("ash_tree", "birch", "cedar")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def rows(of_train=4, of_val=1, of_test=2):
    """(class, number within it, marks of its split) of every image, class by class."""
    kinds = [{}] * of_train + [VAL] * of_val + [TEST] * of_test
    return [(c, i, marks) for c in range(len(CLASSES)) for i, marks in enumerate(kinds)]


def write(path: Path, lines, header=()) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in (*header, *lines)))


def tree(root: Path, listed: Callable, images: Callable, lists: dict[str, list], val=0) -> Path:
    """Swatches at `images(class, i)`, and for each list file the lines `listed(class, i)` of the splits it names."""
    of_train = 4 if val else 5
    for c, i, marks in rows(of_train, val):
        swatch(root / images(c, i), c, **marks)
    for file, splits in lists.items():
        write(root / file, [listed(c, i) for c, i, marks in rows(of_train, val) if marks in splits])
    return root


def food101(root):
    return tree(
        root / "food-101",
        lambda c, i: f"{CLASSES[c]}/{1000 * c + i}",
        lambda c, i: f"images/{CLASSES[c]}/{1000 * c + i}.jpg",
        {"meta/train.txt": [{}], "meta/test.txt": [TEST]},
    )


def sun397(root):
    names = ("/a/abbey", "/b/bow_window/indoor", "/b/bow_window/outdoor")
    tree(
        root,
        lambda c, i: f"{names[c]}/sun_{c}{i}.jpg",
        lambda c, i: f"SUN397{names[c]}/sun_{c}{i}.jpg",
        {"Partitions/Training_01.txt": [{}], "Partitions/Testing_01.txt": [TEST]},
    )
    for i, form in enumerate(("GIF", "BMP", "PNG")):  # as some of the real ones are
        swatch(root / f"SUN397/a/abbey/sun_0{i}.jpg", 0, form=form)
    return root


def dtd(root):
    return tree(
        root / "dtd",
        lambda c, i: f"{CLASSES[c]}/{CLASSES[c]}_{i:04d}.jpg",
        lambda c, i: f"images/{CLASSES[c]}/{CLASSES[c]}_{i:04d}.jpg",
        {"labels/train1.txt": [{}], "labels/val1.txt": [VAL], "labels/test1.txt": [TEST]},
        val=1,
    )


def aircraft(root):
    variants = ("707-320", "A340-200", "Boeing 717")  # one with a space
    lists = {f"images_variant_{name}.txt": [marks] for name, marks in (("train", {}), ("val", VAL), ("test", TEST))}
    return tree(
        root / "fgvc-aircraft-2013b" / "data",
        lambda c, i: f"{c}{i:06d} {variants[c]}",
        lambda c, i: f"images/{c}{i:06d}.jpg",
        lists,
        val=1,
    ).parents[1]


def pets(root):
    return tree(
        root / "oxford-iiit-pet",
        lambda c, i: f"{CLASSES[c]}_{i} {c + 1} 1 {c + 1}",
        lambda c, i: f"images/{CLASSES[c]}_{i}.jpg",
        {"annotations/trainval.txt": [{}], "annotations/test.txt": [TEST]},
    )


def birdsnap(root):
    root = root / "birdsnap"
    for c, i, marks in rows(5, 0):
        if (c, i) != (1, 0):  # gone from the web
            swatch(root / f"download/images/{CLASSES[c]}/{i}.jpg", c, **marks)
    images = [f"http://x/{c}{i}.jpg\tmd5\t{CLASSES[c]}/{i}.jpg\t{c + 1}\t0\t0" for c, i, _ in rows(5, 0)]
    write(root / "images.txt", images, ["url\tmd5\tpath\tspecies_id\tbb_x1\tbb_y1"])
    write(root / "test_images.txt", [f"{CLASSES[c]}/{i}.jpg" for c, i, m in rows(5, 0) if m], ["path"])
    return root


def matlab(path: Path, **arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, arrays, do_compression=len(arrays) > 1)


def cars(root):
    for folder, file, of_test in (
        ("cars_train", "devkit/cars_train_annos.mat", False),
        ("cars_test", "cars_test_annos_withlabels.mat", True),
    ):
        chosen = [(c, marks) for c, _, marks in rows(5, 0) if (marks == TEST) == of_test]
        annotations = []
        for number, (c, marks) in enumerate(chosen, 1):
            swatch(root / folder / f"{number:05d}.jpg", c, **marks)
            annotations.append((39, 116, 569, 375, np.uint8(c + 14), f"{number:05d}.jpg"))
        fields = [(name, "O") for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname")]
        matlab(root / file, annotations=np.array(annotations, fields)[None])
    return root


def flowers(root):
    root = root / "flowers-102"
    shuffled = np.random.default_rng(0).permutation(len(rows()))
    ids = {"trnid": [], "valid": [], "tstid": []}
    labels = np.zeros(len(shuffled), np.uint8)
    for number, (c, _, marks) in zip((shuffled + 1).tolist(), rows(), strict=True):
        swatch(root / f"jpg/image_{number:05d}.jpg", c, **marks)
        labels[number - 1] = c + 1
        ids["valid" if marks == VAL else "tstid" if marks == TEST else "trnid"].append(number)
    matlab(root / "imagelabels.mat", labels=labels[None])
    matlab(root / "setid.mat", **{name: np.array([numbers], np.uint16) for name, numbers in ids.items()})
    return root.parent


READERS = {f.__name__: f for f in (food101, sun397, dtd, aircraft, pets, birdsnap, cars, flowers)}
PUBLISHED_VAL = {"dtd", "aircraft", "flowers"}


def colours(source) -> np.ndarray:
    """Mean colour of each image of a source, float [N, 3]."""

    def mean(i):
        with Image.open(io.BytesIO(source.jpeg(i))) as image:
            assert image.size == tuple(source.sizes[i][::-1])
            return np.asarray(image.convert("RGB")).reshape(-1, 3).mean(axis=0)

    return np.array([mean(i) for i in range(len(source))])


@pytest.mark.parametrize("key", READERS)
def test_every_image_is_in_its_split_with_its_class(key, tmp_path):
    """Catches lists read as another split's, lines shifted against labels, classes numbered apart in train and test,
    validation images tested on, numbers that count from 1."""
    data = TRANSFERS[key].open(READERS[key](tmp_path))
    learn, test = colours(data.learn), colours(data.test)
    assert (np.rint(learn[:, 0] / 20) == data.learn.labels).all() and (learn[:, 2] < 10).all()
    assert (np.rint(test[:, 0] / 20) == data.test.labels).all() and (test[:, 2] > 190).all()
    assert data.published == (key in PUBLISHED_VAL)
    if data.published:
        assert ((learn[:, 1] > 190) == data.is_val_N).all()
    assert np.bincount(data.learn.labels[data.is_val_N]).tolist() == [1, 1, 1]
    assert len(test) == 6 and len(learn) == (14 if key == "birdsnap" else 15)
    assert data.learn.class_names == data.test.class_names and data.learn.num_classes == 3


@pytest.mark.parametrize("lists", ["Partitions", "SUN397/Partitions", "SUN397"])
def test_suns_lists_are_found_wherever_they_are_unpacked(lists, tmp_path):
    """Catches a way to unpack that is not looked into, from the images' folder or from the one above it."""
    root = sun397(tmp_path / "sun")
    (root / "Partitions").rename(root / "away")
    (root / lists).mkdir(exist_ok=True)
    for file in (root / "away").iterdir():
        file.rename(root / lists / file.name)
    for path in (root, root / "SUN397"):
        data = TRANSFERS["sun397"].open(path)
        assert len(data.learn) == 15 and len(data.test) == 6
    for file in (root / lists).glob("*.txt"):
        file.unlink()
    with pytest.raises(StoreError, match=r"Training_01\.txt is missing; looked there, in Partitions/, in SUN397/"):
        TRANSFERS["sun397"].open(root)


def test_caltech_trains_on_thirty_of_each_of_its_classes_background_among_them(tmp_path):
    root = tmp_path / "101_ObjectCategories"
    for c, name in enumerate(("BACKGROUND_Google", "accordion")):
        for i in range(33 + c):
            swatch(root / name / f"image_{i + 1:04d}.jpg", c)
    (root / "BACKGROUND_Google" / "tmp").write_text("as published")
    data = TRANSFERS["caltech101"].open(tmp_path)
    assert np.bincount(data.learn.labels).tolist() == [30, 30] and np.bincount(data.test.labels).tolist() == [3, 4]
    assert np.bincount(data.learn.labels[data.is_val_N]).tolist() == [3, 3]
    seen = [{(s.labels[i], s.name_of(i)) for i in range(len(s))} for s in (data.learn, data.test)]
    assert len(seen[0] | seen[1]) == 67 and not seen[0] & seen[1]
    (tmp_path / "101_ObjectCategories" / "accordion" / "image_0001.jpg").rename(tmp_path / "away.jpg")
    for i in range(2, 6):
        (root / "accordion" / f"image_{i:04d}.jpg").unlink()
    with pytest.raises(StoreError, match="class 'accordion' has 29 images, 30 were asked for"):
        TRANSFERS["caltech101"].open(tmp_path)


def test_cifar100_has_its_fine_classes(tmp_path, monkeypatch):
    """Catches the coarse label, which stands first, and CIFAR-10's record length."""
    monkeypatch.setattr(cifar, "IMAGES_100", {"train.bin": 40, "test.bin": 20})
    folder = tmp_path / "cifar-100-binary"
    for file, count in cifar.IMAGES_100.items():
        records = np.zeros((count, 3074), np.uint8)
        records[:, 0], records[:, 1], records[:, 2] = 7, 50 + np.arange(count) % 2, np.arange(count)
        folder.mkdir(exist_ok=True)
        records.tofile(folder / file)
    write(folder / "fine_label_names.txt", [f"class{k}" for k in range(100)])
    data = TRANSFERS["cifar100"].open(tmp_path)
    assert data.learn.labels[:4].tolist() == [50, 51, 50, 51] and data.test.labels[:2].tolist() == [50, 51]
    assert data.learn.images[:3, 0, 0].tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0]]
    assert data.learn.class_names[50] == "class50" and data.is_val_N.sum() == 4
    (folder / "test.bin").write_bytes(b"\0" * 3073 * 20)
    with pytest.raises(StoreError, match=r"test\.bin: CIFAR-100's has 61,480 bytes, this one has 61,460"):
        TRANSFERS["cifar100"].open(tmp_path)


def test_cifar10_is_its_test_batch_and_a_tenth_of_training_to_choose_on(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "_IMAGES_A_FILE", 20)
    for k, file in enumerate((*cifar.TRAIN, *cifar.TEST)):
        records = np.zeros((20, 3073), np.uint8)
        records[:, 0], records[:, 1] = np.arange(20) % 10, k
        records.tofile(tmp_path / file)
    data = TRANSFERS["cifar10"].open(tmp_path)
    assert len(data.learn) == 100 and (data.test.images[:, 0, 0, 0] == 5).all()
    assert np.bincount(data.learn.labels[data.is_val_N]).tolist() == [1] * 10


def test_what_is_held_out_is_a_function_of_class_and_index():
    """Catches a validation split that moves with the number of classes or of images beside it."""
    labels = np.repeat([0, 1, 2, 3], [25, 40, 2, 1])
    held = held_out(labels)
    assert np.bincount(labels[held], minlength=4).tolist() == [2, 4, 1, 0]
    assert np.array_equal(held_out(labels[:65]), held[:65])


def test_what_is_missing_is_named(tmp_path):
    root = food101(tmp_path)
    (root / "images" / CLASSES[1] / "1006.jpg").unlink()
    with pytest.raises(StoreError, match=rf"food-101: 1 of 6 test images are missing, first images/{CLASSES[1]}/1006"):
        TRANSFERS["food101"].open(tmp_path)
    (root / "meta" / "test.txt").unlink()
    with pytest.raises(StoreError, match=r"meta/test\.txt: cannot be read: No such file"):
        TRANSFERS["food101"].open(tmp_path)
    with pytest.raises(StoreError, match=r"nowhere: meta/train\.txt is missing; looked there, in food-101/"):
        TRANSFERS["food101"].open(tmp_path / "nowhere")
    root = cars(tmp_path)
    (root / "cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(StoreError, match=r"cars_test_annos_withlabels\.mat is missing; looked there, in devkit/"):
        TRANSFERS["cars"].open(root)
    matlab(root / "devkit" / "cars_test_annos_withlabels.mat", other=np.zeros(3))
    with pytest.raises(StoreError, match=r"withlabels\.mat: no array of structs called 'annotations'"):
        TRANSFERS["cars"].open(root)


def test_an_image_to_learn_from_and_be_tested_on_is_refused(tmp_path):
    """Catches a test score of images that the classifier was trained on, or chosen by."""
    root = dtd(tmp_path)
    for i in (0, 4):  # of the training and of the validation split
        listed = (root / "labels/test1.txt").read_text()
        with open(root / "labels/test1.txt", "a") as file:
            file.write(f"cedar/cedar_{i:04d}.jpg\n")
        named = rf"dtd: the lists name images/cedar/cedar_{i:04d}\.jpg both to learn from and to be tested on"
        with pytest.raises(StoreError, match=named):
            TRANSFERS["dtd"].open(root)
        (root / "labels/test1.txt").write_text(listed)


def test_files_that_are_no_images_are_named(tmp_path):
    root = food101(tmp_path)
    bad = root / "images" / CLASSES[0] / "0.jpg"
    bad.write_bytes(b"<html>not found</html>")
    with pytest.raises(StoreError, match=r"0\.jpg: not a JPEG, PNG, WebP"):
        TRANSFERS["food101"].open(tmp_path)


def test_matlab_numbers_whatever_their_type_and_whatever_stands_before_them(tmp_path):
    """Catches an array of another kind or name that hides the one behind it; SciPy is the independent author."""
    wanted = np.array([[1, 500, 65535]])
    before = {"a": np.zeros((2, 2)), "s": np.array([(1.0, "x")], [("n", "O"), ("t", "O")])}
    for dtype in (np.uint8, np.uint16, np.int32, np.float32, np.float64):
        for compress in (False, True):
            file = io.BytesIO()
            scipy.io.savemat(file, {**before, "ids": wanted.astype(dtype)}, do_compression=compress)
            assert numbers(file.getvalue(), "ids").tolist() == wanted.astype(dtype)[0].tolist()
            assert structs(file.getvalue(), "s") == [{"n": 1.0, "t": "x"}]
    with pytest.raises(StoreError, match="no array of numbers called 's'"):
        numbers(file.getvalue(), "s")


# Scores


def test_mean_per_class_is_not_top1_where_classes_differ_in_size():
    """Catches one number reported for the other: a classifier that knows one class of two has 0.5, however many of the
    images are of that class. A class without test images counts neither way."""
    labels = torch.tensor([0, 0, 0, 3])
    assert mean_per_class(torch.tensor([0, 0, 0, 0]), labels) == 0.5
    assert mean_per_class(torch.tensor([0, 0, 1, 3]), labels) == pytest.approx((2 / 3 + 1) / 2)
    assert mean_per_class(torch.tensor([-1, 0, 0, 3]), labels) == pytest.approx((2 / 3 + 1) / 2)


def labelled_folder(root: Path) -> Path:
    for name in ("cat", "dog"):
        swatch(root / name / "x.jpg", 1)
    return root


def test_sets_are_learnt_and_tested_each_by_its_metric(tmp_path):
    """Catches classes of the run's own data in place of the set's, and a test score in place of the chosen metric."""
    sets = {key: READERS[key](tmp_path / key) for key in ("food101", "pets", "birdsnap")}
    for path in (tmp_path / "pets/oxford-iiit-pet/images").glob(f"{CLASSES[2]}_[56].jpg"):
        path.write_bytes(encoded(0, **TEST))  # both test images of the last class look like the first
    extra = tmp_path / "pets/oxford-iiit-pet"
    for i in range(7, 11):  # and the first class has more of them
        swatch(extra / f"images/{CLASSES[0]}_{i}.jpg", 0, **TEST)
    with open(extra / "annotations/test.txt", "a") as file:
        file.writelines(f"{CLASSES[0]}_{i} 1 1 1\n" for i in range(7, 11))

    found = transfer.evaluate(subject_of(labelled_folder(tmp_path / "own"), sets, FeaturesOnly))
    assert found["food101_top1"] == found["birdsnap_top1"] == 1.0
    assert found["pets_mean_per_class"] == pytest.approx(2 / 3)
    details = found["transfer"]
    assert details["pets"]["top1"] == pytest.approx(8 / 10)
    assert details["pets"]["solver"] == "l-bfgs" and details["pets"]["held_out"]["images"] == 3
    assert details["birdsnap"]["partial"] == "14 of 47386 and 6 of 2443 images"
    assert "dtd" in details["not_given"] and "pets" not in details["not_given"]
    assert np.prod([len(values) for values in details["paper_sweep_not_done"].values()]) == 12_000
    json.dumps(found, allow_nan=False)


def test_images_are_seen_to_the_edge(tmp_path):
    """Catches ImageNet's view, which scales to more than the crop and so cuts an edge off: only a red border of 2
    pixels in 42 tells the last class from the first, and that view cuts 4."""
    root = food101(tmp_path)
    for path in (root / "images" / CLASSES[2]).iterdir():
        swatch(path, 0, form="PNG", size=38, border=2)
    found = transfer.evaluate(subject_of(labelled_folder(tmp_path / "own"), {"food101": root}, FeaturesOnly))
    assert found["food101_top1"] == 1.0
    assert transfer.crop_of(View("eval", 32, Whole())) == Whole()
    assert transfer.crop_of(View("eval", 224, Rrc((0.1, 1.0)))) == Rrc((0.1, 1.0))


def test_what_is_measured_is_told_before_a_later_set_fails(tmp_path, capsys):
    """Catches a number that took hours and is lost with the next set, of which one image is damaged."""
    sets = {"food101": food101(tmp_path), "pets": pets(tmp_path)}
    (sets["pets"] / "images" / f"{CLASSES[0]}_6.jpg").write_bytes(encoded(0, form="PNG", size=38)[:60])
    with pytest.raises(StoreError, match=rf"1 of \d+ images images cannot be used, first .*{CLASSES[0]}_6.jpg of "):
        transfer.evaluate(subject_of(labelled_folder(tmp_path / "own"), sets, FeaturesOnly))
    assert capsys.readouterr() == ("", "food101_top1: 1.0000\n")


def test_sets_too_large_for_l_bfgs_are_learnt_with_several_decays(tmp_path, monkeypatch):
    """Catches SGD without weight decay, which the papers sweep."""
    monkeypatch.setattr(linear, "LARGEST_FOR_LBFGS", 0)
    found = transfer.evaluate(subject_of(labelled_folder(tmp_path / "own"), {"dtd": dtd(tmp_path)}, FeaturesOnly))
    about = found["transfer"]["dtd"]
    assert about["solver"] == "sgd" and about["chosen"].keys() == {"rate", "weight_decay"}
    assert "rate=0.1, weight_decay=0.0001" in about["held_out"]["top1"] and len(about["held_out"]["top1"]) == 13 * 4
    json.dumps(found, allow_nan=False)


def test_images_too_many_are_said_as_too_few_are(tmp_path, monkeypatch):
    """Catches a set that somebody added to, and that passes for the published one."""
    monkeypatch.setitem(TRANSFERS, "dtd", replace(TRANSFERS["dtd"], num_learn=15, num_test=5))
    found = transfer.evaluate(subject_of(labelled_folder(tmp_path / "own"), {"dtd": dtd(tmp_path)}, FeaturesOnly))
    assert found["transfer"]["dtd"]["partial"] == "15 of 15 and 6 of 5 images"


def test_the_last_training_takes_the_validation_images_too(tmp_path):
    """Catches a classifier of the training split alone: here one class has none but validation and test images."""
    root = dtd(tmp_path) / "labels"
    trained_on = (root / "train1.txt").read_text().split()
    write(root / "train1.txt", [line for line in trained_on if "cedar" not in line])
    write(root / "val1.txt", (root / "val1.txt").read_text().split() + [x for x in trained_on if "cedar" in x])
    found = transfer.evaluate(subject_of(labelled_folder(tmp_path / "own"), {"dtd": tmp_path}, FeaturesOnly))
    assert found["dtd_top1"] == 1.0
    chosen = found["transfer"]["dtd"]["held_out"]
    assert chosen["images"] == 7 and max(chosen["top1"].values()) == pytest.approx(2 / 7)


def test_grey_networks_refuse_colour_sets(tmp_path):
    subject = subject_of(labelled_folder(tmp_path / "own"), {"pets": pets(tmp_path)}, FeaturesOnly)
    object.__setattr__(subject.method.facts, "channels", 1)
    with pytest.raises(ConfigError, match=r"has images of 3 channels; the network takes images of 1"):
        transfer.evaluate(subject)


# Which values of --data mean which


def test_keys_are_divided_between_the_run_and_its_protocols():
    """Catches a misspelt set that is read as training images and then ignored."""
    protocols = [load_protocol(name) for name in ("transfer", "robustness", "knn")]
    own, sets = divide(("imagenet", "labelled=few", "dtd=a", "imagenet_c=b"), protocols)
    assert own == ("imagenet", "labelled=few") and sets == {"dtd": Path("a"), "imagenet_c": Path("b")}
    with pytest.raises(ConfigError, match="no protocol asks for 'food11'; did you mean 'food101'"):
        divide(("food11=a",), protocols)
    with pytest.raises(ConfigError, match="no protocol asks for 'dtd'"):
        divide(("dtd=a",), [load_protocol("knn")])
    with pytest.raises(ConfigError, match="dtd is given twice"):
        divide(("dtd=a", "dtd=b"), protocols)
