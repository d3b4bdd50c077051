"""One format, two programs: FFCV's own Reader and Loader open what we write, and we train from what FFCV writes."""

import hashlib
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fastssl.engine.join import facts_of
from fastssl.recipes.resolve import resolve
from loaders.convert.conversion import Options, convert, prepare
from loaders.convert.judge import Reencode
from loaders.loader import Loader, bind
from loaders.plan.plan import Plan
from loaders.plan.views import Balanced, Rrc, Sequential, Stream, View, Whole
from loaders.store.beton import BetonReader, BetonWriter
from loaders.store.data import NOTHING_HELD_OUT, open_data
from loaders.store.folder import FolderSource
from loaders.store.images import decode

pytest.importorskip("ffcv.libffcv", reason="the extra ffcv is not installed", exc_type=ImportError)

from ffcv.fields import BytesField, IntField, JSONField, RGBImageField  # noqa: E402
from ffcv.fields.basics import IntDecoder  # noqa: E402
from ffcv.fields.bytes import BytesDecoder  # noqa: E402
from ffcv.fields.rgb_image import SimpleRGBImageDecoder  # noqa: E402
from ffcv.libffcv import imdecode  # noqa: E402
from ffcv.loader import Loader as FfcvLoader  # noqa: E402
from ffcv.loader import OrderOption  # noqa: E402
from ffcv.reader import Reader  # noqa: E402
from ffcv.transforms import ToTensor  # noqa: E402
from ffcv.writer import DatasetWriter  # noqa: E402

HEIGHT, WIDTH, NUM = 48, 64, 11


def photograph(seed, height=HEIGHT, width=WIDTH):
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


FILES = [jpeg(photograph(i)) for i in range(NUM)]
LABELS = [i % 3 for i in range(NUM)]
NAMES = [f"n0000000{label}_{i}é.JPEG" for i, label in enumerate(LABELS)]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    path = tmp_path_factory.mktemp("ours") / "train.beton"
    with BetonWriter(path, NUM, ("cat", "dog", "eel")) as writer:
        for file, label, name in zip(FILES, LABELS, NAMES, strict=True):
            writer.add(file, label, name)
    return path


def test_ffcvs_reader_finds_our_bytes_labels_and_names(ours):
    reader = Reader(str(ours))
    assert reader.num_samples == NUM and reader.field_names == ["image", "label", "name"]
    handlers = list(reader.handlers.values())
    assert isinstance(handlers[0], RGBImageField) and isinstance(handlers[1], IntField)
    assert isinstance(handlers[2], BytesField)  # what FFCV makes of its own JSON fields
    assert reader.metadata["f1"].tolist() == LABELS
    data = ours.read_bytes()
    regions = {int(r["ptr"]): int(r["size"]) for r in reader.alloc_table}
    images = reader.metadata["f0"]
    assert images["mode"].tolist() == [0] * NUM
    assert images["width"].tolist() == [WIDTH] * NUM and images["height"].tolist() == [HEIGHT] * NUM
    assert [data[p : p + regions[p]] for p in images["data_ptr"].tolist()] == FILES
    names = [np.frombuffer(data, np.uint8, size, ptr) for ptr, size in reader.metadata["f2"].tolist()]
    assert [JSONField.unpack(name) for name in names] == NAMES


def test_ffcvs_loader_gives_the_same_pixels_labels_and_names(ours):
    """Pixels equal FFCV's own decode (fast DCT) of the original bytes: nothing was re-encoded or exchanged."""
    loader = FfcvLoader(
        str(ours),
        batch_size=4,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        drop_last=False,
        pipelines={
            "image": [SimpleRGBImageDecoder(), ToTensor()],
            "label": [IntDecoder(), ToTensor()],
            "name": [BytesDecoder()],
        },
    )
    images, labels, names = [], [], []
    for image, label, name in loader:
        images += [*image.numpy().copy()]
        labels += label.flatten().tolist()
        names += JSONField.unpack(name)
    assert labels == LABELS and names == NAMES
    for file, image in zip(FILES, images, strict=True):
        expected = np.empty((HEIGHT, WIDTH, 3), np.uint8)
        imdecode(np.frombuffer(file, np.uint8), expected, HEIGHT, WIDTH, HEIGHT, WIDTH)
        assert (image == expected).all()


