"""Validation images that are among the others as well: found without reading a set, refused or told."""

import numpy as np
import pytest
from PIL import Image

from loaders.convert.conversion import Options, convert, prepare
from loaders.errors import StoreError
from loaders.store import apart
from loaders.store.apart import check_apart
from loaders.store.data import open_data
from loaders.store.folder import ListedSource


def photos(root, ids, classes=("cat", "dog")):
    """One image of noise for each of `ids`, the same bytes wherever it is written."""
    for i in ids:
        path = root / classes[i % len(classes)] / f"{root.name}_{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (20, 30, 3), np.uint8)
        Image.fromarray(pixels).save(path, quality=90)
    return root


def opened(**paths):
    return open_data([f"{key}={path}" for key, path in paths.items()])


@pytest.mark.parametrize("as_beton", [False, True])
def test_one_folder_in_both_roles_is_refused(tmp_path, as_beton):
    """Each image was its own neighbour: noise scored 64 to 78 %."""
    folder = photos(tmp_path / "all", range(12))
    if as_beton:
        convert(prepare(folder, Options()), tmp_path / "out")
    other = tmp_path / "out" / "train.beton" if as_beton else folder
    data = opened(labelled=folder, validation=other)
    with pytest.raises(StoreError, match="12 of 12 validation images are among the labelled images of"):
        check_apart(data)


def test_few_shared_images_are_told_and_more_refused(tmp_path):
    train, val = photos(tmp_path / "train", range(0, 300)), photos(tmp_path / "val", range(298, 498))
    (warning,) = check_apart(open_data((str(tmp_path),)))
    assert "2 of 200 validation images" in warning and "first cat/val_298.jpg, there cat/train_298.jpg" in warning
    photos(val, [297])
    with pytest.raises(StoreError, match="3 of 201 validation images are among the labelled images"):
        check_apart(open_data((str(tmp_path),)))
    photos(tmp_path / "few", range(600, 604))
    (warning,) = check_apart(opened(labelled=tmp_path / "few", unlabelled=train, validation=val))
    assert "3 of 201 validation images are among the unlabelled ones" in warning


def test_images_that_agree_in_bytes_and_sides_alone_are_not_one(tmp_path, monkeypatch):
    """Bitmaps of one size agree in both, and here in their names; and no file may be opened that agrees in neither."""
    for name, first in (("a", 0), ("b", 50)):
        for i in range(first, first + 5):
            path = tmp_path / name / "x" / f"{i - first}.bmp"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (30, 20), (i, 0, 0)).save(path)
    assert check_apart(opened(labelled=tmp_path / "a", validation=tmp_path / "b")) == []
    data = opened(labelled=photos(tmp_path / "c", range(40)), validation=photos(tmp_path / "d", range(40, 60)))
    common = set(data.get("labelled").num_bytes) & set(data.get("validation").num_bytes)
    read = []
    monkeypatch.setattr(ListedSource, "tail", lambda self, i, size: read.append(int(self.num_bytes[i])) or b"")
    monkeypatch.setattr(ListedSource, "jpeg", lambda self, i: pytest.fail("a whole image was read"))
    check_apart(data)
    assert set(read) == common and len(read) < 60 and apart.TAIL_BYTES == 4096


def test_what_was_held_out_of_a_set_with_images_twice_is_told(tmp_path):
    photos(tmp_path / "all", range(40))
    for i in range(20):
        file = tmp_path / "all" / ("cat", "dog")[i % 2] / f"all_{i}.jpg"
        file.with_name(f"again_{i}.jpg").write_bytes(file.read_bytes())
    data = open_data((str(tmp_path / "all"),))
    assert all("held out" in line or "validation" not in line for line in data.said)
    assert all("are among the labelled images" in warning for warning in check_apart(data))
