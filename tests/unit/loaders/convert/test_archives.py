"""ImageNet's official archives: converted like the folders; what is hostile or damaged in them is survived."""

from __future__ import annotations

import contextlib
import io
import os
import random
import tarfile

import pytest

import loaders.convert.conversion as conversion
from loaders.convert.conversion import Options, prepare
from loaders.errors import StoreError
from loaders.store.beton import BetonReader
from loaders.store.imagenet import train_archive
from loaders.store.matlab import structs
from tests.support.conversions import (
    PHOTO,
    contents,
    one_thread,  # noqa: F401  (every test here uses it)
    patched,
    run,
)
from tests.support.imagenet_trees import (
    DEVKIT,
    TRAIN_TAR,
    VAL_TAR,
    add,
    devkit,
    encoded,
    folder_tree,
    official_tree,
    tar_of,
)


def test_official_archives_of_1000_classes_give_what_the_folders_give(tmp_path):
    """Labels by the development kit's ids, archives' order kept, or a nested offset wrong: any would change a byte."""
    folders = folder_tree(tmp_path / "folders", 1000, per_class=1)
    archives = official_tree(tmp_path / "archives", folders)
    one = run(folders, tmp_path / "a", decode_check=False)
    other = run(archives, tmp_path / "b", decode_check=False)
    assert one == other and contents(tmp_path / "a") == contents(tmp_path / "b")
    assert BetonReader(tmp_path / "b" / "val.beton").labels.tolist() == list(range(1000))


def test_development_kit_is_needed_and_checked(tmp_path):
    archives = official_tree(tmp_path / "archives", folder_tree(tmp_path / "folders", 2))
    good = (archives / DEVKIT).read_bytes()
    for broken, message in (
        (good[:-40], "damaged, or not a gzip file"),
        (b"nothing", "damaged, or not a gzip file"),
        (tar_of({"x/data/meta.mat": b""}, "w:gz"), "lacks data/meta.mat or"),
        (devkit({"n01440764": 1, "n01440771": 2}, [1, 3]), "names class b'3', which meta.mat lacks"),
        (devkit({"n01440764": 1, "n99999999": 2}, [1, 2]), "class 'n99999999' is not among"),
        (devkit({"n01440764": 1, "n01440771": 2}, [1]), "ILSVRC2012_val_00000002.JPEG has no line in the ground truth"),
    ):
        (archives / DEVKIT).write_bytes(broken)
        with pytest.raises(StoreError, match=message):
            prepare(archives, Options())
    (archives / DEVKIT).unlink()
    with pytest.raises(StoreError, match=r"devkit_t12\.tar\.gz: missing"):
        prepare(archives, Options())
    (archives / VAL_TAR).unlink()
    assert list(prepare(archives, Options()).splits) == ["train"]


def test_matlab_files_of_both_kinds_are_read():
    for compress in (True, False):
        with tarfile.open(fileobj=io.BytesIO(devkit({"n01440764": 2, "n01440771": 1}, [1], compress))) as kit:
            meta = kit.extractfile("ILSVRC2012_devkit_t12/data/meta.mat").read()
        rows = structs(meta, "synsets")
        assert [(row["ILSVRC2012_ID"], row["WNID"]) for row in rows[:2]] == [(2, "n01440764"), (1, "n01440771")]
        assert len(rows) == 5 and rows[0]["words"] == "a thing, a sort" and rows[0]["children"] is None
        with pytest.raises(StoreError, match="no array of structs called 'other'"):
            structs(meta, "other")
        rng = random.Random(1)
        for _ in range(200):
            bad = bytearray(meta)
            for _ in range(rng.choice((1, 4))):
                bad[rng.randrange(120, len(bad))] = rng.randrange(256)
            with contextlib.suppress(StoreError):
                structs(bytes(bad), "synsets")