class _Images:
    """What FFCV's writer indexes: images of several sizes, and labels."""

    def __len__(self):
        return NUM

    def __getitem__(self, i):
        return np.asarray(photograph(i, HEIGHT + i, WIDTH - i)), LABELS[i]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    path = tmp_path_factory.mktemp("theirs") / "train.beton"
    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=95), "label": IntField()}
    DatasetWriter(str(path), fields, page_size=1 << 21, num_workers=1).from_indexed_dataset(_Images(), chunksize=4)
    return path


def test_a_file_of_ffcvs_writer_is_read_here(theirs):
    reader = BetonReader(theirs)
    assert reader.labels.tolist() == LABELS
    assert reader.sizes.tolist() == [[HEIGHT + i, WIDTH - i] for i in range(NUM)]
    for i in range(NUM):
        pixels = np.asarray(Image.open(io.BytesIO(reader.jpeg(i))).convert("RGB")).astype(int)
        assert np.abs(pixels - np.asarray(photograph(i, HEIGHT + i, WIDTH - i))).mean() < 3


def test_ffcvs_raw_images_are_read_and_ours_by_ffcv(tmp_path):
    """Half raw, half JPEG, from FFCV's writer under other field names; and a raw file of ours, which says that its
    pixels were changed, through FFCV's Loader."""
    path = tmp_path / "mixed.beton"
    fields = {
        "picture": RGBImageField(write_mode="smart", smart_threshold=(HEIGHT + 3) * (WIDTH - 3) * 3, jpeg_quality=95)
    }
    fields["class"] = IntField()
    DatasetWriter(str(path), fields, page_size=1 << 21, num_workers=1).from_indexed_dataset(_Images(), chunksize=4)
    reader, buffer = BetonReader(path), np.empty(1 << 20, np.uint8)
    raw = [reader.read_pixels(i, buffer) is not None for i in range(NUM)]
    assert reader.labels.tolist() == LABELS and any(raw) and not all(raw)
    for i in np.flatnonzero(raw).tolist():
        assert np.array_equal(reader.read_pixels(i, buffer), np.asarray(photograph(i, HEIGHT + i, WIDTH - i)))
        assert np.array_equal(decode(reader.jpeg(i)), reader.read_pixels(i, buffer))

    for label in range(3):
        (tmp_path / "train" / f"class{label}").mkdir(parents=True)
    for i, file in enumerate(FILES):
        (tmp_path / "train" / f"class{LABELS[i]}" / f"{i:02}.jpg").write_bytes(file)
    convert(prepare(tmp_path / "train", Options(reencode=Reencode(90, 60), raw=True)), tmp_path / "out")
    ours = BetonReader(tmp_path / "out" / "train.beton")
    loader = FfcvLoader(
        str(ours.path), batch_size=1, num_workers=1, order=OrderOption.SEQUENTIAL,
        pipelines={"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()], "name": [BytesDecoder()]},
    )  # fmt: skip
    found = [np.asarray(image)[0].copy() for image, _, _ in loader]
    assert len(found) == NUM and ours.changed == "no side longer than 60, JPEG of quality 90"
    for i, image in enumerate(found):
        assert np.array_equal(image, decode(ours.jpeg(i)))


@pytest.mark.parametrize("renderer", ["pil", "turbo", "ffcv"])
def test_a_file_of_ffcvs_writer_trains_here(theirs, renderer):
    """A few steps of a linear classifier on labelled batches from it lower the loss."""
    views = (View("crop", 16, Rrc((0.8, 1.0))),)
    plan = Plan((Stream("s", "train", views, Balanced(3, 2), 6),), "s", seed=0)
    torch.manual_seed(0)
    model = torch.nn.Linear(3 * 16 * 16, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    losses = []
    with Loader(bind(plan, open_data((str(theirs), NOTHING_HELD_OUT))), renderer=renderer) as loader:
        for batch in loader.batches(0, 60):
            part = batch.parts["s"]
            assert part.labels.tolist() == [LABELS[i] for i in part.ids]
            loss = torch.nn.functional.cross_entropy(model(part.x["crop"].flatten(1)), part.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            batch.release()
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])


def test_a_pass_over_a_file_of_ffcvs_writer_meets_every_image_once(theirs):
    plan = Plan((Stream("s", "train", (View("whole", 8, Whole()),), Sequential(), 4),), "s", seed=0)
    bound = bind(plan, open_data((str(theirs), NOTHING_HELD_OUT)))
    with Loader(bound, renderer="ffcv") as loader:
        ids = [i for batch in loader.batches(0, bound.plan.num_steps("s")) for i in batch.parts["s"].ids.tolist()]
    assert ids == list(range(NUM))


PHOTOS, CLASSES = 32, 4
SMALL_PAWS = (
    "batch_global=2", "classes_global=2", "images_per_class=1", "global_view.size=48", "small_view.size=24",
)  # fmt: skip


class _Photos:
    """What FFCV's writer indexes: photographs decoded from the files `jpegs`, by class."""

    def __init__(self, jpegs):
        self.jpegs = jpegs

    def __len__(self):
        return len(self.jpegs)

    def __getitem__(self, i):
        return np.asarray(decode(self.jpegs[i])), i * CLASSES // PHOTOS


@pytest.fixture(scope="module")
def stores(test_data, tmp_path_factory):
    """Some of ImageNet's photographs three times: as FFCV's writer stores them, half of them decoded; all decoded; all
    as JPEGs. Those that it has encoded itself are its files, the others' are ImageNet's."""
    root, sample = tmp_path_factory.mktemp("photos"), FolderSource(test_data / "imagenet-sample")
    jpegs = [sample.jpeg(i) for i in range(0, 7 * PHOTOS, 7)]
    fields = {
        "image": RGBImageField(write_mode="proportion", compress_probability=0.5, jpeg_quality=90),
        "label": IntField(),
    }
    np.random.seed(0)  # which are decoded: the one worker is forked from here
    writer = DatasetWriter(str(root / "half.beton"), fields, num_workers=1)
    writer.from_indexed_dataset(_Photos(jpegs), chunksize=PHOTOS)
    half = BetonReader(root / "half.beton")
    assert PHOTOS // 4 < half.is_raw.sum() < 3 * PHOTOS // 4
    for i, label in enumerate(half.labels.tolist()):
        (root / "tree" / str(label)).mkdir(parents=True, exist_ok=True)
        file = jpegs[i] if half.is_raw[i] else half.jpeg(i)
        (root / "tree" / str(label) / f"{i:02}.jpg").write_bytes(file)
    for name in ("raw", "jpeg"):
        convert(prepare(root / "tree", Options(raw=name == "raw")), root / name)
    assert BetonReader(root / "raw" / "train.beton").is_raw.all()
    return {"half": root / "half.beton", "raw": root / "raw", "jpeg": root / "jpeg"}


def first_batches(store, renderer):
    """A digest of each of the first hundred of PAWS's batches on ImageNet: pixels, ids, labels and keys."""
    data = open_data((str(store), NOTHING_HELD_OUT))
    (stage,) = resolve("paws.rn50_100ep", SMALL_PAWS)
    plan = replace(stage.config, labels="all").build(facts_of(data, 0), {}).plan()
    with Loader(bind(plan, data), renderer=renderer) as loader:
        for batch in loader.batches(0, 100):
            found = hashlib.sha256()
            for part in batch.parts.values():
                for tensor in (*part.x.values(), part.ids, part.labels, part.keys):
                    found.update(tensor.contiguous().numpy())
            yield found.hexdigest()
            batch.release()


@pytest.fixture(scope="module")
def reference(stores):
    return list(first_batches(stores["jpeg"], "pil"))


@pytest.mark.parametrize("renderer", ["pil", "turbo", "ffcv"])
@pytest.mark.parametrize("store", ["half", "raw", "jpeg"])
def test_a_hundred_batches_are_the_same_from_every_store(store, renderer, stores, reference):
    """Catches an image that is stored decoded taken for another, or cut from a buffer of the one before."""
    assert len(set(reference)) == 100
    if (store, renderer) != ("jpeg", "pil"):
        assert list(first_batches(stores[store], renderer)) == reference
