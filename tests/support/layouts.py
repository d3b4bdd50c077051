"""One small set of images in every layout that people have: what `layouts` builds from a tree of
`tests.support.imagenet_trees`, by name."""

from __future__ import annotations

import csv
import io
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from loaders.convert.conversion import Options, convert, prepare
from tests.support.imagenet_trees import official_tree, tar_of

Builder = Callable[[Path, Path], tuple[str, ...]]
"""(tree, an empty folder) -> `--data` values"""


def as_png(tree: Path) -> None:
    """Make PNGs of all images, under their names."""
    for path in tree.glob("*/*/*"):
        buffer = io.BytesIO()
        Image.open(path).save(buffer, "PNG")
        path.write_bytes(buffer.getvalue())


def images(tree: Path, split: str) -> list[tuple[str, Path]]:
    """(class, file) of every image, by class and name."""
    return [(path.parent.name, path) for path in sorted((tree / split).glob("*/*"))]


def copied(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, to)


def folders(tree: Path, out: Path) -> tuple[str, ...]:
    shutil.copytree(tree, out, dirs_exist_ok=True)
    return (str(out),)


def nested(tree: Path, out: Path) -> tuple[str, ...]:
    for split, name in (("train", "training"), ("val", "valid")):
        for k, (wnid, path) in enumerate(images(tree, split)):
            copied(path, out / name / wnid / f"part{k % 2}" / path.name)
    return (str(out),)


def tiny_imagenet(tree: Path, out: Path) -> tuple[str, ...]:
    for wnid, path in images(tree, "train"):
        copied(path, out / "train" / wnid / "images" / path.name)
    lines = []
    for wnid, path in images(tree, "val"):
        copied(path, out / "val" / "images" / path.name)
        lines.append(f"{path.name}\t{wnid}\t0\t0\t9\t9\n")
    (out / "val" / "val_annotations.txt").write_text("".join(sorted(lines)))
    return (str(out),)


def kaggle(tree: Path, out: Path) -> tuple[str, ...]:
    folder, rows = out / "ILSVRC" / "Data" / "CLS-LOC", []
    shutil.copytree(tree / "train", folder / "train")
    for wnid, path in images(tree, "val"):
        copied(path, folder / "val" / path.name)
        rows.append(f"{path.stem},{wnid} 1 2 3 4 \n")
    (out / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(sorted(rows)))
    return (str(out),)


def official(tree: Path, out: Path) -> tuple[str, ...]:
    return (str(official_tree(out / "official", tree)),)


def class_archives(tree: Path, out: Path) -> tuple[str, ...]:
    (out / "train").mkdir()
    for folder in (tree / "train").iterdir():
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        (out / "train" / f"{folder.name}.tar").write_bytes(tar_of(files))
    shutil.copytree(tree / "val", out / "val")
    return (str(out),)


def table(tree: Path, out: Path) -> tuple[str, ...]:
    for split in ("train", "val"):
        with open(out / f"{split}.csv", "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label"])
            for wnid, path in images(tree, split):
                copied(path, out / "images" / path.name)
                writer.writerow([path.name, wnid])
    return str(out / "train.csv"), f"validation={out / 'val.csv'}"


def shards(tree: Path, out: Path) -> tuple[str, ...]:
    for split in ("train", "val"):
        for number, some in enumerate((images(tree, split)[::2], images(tree, split)[1::2])):
            files: dict[str, bytes] = {}
            for wnid, path in some:
                files |= {f"{path.stem}.jpg": path.read_bytes(), f"{path.stem}.cls": wnid.encode()}
            (out / f"set-{split}-{number:03}.tar").write_bytes(tar_of(files))
    return (str(out),)


def webdataset(tree: Path, out: Path) -> tuple[str, ...]:
    wds = pytest.importorskip("webdataset", reason="webdataset, whose shards these are, is not installed")
    for split in ("train", "val"):
        with wds.ShardWriter(f"{out}/set-{split}-%03d.tar", maxcount=5, verbose=0) as sink:
            for wnid, path in images(tree, split):
                about = json.dumps({"label": wnid, "caption": "a photograph"}).encode()
                sink.write({"__key__": path.stem, "jpg": path.read_bytes(), "json": about})
    return (str(out),)