def test_hostile_members_are_ignored_and_reported(tmp_path):
    """Names are matched and never become paths: nothing appears outside, and only real images are in the set."""
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w") as tar:
        add(tar, "n01440764_1.JPEG", encoded(1), mtime=1.5)  # an extended header before it
        add(tar, "./n01440764_2.JPEG", encoded(2))
        add(tar, "n01440764_1.JPEG", encoded(3))
        add(tar, "../../n01440764_3.JPEG", encoded(4))
        add(tar, "/tmp/n01440764_4.JPEG", encoded(5))
        add(tar, "n01440771_5.JPEG", encoded(6))
        add(tar, "n01440764_6.JPEG", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")
        add(tar, "n01440764_7.JPEG", b"", type=tarfile.LNKTYPE, linkname="n01440764_1.JPEG")
        add(tar, "n01440764_8.JPEG", b"", type=tarfile.CHRTYPE)
        add(tar, "n01440764_9.JPEG\n", encoded(7))
        add(tar, "a/" * 120 + "n01440764_10.JPEG", encoded(8))
    outer = {"n01440764.tar": inner.getvalue(), "../n01440765.tar": b"x", "n01440771.tar": tar_of({"x": b"y"})}
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / TRAIN_TAR).write_bytes(tar_of(outer))
    manifest = run(tmp_path / "src", tmp_path / "out")["splits"]["train"]
    reader = BetonReader(tmp_path / "out" / "train.beton")
    assert [reader.name(i) for i in range(len(reader))] == ["n01440764_1.JPEG", "n01440764_2.JPEG"]
    assert reader.jpeg(0) == encoded(1) and reader.class_names == ("n01440764",)  # the other class holds nothing
    assert [row["what"] for row in manifest["quarantined"]] == ["a second file of this name"]
    ignored = dict(manifest["ignored"]["first"])
    assert manifest["ignored"]["count"] == 11 == len(ignored)
    assert ignored["n01440764.tar: n01440764_6.JPEG"] == "a symbolic link"
    assert ignored["n01440764.tar: n01440764_7.JPEG"] == "a hard link"
    assert ignored["n01440764.tar: n01440764_9.JPEG\\n"] == "not named as an image of its class"
    assert sorted(os.listdir(tmp_path)) == ["out", "src"]


def test_member_too_large_is_quarantined_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "MAX_BYTES", 5000)
    files = {"n01440764_1.JPEG": encoded(1), "n01440764_2.JPEG": PHOTO + bytes(5000)}
    (tmp_path / TRAIN_TAR).write_bytes(tar_of({"n01440764.tar": tar_of(files)}))
    (row,) = run(tmp_path, tmp_path / "out")["splits"]["train"]["quarantined"]
    assert row["file"] == "n01440764/n01440764_2.JPEG" and "more than" in row["what"]


def test_damaged_archives_are_an_error_or_a_result(tmp_path):
    """A member of terabytes, a cut, and 300 archives with bytes changed: StoreError or a listing inside the file."""
    good = tar_of({"n01440764.tar": tar_of({f"n01440764_{k}.JPEG": encoded(k) for k in range(3)})})
    path = tmp_path / TRAIN_TAR

    def listed(data: bytes):
        path.write_bytes(data)
        return train_archive(tmp_path)

    assert len(listed(good)) == 3

    def resized(size: bytes) -> bytes:
        header = bytearray(patched(good, 512 + 124, size)[512:1024])
        header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
        return good[:512] + bytes(header) + good[1024:]

    for size in (b"77777777777\0", b"\x80" + b"\xff" * 11, b"-0000000001\0", b"zzzzzzzzzzz\0"):
        with pytest.raises(StoreError, match=r"cut short: a member of \d+ bytes"):
            listed(resized(size))
    with pytest.raises(StoreError, match="cut short"):
        listed(good[:3000])
    with pytest.raises(StoreError, match="no images of the names"):
        listed(bytes(10240))
    rng, refused = random.Random(0), 0
    for _ in range(300):
        bad = bytearray(good)
        for _ in range(rng.choice((1, 3))):
            bad[rng.choice((0, 512, 1024)) + rng.randrange(512)] = rng.randrange(256)
        try:
            listing = listed(bytes(bad))
            for i in range(len(listing)):
                listing.read(i)
        except StoreError:
            refused += 1
    assert 100 < refused < 300
