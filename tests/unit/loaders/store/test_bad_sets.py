"""What cannot be a set of images as it lies there: refused at the door, in one line that counts and names."""

import builtins
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest

from loaders.convert.conversion import Options, convert, prepare
from loaders.errors import StoreError
from loaders.store.beton import BetonFile
from loaders.store.data import open_data
from tests.support.imagenet_trees import encoded, folder_tree, tar_of
from tests.support.layouts import example_of, record_of, tiny_imagenet
from tests.unit.loaders.store.test_store import image_folder, save

JPG = encoded(0)


def refused(path, message):
    with pytest.raises(StoreError, match=message) as raised:
        open_data((str(path),))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.jpg": JPG, "a.cls": b"0", "b.jpg": JPG}, r"1 of 2 samples have no label, first s\.tar: b"),
        ({"a.jpg": JPG, "a.cls": b"0", "a.json": b'{"label": 1}'}, r"sample 'a' has 2 labels: 0, 1"),
        ({"x_1.0.jpg": JPG, "x_1.1.jpg": JPG, "x_1.cls": b"0"}, r"sample 'x_1' has 2 images .* ends at the first dot"),
        ({"a.jpg": JPG, "a.cls": b" "}, "a.cls: an empty label"),
        ({"a.jpg": JPG, "a.json": b"{"}, "a.json: not a label"),
        ({"a.txt": b"none"}, "no images in its shards; looked for fields jpg, jpeg, png, webp"),
    ],
)
def test_shards(tmp_path, members, message):
    (tmp_path / "s.tar").write_bytes(tar_of(members))
    refused(tmp_path, message)
    refused(tmp_path / "s.tar", message)


def test_a_shard_that_is_cut_is_named(tmp_path):
    data = tar_of({"a.jpg": JPG, "a.cls": b"0"})
    (tmp_path / "s.tar").write_bytes(data[:700])
    refused(tmp_path, r"s\.tar: cut short")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na.jpg,cat\ngone.jpg,dog\nlost.jpg,dog\n", r"2 of its 3 images are not in .*, first gone\.jpg"),
        ("path,label\ncat/b.jpg,cat\ndog/c.jpg,cat\n", r"1 labels contradict the folders .*, first dog/c\.jpg.* 'cat'"),
        ("path,label\na.jpg,cat\na.jpg,dog\n", r"1 lines name an image twice, first a\.jpg"),
        ("path,label\ncat/b.jpg,cat\ncat//b.jpg,cat\n", r"1 lines name an image twice, first cat/b\.jpg"),
        ("x,y,z\n1,2,3\n", "which columns are path and label"),
        ("path,label\na.jpg\n", r"1 lines lack a column, first 'a\.jpg'"),
        ("path,label\n", "names no image"),
    ],
)
def test_tables(tmp_path, text, message):
    for name in ("a.jpg", "cat/b.jpg", "dog/c.jpg"):
        save(tmp_path / name)
    if "contradict" in message:
        text += "dog/c2.jpg,dog\n"
        save(tmp_path / "dog" / "c2.jpg")
    (tmp_path / "t.csv").write_text(text)
    refused(tmp_path / "t.csv", message)


def test_annotations_that_name_absent_images(tmp_path):
    (tmp_path / "laid").mkdir()
    tiny_imagenet(folder_tree(tmp_path / "tree", 2, 2, 2), tmp_path / "laid")
    val = tmp_path / "laid" / "val" / "images"
    gone = sorted(val.iterdir())[:2]
    for path in gone:
        path.unlink()
    refused(tmp_path / "laid", rf"val_annotations\.txt: 2 of its 4 images are not in .*, first images/{gone[0].name}")


def test_a_beton_with_two_image_fields():
    fields = np.zeros(3, [("type_id", "u1"), ("name", "S16")])
    fields["type_id"], fields["name"] = (255, 1, 255), ("left", "label", "right")
    file = SimpleNamespace(path="two.beton")
    with pytest.raises(StoreError, match="has 2 fields that could be the image: left, right; write the one"):
        BetonFile._column(file, fields, 255, "image")
    fields["name"] = ("left", "label", "image")
    assert BetonFile._column(file, fields, 255, "image") == 2 and BetonFile._column(file, fields, 1, "y") == 1
    with pytest.raises(StoreError, match="has no name field"):
        BetonFile._column(file, fields, 6, "name")