def parquet(tree: Path, out: Path) -> tuple[str, ...]:
    """As datasets' to_parquet writes: the same columns and metadata, several row groups, two files."""
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed: the extra parquet")
    from pyarrow import parquet as pq

    classes = sorted(path.name for path in (tree / "train").iterdir())
    label = {"names": classes, "_type": "ClassLabel"}
    about = json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label}}})
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    (out / "data").mkdir()
    for split, name in (("train", "train"), ("val", "validation")):
        for number in range(2):
            some = images(tree, split)[number::2]
            rows = pa.array([{"bytes": path.read_bytes(), "path": path.name} for _, path in some], kind)
            columns = {"image": rows, "label": pa.array([classes.index(wnid) for wnid, _ in some], pa.int64())}
            file = out / "data" / f"{name}-{number:05}-of-00002.parquet"
            pq.write_table(pa.table(columns).replace_schema_metadata({"huggingface": about}), file, row_group_size=2)
    return (str(out),)


def datasets(tree: Path, out: Path) -> tuple[str, ...]:
    hf = pytest.importorskip("datasets", reason="datasets, which writes these files, is not installed")
    classes = sorted(path.name for path in (tree / "train").iterdir())
    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=classes)})
    for split, name in (("train", "train"), ("val", "test")):
        rows = images(tree, split)
        encoded = [{"bytes": path.read_bytes(), "path": None} for _, path in rows]
        made = hf.Dataset.from_dict({"image": encoded, "label": [classes.index(wnid) for wnid, _ in rows]}, features)
        made.to_parquet(out / f"{name}.parquet", batch_size=3)
    return (str(out),)


def record_of(payload: bytes) -> bytes:
    """A TFRecord, its sums computed bit by bit as RFC 3720 has them."""

    def masked(data: bytes) -> bytes:
        crc = 0xFFFFFFFF
        for byte in data:
            crc ^= byte
            for _ in range(8):
                crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        crc ^= 0xFFFFFFFF
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(payload))
    return length + masked(length) + payload + masked(payload)


def example_of(**features: bytes | int) -> bytes:
    """A tf.train.Example as protobuf writes it: map entries of a key and a BytesList or Int64List of one value."""

    def number(value: int) -> bytes:
        value &= (1 << 64) - 1
        groups = [value >> shift & 0x7F for shift in range(0, max(7, -(-value.bit_length() // 7) * 7), 7)]
        return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])

    def message(field: int, data: bytes) -> bytes:
        return bytes([field << 3 | 2]) + number(len(data)) + data

    entries = b""
    for name, value in features.items():
        kind = message(1, message(1, value)) if isinstance(value, bytes) else message(3, message(1, number(value)))
        entries += message(1, message(1, name.encode()) + message(2, kind))
    return message(1, entries)


def tfds(tree: Path, out: Path) -> tuple[str, ...]:
    """As TensorFlow Datasets lays them out: a folder of the version, two files of training images."""
    folder, classes = out / "5.1.0", sorted(path.name for path in (tree / "train").iterdir())
    folder.mkdir()
    (folder / "label.labels.txt").write_text("".join(f"{name}\n" for name in classes))
    kinds = {
        "image": "image_feature.Image",
        "label": "class_label_feature.ClassLabel",
        "file_name": "text_feature.Text",
    }
    described = {name: {"pythonClassName": f"tensorflow_datasets.core.features.{k}"} for name, k in kinds.items()}
    (folder / "features.json").write_text(json.dumps({"featuresDict": {"features": described}}))
    for split, name, count in (("train", "train", 2), ("val", "validation", 1)):
        for k in range(count):
            records = [
                record_of(example_of(file_name=path.name.encode(), image=path.read_bytes(), label=classes.index(wnid)))
                for wnid, path in images(tree, split)[k::count]
            ]
            (folder / f"set-{name}.tfrecord-{k:05}-of-{count:05}").write_bytes(b"".join(records))
    return (str(out),)


def betons(tree: Path, out: Path) -> tuple[str, ...]:
    convert(prepare(tree, Options()), out / "betons")
    return (str(out / "betons"),)


def raw_betons(tree: Path, out: Path) -> tuple[str, ...]:
    convert(prepare(tree, Options(raw=True)), out / "betons")
    return (str(out / "betons"),)


LAYOUTS: dict[str, Builder] = {
    builder.__name__: builder
    for builder in (
        folders, nested, tiny_imagenet, kaggle, official, class_archives, table, shards, webdataset, parquet, datasets,
        tfds, betons, raw_betons,
    )
}  # fmt: skip
CONVERTED_FIRST = ("parquet", "datasets", "tfds")
CONVERTED_ALREADY = ("betons", "raw_betons")
