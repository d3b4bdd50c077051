"""Every layout and format through every door: the same classes, labels, ids and pixels from each."""

import base64
import io
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastssl.commands.contents import look
from loaders.convert import conversion
from loaders.convert.conversion import Options, convert, prepare
from loaders.errors import StoreError
from loaders.loader import Loader, bind
from loaders.plan.plan import Plan
from loaders.plan.views import UNIT, Sequential, Stream, View, Whole
from loaders.store.data import NOTHING_HELD_OUT, open_data
from loaders.store.openers import open_path
from tests.support.imagenet_trees import folder_tree
from tests.support.layouts import CONVERTED_ALREADY, CONVERTED_FIRST, LAYOUTS, as_png, images
from tests.unit.evaluation.test_evaluation import subject_of

SPLITS = {"train": "train", "validation": "val"}
VIEW = View("v", 8, Whole(), pixels=UNIT)
OPTIONAL = {"ffcv": "ffcv", "dali": "nvidia"}  # loaders by the package that they need
LOADERS = ("pil", "turbo", *(kind for kind, package in OPTIONAL.items() if find_spec(package)))


@pytest.fixture(scope="module", params=["JPEG", "PNG"])
def trees(request, tmp_path_factory):
    tree = folder_tree(tmp_path_factory.mktemp(request.param) / "tree", 3, 5, 2)
    if request.param == "PNG":
        as_png(tree)
    return request.param, tree


@pytest.fixture(params=LAYOUTS)
def row(request, trees, tmp_path):
    """(layout, format, tree, `--data` values)"""
    form, tree = trees
    (tmp_path / "laid").mkdir()
    return request.param, form, tree, LAYOUTS[request.param](tree, tmp_path / "laid")


def truth_of(tree):
    """By role: (class, bytes) of every image, sorted."""
    return {role: sorted((wnid, p.read_bytes()) for wnid, p in images(tree, split)) for role, split in SPLITS.items()}


def held(source):
    """(class, bytes) of every image in the order of ids."""
    return [(source.class_names[source.labels[i]], source.jpeg(i)) for i in range(len(source))]


def pixels_of(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((8, 8), Image.Resampling.BILINEAR)) / 255.0


def check_plan_and_embeddings(data, wanted, tolerance, most=None):
    """Every loader, and embeddings: ids in order, labels and pixels of those very images."""
    for role, truth in wanted.items():
        subject = subject_of(data, labels="all")
        features = subject.features("labelled" if role == "train" else role, "backbone")
        assert features.ids.tolist() == list(range(len(truth)))
        names = [data.get(role).class_names[k] for k in features.labels.tolist()]
        assert names == [name for name, _ in truth]
        for renderer in LOADERS:
            stream = Stream("s", role, (VIEW,), Sequential(), len(truth))
            with Loader(bind(Plan((stream,), "s", 0), data), renderer=renderer, threads=1) as loader:
                (batch,) = loader.batches(0, 1)
                part = batch.parts["s"]
                assert part.ids.tolist() == features.ids.tolist() and part.labels.tolist() == features.labels.tolist()
                shown = part.x["v"].permute(0, 2, 3, 1).numpy()
            for i, (_, encoded) in enumerate(truth[:most]):
                assert np.abs(shown[i] - pixels_of(encoded)).mean() < tolerance, (role, i, renderer)


@pytest.mark.parametrize("kind", OPTIONAL)
def test_every_loader_is_among_the_rows(kind):
    """Where this skips, `LOADERS` lacks that one in every row."""
    if kind not in LOADERS:
        pytest.skip(f"the extra {kind} is not installed")


def test_read_in_place(row):
    layout, _, tree, specs = row
    if layout in CONVERTED_FIRST:
        with pytest.raises(StoreError, match=r"converted first: fastssl convert-imagenet .* OUT"):
            open_data(specs)
        return
    data, wanted = open_data(specs), truth_of(tree)
    assert (
        data.get("train").class_names
        == data.get("validation").class_names
        == tuple(sorted({c for c, _ in wanted["train"]}))
    )
    found = {role: held(data.get(role)) for role in wanted}
    if layout not in CONVERTED_ALREADY or row[1] == "JPEG" and layout == "betons":
        assert {role: sorted(some) for role, some in found.items()} == wanted
    assert {role: sorted(c for c, _ in some) for role, some in found.items()} == {
        role: [c for c, _ in some] for role, some in wanted.items()
    }
    check_plan_and_embeddings(data, found, tolerance=0.01)


def test_converted(row, tmp_path):
    layout, form, tree, specs = row
    if layout in CONVERTED_ALREADY:
        with pytest.raises(StoreError, match="nothing to convert"):
            prepare(Path(specs[0]), Options())
        return
    wanted = truth_of(tree)
    roles = ("train",) if layout == "table" else ("train", "validation")
    manifest = convert(prepare(Path(specs[0]), Options()), tmp_path / "out")
    assert {name: said["quarantined"] for name, said in manifest["splits"].items()} == {SPLITS[r]: [] for r in roles}
    data = open_data((str(tmp_path / "out"), NOTHING_HELD_OUT))
    for role in roles:
        source = data.get(role)
        assert source.class_names == tuple(sorted({c for c, _ in wanted["train"]}))
        found = held(source)
        if form == "JPEG":
            assert sorted(found) == wanted[role]
            continue
        seen = {data: (c, pixels_of(data)) for c, data in wanted[role]}
        for c, encoded in found:  # a JPEG of quality 95: each is the one of its class that it looks like
            nearest = min(seen.values(), key=lambda each: np.abs(each[1] - pixels_of(encoded)).mean())
            assert nearest[0] == c and np.abs(nearest[1] - pixels_of(encoded)).mean() < 0.03


