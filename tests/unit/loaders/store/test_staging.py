"""Staging: one copy a host, used again only while it is the source's, and nothing that could silently be stale."""

import io
import os
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from loaders.errors import StoreError
from loaders.store.beton import BetonWriter
from loaders.store.data import open_data
from loaders.store.staging import stage


def write_beton(path, num_images, seed=0):
    rng = np.random.default_rng(seed)
    with BetonWriter(path, num_images) as writer:
        for i in range(num_images):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).save(buffer, "JPEG")
            writer.add(buffer.getvalue(), i % 2, f"{i}.JPEG")


@pytest.fixture
def remote(tmp_path):
    folder = tmp_path / "remote"
    folder.mkdir()
    write_beton(folder / "train.beton", 8)
    write_beton(folder / "val.beton", 4, seed=1)
    return folder


class Copied:
    """Names the files that were really copied."""

    def __init__(self):
        self.names = []

    def __call__(self, name, done, total):
        if done == total:
            self.names.append(name)


def test_copies_are_made_once_and_read_the_same(remote, tmp_path):
    copied = Copied()
    specs = stage((str(remote), f"validation={remote / 'val.beton'}"), tmp_path / "local", copied)
    assert copied.names == ["train.beton", "val.beton", "val.beton"]
    assert specs[1].startswith("validation=")
    there, here = open_data((str(remote),)), open_data(specs[:1])
    assert here.get("train").fingerprint() == there.get("train").fingerprint()
    assert stage((str(remote),), tmp_path / "local", copied) == specs[:1]
    assert len(copied.names) == 3


def test_a_source_that_changed_is_copied_anew(remote, tmp_path):
    copied = Copied()
    stage((str(remote),), tmp_path / "local", copied)
    write_beton(remote / "train.beton", 8, seed=2)
    os.utime(remote / "train.beton", ns=(1, 1))
    (spec,) = stage((str(remote),), tmp_path / "local", copied)
    assert copied.names == ["train.beton", "val.beton", "train.beton"]
    assert open_data((spec,)).get("train").jpeg(3) == open_data((str(remote),)).get("train").jpeg(3)


def test_what_a_killed_copy_left_does_not_take_the_room_of_the_next(remote, tmp_path, monkeypatch):
    """Would catch a disk that has room for one copy, of which half is full of the copy that was killed."""
    stage((str(remote / "val.beton"),), tmp_path / "local", Copied())
    (place,) = (tmp_path / "local").iterdir()
    (place / "val.beton").unlink()
    remains = place / ".val.beton.partial"
    remains.write_bytes(bytes(1000))
    size = (remote / "val.beton").stat().st_size
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=size - 1000 * remains.exists()))
    copied = Copied()
    stage((str(remote / "val.beton"),), tmp_path / "local", copied)
    assert copied.names == ["val.beton"] and not remains.exists()


def test_a_copy_that_was_cut_short_is_not_taken_for_whole(remote, tmp_path):
    (spec,) = stage((str(remote),), tmp_path / "local", Copied())
    copy = tmp_path / "local" / os.path.basename(spec) / "train.beton"
    os.truncate(copy, 100)
    copied = Copied()
    stage((str(remote),), tmp_path / "local", copied)
    assert copied.names == ["train.beton"]


def test_processes_of_a_host_copy_once_between_them(remote, tmp_path):
    copied = Copied()
    with ThreadPoolExecutor(4) as pool:
        specs = set(pool.map(lambda _: stage((str(remote),), tmp_path / "local", copied), range(4)))
    assert len(specs) == 1 and sorted(copied.names) == ["train.beton", "val.beton"]


def test_what_cannot_be_staged_is_refused(remote, tmp_path, monkeypatch):
    with pytest.raises(StoreError, match="convert it first"):
        stage((str(tmp_path),), tmp_path / "local", Copied())
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(StoreError, match="GB are free"):
        stage((str(remote),), tmp_path / "local", Copied())