def test_a_folder_on_which_one_has_no_right(tmp_path, monkeypatch):
    """Root may read all, so the system's answer is played."""
    image_folder(tmp_path / "set")
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("bee"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    refused(tmp_path / "set", r"bee: cannot be read: Permission denied")


def test_links_that_lead_nowhere_or_round(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    refused(tmp_path / "a", "a: no such file or folder")
    image_folder(tmp_path / "set")
    (tmp_path / "set" / "ant" / "gone.jpg").symlink_to(tmp_path / "nothing")
    (tmp_path / "set" / "bee" / "round").symlink_to(tmp_path / "set")
    data = open_data((str(tmp_path / "set"), "validation=none"))
    assert len(data.get("train")) == 4
    assert dict(data.left_out[str(tmp_path / "set")].listed) == {
        "ant/gone.jpg": "a link to nothing, or no regular file",
        "bee/round/": "a link to a folder that it lies in",
    }


# Parquet


def write_parquet(path, rows, label="label", names=("cat", "dog"), image="image"):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: the extra parquet")
    from pyarrow import parquet as pq

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {image: pa.array([{"bytes": data, "path": name} for data, name, _ in rows], kind)}
    if label:
        columns[label] = pa.array([number for *_, number in rows], pa.int64())
    about = json.dumps({"info": {"features": {label: {"names": list(names)}}}})
    pq.write_table(pa.table(columns).replace_schema_metadata({"huggingface": about}), path)


ROWS = [(JPG, "a.jpg", 0), (encoded(1), "b.jpg", 1)]


def prepared(path):
    return prepare(path, Options())


def test_parquet_without_the_columns_names_those_there_are(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: the extra parquet")
    from pyarrow import parquet as pq

    pq.write_table(pa.table({"picture": ["x"], "kind": [1]}), tmp_path / "a.parquet")
    with pytest.raises(StoreError, match=r"which column holds the images\?.* picture \(string\), kind \(int64\)"):
        prepared(tmp_path / "a.parquet")
    write_parquet(tmp_path / "a.parquet", ROWS, label="kind_id", names=())
    with pytest.raises(StoreError, match=r"which column holds the labels\? Call it label; found are image .*kind_id"):
        prepared(tmp_path / "a.parquet")


def test_parquet_rows_that_cannot_be_images(tmp_path):
    write_parquet(tmp_path / "a.parquet", [*ROWS, (None, "/elsewhere/c.jpg", 1)])
    with pytest.raises(StoreError, match=r"1 of 3 rows hold a path in place .*first a\.parquet: /elsewhere/c\.jpg"):
        prepared(tmp_path)
    write_parquet(tmp_path / "a.parquet", ROWS, names=("cat",))
    with pytest.raises(StoreError, match="labels beyond the 1 classes"):
        prepared(tmp_path)
    write_parquet(tmp_path / "a.parquet", ROWS)
    write_parquet(tmp_path / "b.parquet", ROWS, names=("cow", "dog"))
    with pytest.raises(StoreError, match=r"other columns or classes than a\.parquet"):
        prepared(tmp_path)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(StoreError, match=r"b\.parquet: damaged, or no parquet file"):
        prepared(tmp_path)


def test_parquet_without_pyarrow_says_what_is_missing(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    load = builtins.__import__

    def without(name, *arguments, **named):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return load(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(StoreError, match="parquet files need pyarrow: the extra parquet"):
        prepared(tmp_path / "a.parquet")


def test_parquet_that_was_half_converted_continues_to_the_same_bytes(tmp_path, monkeypatch):
    """Would catch bytes of one row given for another where row groups come and go between threads."""
    from loaders.store import parquet

    monkeypatch.setattr(parquet, "_GROUPS", 1)
    rows = [(encoded(k, height=20 + k), f"{k}.jpg", k % 2) for k in range(30)]
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: the extra parquet")
    from pyarrow import parquet as pq

    write_parquet(tmp_path / "one.parquet", rows)
    table = pq.read_table(tmp_path / "one.parquet")
    (tmp_path / "set").mkdir()
    for number in range(2):
        pq.write_table(table.slice(15 * number, 15), tmp_path / "set" / f"{number}.parquet", row_group_size=4)
    assert pa.__version__
    whole = convert(prepared(tmp_path / "set"), tmp_path / "whole")

    def stopped(what, done, total):
        if done > 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(prepared(tmp_path / "set"), tmp_path / "half", stopped)
    again = convert(prepared(tmp_path / "set"), tmp_path / "half")
    assert again["splits"] == whole["splits"]
    assert (tmp_path / "half" / "train.beton").read_bytes() == (tmp_path / "whole" / "train.beton").read_bytes()
    source = open_data((str(tmp_path / "half"), "validation=none")).get("train")
    assert [source.jpeg(i) for i in range(30)] == [data for data, _, _ in rows]
    assert source.labels.tolist() == [k % 2 for k in range(30)] and source.class_names == ("cat", "dog")


# TensorFlow Datasets' records


def write_records(folder, records, count=1):
    """Files of some records, and the names of two classes."""
    folder.mkdir(exist_ok=True)
    (folder / "label.labels.txt").write_text("cat\ndog\n")
    for k in range(count):
        (folder / f"set-train.tfrecord-{k:05}-of-{count:05}").write_bytes(b"".join(records[k::count]))
    return folder


def record(number, **features):
    return record_of(example_of(**{"image": encoded(number), "label": number % 2, **features}))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([record_of(example_of(picture=JPG, label=0))], r"record 0: which feature holds the image\?.* label, picture"),
        ([record(0), record_of(example_of(image=JPG, label=b"x"))], "record 1 has 0 labels"),
        ([record(0, label=7)], "labels beyond the 2 classes"),
        ([record_of(b"\x0a\xff")], "record 0 is no tf.train.Example"),
        ([record(0), record(1)[:-1]], r"00001: cut short at byte [\d,]+, record 1"),
        ([record(0), record(1)[:7]], "cut short"),
        ([record(0), b"\x09" + record(1)[1:]], "damaged, or no TFRecord file: no record's length at byte"),
        ([], "no records"),
    ],
)
def test_records(tmp_path, files, message):
    with pytest.raises(StoreError, match=message) as raised:
        prepared(write_records(tmp_path / "set", files))
    assert "\n" not in str(raised.value)


def test_a_record_that_is_not_what_its_sum_says_is_left_out_by_name(tmp_path):
    """Would catch a sum that is not looked at: the label of the second record would be another."""
    spoilt = bytearray(record(1))
    spoilt[-5] ^= 1
    folder = write_records(tmp_path / "set", [record(0), bytes(spoilt), record(2), record(3)])
    found = prepared(folder).splits["train"]
    assert [found.read(i) for i in range(3)] == [encoded(k) for k in (0, 2, 3)] and found.labels.tolist() == [0, 0, 1]
    assert found.ignored.listed == [
        ("set-train.tfrecord-00000-of-00001: record 1", "damaged: its sum is not that of its bytes")
    ]


def test_records_of_which_files_are_missing_or_of_another_kind(tmp_path):
    folder = write_records(tmp_path / "set", [record(k) for k in range(6)], count=3)
    (folder / "set-train.tfrecord-00001-of-00003").unlink()
    refused(folder, "converted first: fastssl convert-imagenet .* OUT")
    with pytest.raises(StoreError, match=r"1 of the 3 files that set-train.* is one of are missing, first number 1"):
        prepared(folder)
    (tmp_path / "versions").mkdir()
    for version in ("1.0.0", "2.0.0"):
        write_records(tmp_path / "versions" / version, [record(0)])
    with pytest.raises(StoreError, match=r"holds several sets; give one: .*1\.0\.0, .*2\.0\.0"):
        prepared(tmp_path / "versions")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "features.json").write_text("{}")
    (tmp_path / "other" / "set-train.array_record-00000-of-00001").write_bytes(b"x")
    with pytest.raises(StoreError, match="only plain tfrecord is read"):
        prepared(tmp_path / "other")
