"""Arrays as data: which are taken, that they are found again, and one line for what cannot be images."""

import subprocess
import sys

import numpy as np
import pytest

import fastssl
from fastssl.api.arrays import specs_of
from fastssl.errors import ConfigError
from loaders.errors import StoreError
from loaders.store.arrays import IMAGES
from loaders.store.data import open_data

IMAGES_NHWC = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        ([7, 3, 7, -1, 3, 3], ("3", "7"), [1, 0, 1, -1, 0, 0]),
        (["oak", "elm", "", "elm", "oak", "oak"], ("elm", "oak"), [1, 0, -1, 0, 1, 1]),
        (None, (), [-1] * 6),
    ],
)
def test_arrays_are_data_with_the_classes_of_their_labels(tmp_path, labels, names, numbers):
    (spec,) = specs_of(IMAGES_NHWC, labels, tmp_path)
    source = open_data((spec,)).get("train")
    assert np.array_equal(source.images, IMAGES_NHWC)
    assert source.class_names == names and source.labels.tolist() == numbers


def test_the_same_arrays_are_written_once_and_others_beside_them(tmp_path):
    """Data of an older run in the same folder overwritten."""
    first = specs_of(IMAGES_NHWC, [0] * 6, tmp_path)
    assert specs_of(IMAGES_NHWC.copy(), [0] * 6, tmp_path) == first
    assert specs_of(IMAGES_NHWC, [1] * 6, tmp_path) != first
    assert specs_of({"labelled": (IMAGES_NHWC, [0] * 6), "unlabelled": "/x"}, None, tmp_path) == (
        f"labelled={first[0]}",
        "unlabelled=/x",
    )


class DataFrame:
    shape = (6, 4)


@pytest.mark.parametrize(
    ("data", "labels", "said"),
    [
        (DataFrame(), None, "a DataFrame"),
        (IMAGES_NHWC.astype(np.float32), None, "a float32 array of shape"),
        (IMAGES_NHWC[0], None, r"shape \(5, 4, 3\)"),
        (IMAGES_NHWC.transpose(0, 3, 1, 2), None, r"\[N, height, width, 1 or 3\]"),
        (IMAGES_NHWC[:0], None, "no image"),
        (IMAGES_NHWC, [0, 1], "for each of 6 images"),
        (IMAGES_NHWC, np.linspace(0, 1, 6), "float64"),
    ],
)
def test_what_cannot_be_images_and_labels_is_one_line(tmp_path, data, labels, said):
    with pytest.raises(ConfigError, match=said) as error:
        specs_of(data, labels, tmp_path)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_damaged_arrays_are_named(tmp_path):
    (spec,) = specs_of(IMAGES_NHWC, None, tmp_path)
    np.save(f"{spec}/{IMAGES}", IMAGES_NHWC[:3])
    with pytest.raises(StoreError, match="not uint8"):
        open_data((spec,))


def test_importing_fastssl_imports_nothing_heavy():
    code = (
        "import time, sys; import fastssl; print(time.process_time(), 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    begun = "import time; print(time.process_time())"
    before = float(subprocess.run([sys.executable, "-c", begun], capture_output=True, text=True).stdout)
    cpu_s, torch, numpy = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
    assert (torch, numpy) == ("False", "False") and float(cpu_s) - before < 0.1


def test_names_that_are_not_there_are_an_attribute_error():
    assert set(fastssl.__all__) <= set(dir(fastssl))
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        _ = fastssl.fit