def test_looked_at(row):
    layout, form, tree, specs = row
    found, wanted = look(specs[0]), truth_of(tree)
    train = found.splits["train"]
    if layout == "table":  # alone, it has no validation images
        assert train.images + found.splits["validation"].images == 15
        return
    for role, split in found.splits.items():
        counts = [sum(c == name for c, _ in wanted[role]) for name in {c for c, _ in wanted[role]}]
        assert (split.images, split.classes, split.unlabelled) == (len(wanted[role]), 3, 0)
        assert (split.least, split.most) == (min(counts), max(counts))
        stored = {"betons": "JPEG", "raw_betons": "decoded"}.get(layout, form)
        assert split.formats == {stored: len(wanted[role])} and not split.damaged and not split.unreadable
    why_not = "fastssl convert-imagenet" if layout in CONVERTED_FIRST else "images to learn from are too few"
    assert found.command == "" and why_not in found.why_not


@pytest.mark.parametrize("layout", ["class_archives", "shards", "webdataset", *CONVERTED_FIRST])
def test_archives_that_were_half_converted_continue_to_the_same_bytes(layout, tmp_path, monkeypatch):
    """Would catch bytes of one member given for another where a conversion goes on in the middle of an archive."""
    monkeypatch.setattr(conversion, "COMMIT_S", 0.0)
    (tmp_path / "laid").mkdir()
    tree = folder_tree(tmp_path / "tree", 3, 20, 2)
    (source,) = LAYOUTS[layout](tree, tmp_path / "laid")
    convert(prepare(Path(source), Options()), tmp_path / "whole")
    for stop_at in (16, 40):

        def stopped(what, done, total, stop_at=stop_at):
            if what == "train" and done >= stop_at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(prepare(Path(source), Options()), tmp_path / "half", stopped)
    convert(prepare(Path(source), Options()), tmp_path / "half")
    for name in ("train.beton", "val.beton", "manifest.json"):
        assert (tmp_path / "half" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert held(open_data((str(tmp_path / "half"),)).get("train")) == held(open_path(source).train)


WRITTEN = """
kAAAAAAAAACWYzf9Co0BCg4KBWxhYmVsEgUaAwoBAQpbCgVpbWFnZRJSClAKTolQTkcNChoKAAAADUlIRFIAAAADAAAAAggCAAAAEhbxTQAAAB
VJREFUeJxjlJM7wcDAwMDAwMQAAwAR2gEIosVPVwAAAABJRU5ErkJgggoeCglmaWxlX25hbWUSEQoPCg1iZWVfdHJhaW4ucG5n6MVDTZAAAAAA
AAAAlmM3/QqNAQoOCgVsYWJlbBIFGgMKAQAKWwoFaW1hZ2USUgpQCk6JUE5HDQoaCgAAAA1JSERSAAAAAwAAAAIIAgAAABIW8U0AAAAVSURBVH
icYzwhJ8fAwMDAwMDEAAMAEy4BCGrAZWEAAAAASUVORK5CYIIKHgoJZmlsZV9uYW1lEhEKDwoNYW50X3RyYWluLnBuZ0+lA9o=
"""  # by tensorflow_datasets 4.9.10 with TensorFlow 2.21.0: tiny-train.tfrecord-00000-of-00001, two PNGs


def test_a_file_that_tensorflow_datasets_wrote(tmp_path):
    """Would catch a reader and a test's writer that misread the specification alike."""
    (tmp_path / "tiny-train.tfrecord-00000-of-00001").write_bytes(base64.b64decode(WRITTEN))
    (tmp_path / "label.labels.txt").write_text("ant\nbee\n")
    train = open_path(str(tmp_path)).train
    assert [train.name_of(i) for i in range(len(train))] == ["bee_train.png", "ant_train.png"]
    assert [train.class_names[label] for label in train.labels] == ["bee", "ant"]
    colours = [set(Image.open(io.BytesIO(train.jpeg(i))).getdata()) for i in range(2)]
    assert colours == [{(30, 30, 200)}, {(200, 30, 30)}]


@pytest.mark.parametrize("sample", ["tiny-imagenet-sample", "caltech101-sample"])
def test_real_sets(sample, tmp_path):
    folder = os.environ.get("FASTSSL_TEST_DATA")
    if not folder:
        pytest.skip(f"FASTSSL_TEST_DATA is not set: no {sample}")
    root = Path(folder) / sample
    if sample.startswith("tiny"):
        labelled = [line.split("\t")[:2] for line in (root / "val" / "val_annotations.txt").read_text().splitlines()]
        wanted = {
            "train": sorted((p.parent.parent.name, p.read_bytes()) for p in root.glob("train/*/images/*.JPEG")),
            "validation": sorted((wnid, (root / "val" / "images" / name).read_bytes()) for name, wnid in labelled),
        }
        assert (len(wanted["train"]), len(wanted["validation"])) == (2000, 1000)
    else:
        wanted = {"train": sorted((p.parent.name, p.read_bytes()) for p in root.glob("*/*.jpg"))}
        assert len(wanted["train"]) == 364
    data = open_data((str(root), NOTHING_HELD_OUT))
    found = {role: held(data.get(role)) for role in wanted}
    assert {role: sorted(some) for role, some in found.items()} == wanted
    check_plan_and_embeddings(data, found, tolerance=0.06, most=20)
    convert(prepare(root, Options(decode_check=False)), tmp_path / "out")
    converted = open_data((str(tmp_path / "out"), NOTHING_HELD_OUT))
    assert {role: held(converted.get(role)) for role in wanted} == found
    splits = look(str(root)).splits
    assert sum(split.images for split in splits.values()) == sum(map(len, wanted.values()))
    assert splits["train"].classes == len({c for c, _ in wanted["train"]}) and not splits["train"].damaged
