"""What people really have in folders: odd formats and depths, photographs on their side, classes within classes, what
systems leave behind. Each case is read right, or counted and named."""

import io

import numpy as np
import pytest
from PIL import Image

from loaders.convert.conversion import Options, convert, prepare
from loaders.convert.judge import Outcome, judge
from loaders.errors import StoreError
from loaders.labels.subsets import resolve
from loaders.plan.views import Listed
from loaders.store.beton import BetonReader
from loaders.store.data import NOTHING_HELD_OUT, DataSpec, open_data
from loaders.store.folder import FolderSource
from loaders.store.images import ImageError, decode, header_of_bytes
from tests.support.imagenet_trees import tar_of
from tests.unit.loaders.store.test_store import save


def file_of(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def noise(seed: int, height: int = 12, width: int = 20) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (height // 4, width // 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def put(path, data: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# Odd pixels


def test_sixteen_bits_keep_their_high_byte_in_folder_and_converter_alike():
    """40 grey PNGs of 16 bits, as X-rays and microscopes give them, were one white image."""
    seen = set()
    for k in range(40):
        levels = (np.arange(48, dtype=np.uint32).reshape(6, 8) * 1300 + 700 * k).clip(0, 65535).astype(np.uint16)
        data = file_of(Image.fromarray(levels), "PNG")
        pixels = np.asarray(decode(data))
        assert (pixels == (levels >> 8)[..., None]).all()
        verdict = judge(data)
        assert verdict.outcome is Outcome.WAS_PNG and (verdict.height, verdict.width) == (6, 8)
        assert abs(np.asarray(decode(verdict.anew)).astype(int) - pixels).max() <= 6  # a JPEG of quality 95
        seen.add(pixels.tobytes())
    assert len(seen) == 40


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_lies_upright_from_a_folder_and_from_a_beton(tmp_path, orientation):
    """It lay sideways from a folder and upright from a .beton, and both could meet in one run."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    folder = tmp_path / "src" / "train" / "cat"
    for k in range(2):
        put(folder / f"{k}.jpg", file_of(noise(k), "JPEG", quality=95, subsampling=0, exif=exif if k else Image.Exif()))
    source = FolderSource(tmp_path / "src" / "train")
    upright = np.asarray(decode(source.jpeg(1))).astype(int)
    assert source.sizes.tolist() == [[12, 20], [20, 12] if orientation > 4 else [12, 20]]
    assert upright.shape[:2] == tuple(source.sizes[1])
    inverse = {6: 1, 8: -1}.get(orientation)
    if inverse is not None:
        assert (np.rot90(upright, inverse) == np.asarray(Image.open(io.BytesIO(source.jpeg(1))))).all()
    convert(prepare(tmp_path / "src", Options()), tmp_path / "out")
    beton = BetonReader(tmp_path / "out" / "train.beton")
    assert (beton.sizes == source.sizes).all()
    assert abs(np.asarray(decode(beton.jpeg(1))).astype(int) - upright).mean() < 12  # a JPEG of half the colours
    plain = tmp_path / "plain"
    for k in range(2):
        put(plain / "cat" / f"{k}.jpg", file_of(noise(k), "JPEG", quality=95, subsampling=0))
    assert (FolderSource(plain).fingerprint() == source.fingerprint()) == (orientation == 1)


@pytest.mark.parametrize("form", ["WEBP", "TIFF", "BMP", "GIF", "PNG"])
def test_other_formats_are_read_whatever_they_are_called(tmp_path, form):
    """They were left out without a word; a class of TIFFs alone became an empty class; a WebP called .jpg stopped."""
    data = file_of(noise(0), form)
    suffix = {"JPEG": "jpg", "TIFF": "tif"}.get(form, form.lower())
    put(tmp_path / "src" / "cat" / f"a.{suffix}", data)
    put(tmp_path / "src" / "cat" / "b.jpg", data)
    put(tmp_path / "src" / "dog" / "c.jpg", file_of(noise(1), "JPEG"))
    source = FolderSource(tmp_path / "src")
    assert source.class_names == ("cat", "dog") and source.labels.tolist() == [0, 0, 1] and not source.unreadable
    assert source.sizes.tolist() == [[12, 20]] * 3
    wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert (np.asarray(decode(source.jpeg(0))) == wanted).all()
    manifest = convert(prepare(tmp_path / "src", Options()), tmp_path / "out")
    assert [row["file"] for row in manifest["splits"]["train"]["odd"]] == [f"cat/a.{suffix}", "cat/b.jpg"]


def test_only_the_first_frame_is_read():
    frames = [noise(k).quantize(16) for k in range(3)]
    data = file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (np.asarray(decode(data)) == np.asarray(frames[0].convert("RGB"))).all()


@pytest.mark.parametrize(
    ("image", "form"),
    [
        (noise(0).convert("L"), "PNG"),
        (noise(0).convert("P"), "PNG"),
        (noise(0).convert("RGBA"), "PNG"),
        (noise(0).convert("LA"), "PNG"),
        (noise(0).convert("1"), "PNG"),
        (noise(0).convert("CMYK"), "JPEG"),
        (noise(0).convert("CMYK"), "TIFF"),
        (noise(0).convert("L"), "JPEG"),
    ],
)
def test_grey_palette_alpha_and_cmyk_become_rgb_as_pillow_has_it(image, form):
    data = file_of(image, form)
    wanted = Image.open(io.BytesIO(data)).convert("RGB")
    found = decode(data)
    assert found.mode == "RGB" and (np.asarray(found) == np.asarray(wanted)).all()
    assert judge(data).outcome.in_set


def tiff_of(channels: int, samples: np.ndarray) -> bytes:
    """A TIFF of chunky samples uint8 [H, W, C], with whatever is beyond three as extra samples."""
    height, width = samples.shape[:2]
    pixels = samples.tobytes()
    entries = [
        (256, 3, 1, width),
        (257, 3, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (277, 3, 1, channels),
        (278, 3, 1, height),
        (279, 4, 1, len(pixels)),
    ]
    table = len(entries).to_bytes(2, "little")
    for tag, kind, count, value in entries:
        table += tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + count.to_bytes(4, "little")
        table += value.to_bytes(4, "little")
    return b"II*\0" + (8 + len(pixels)).to_bytes(4, "little") + pixels + table + bytes(4)


def test_too_many_channels_are_refused_with_how_many_there_are():
    samples = np.random.default_rng(0).integers(0, 256, (6, 8, 7), np.uint8)
    data = tiff_of(7, samples)
    with pytest.raises(ImageError, match="7 channels.* 1.* 3.* 4"):
        decode(data)
    with pytest.raises(ImageError, match="7 channels"):
        header_of_bytes(data)
    assert judge(data).outcome is Outcome.DEEP
    with pytest.raises(ImageError, match="32 bits"):
        decode(file_of(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF"))


def test_forty_eight_bits_keep_the_high_byte(tmp_path):
    import zlib

    samples = np.random.default_rng(0).integers(0, 65536, (5, 7, 3)).astype(">u2")

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    header = (7).to_bytes(4, "big") + (5).to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    rows = b"".join(b"\0" + row.tobytes() for row in samples)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert (np.asarray(decode(data)) == samples.astype(np.uint16) >> 8).all()


# Folders


def test_images_deeper_in_a_class_are_taken_as_torchvision_takes_them(tmp_path):
    for k, path in enumerate(("dog/husky/1.jpg", "dog/2.jpg", "cat/a/b/3.jpg", "cat/1.jpg")):
        put(tmp_path / "train" / path, file_of(noise(k), "JPEG"))
    source = FolderSource(tmp_path / "train")
    assert source.class_names == ("cat", "dog")
    ours = [(source.path_of(i), int(source.labels[i])) for i in range(len(source))]
    assert ours == [("cat/1.jpg", 0), ("cat/a/b/3.jpg", 0), ("dog/2.jpg", 1), ("dog/husky/1.jpg", 1)]
    assert [source.name_of(i) for i in range(4)] == ["1.jpg", "a/b/3.jpg", "2.jpg", "husky/1.jpg"]
    manifest = convert(prepare(tmp_path, Options()), tmp_path / "out")
    beton = BetonReader(tmp_path / "out" / "train.beton")
    assert manifest["splits"]["train"]["images"] == 4
    assert [beton.name(i) for i in range(4)] == [source.name_of(i) for i in range(4)]
    assert [beton.jpeg(i) for i in range(4)] == [source.jpeg(i) for i in range(4)]


def test_what_systems_leave_behind_is_no_class_and_is_named(tmp_path):
    """They became classes; PAWS then asked for more labels of "class 0"."""
    put(tmp_path / "cat" / "1.jpg", file_of(noise(0), "JPEG"))
    put(tmp_path / "cat" / "@eaDir" / "1.jpg" / "SYNOPHOTO_THUMB_M.jpg", file_of(noise(0), "JPEG"))
    put(tmp_path / "@eaDir" / "x.jpg" / "SYNOPHOTO_THUMB_M.jpg", file_of(noise(0), "JPEG"))
    put(tmp_path / "__MACOSX" / "cat" / "._1.jpg", b"\0\5\x16\7")
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "dog").mkdir()
    put(tmp_path / "dog" / "notes.txt", b"none yet")
    put(tmp_path / "eel" / "1.jpg", file_of(noise(1), "JPEG"))
    data = open_data((str(tmp_path),))
    source = data.get("train")
    assert source.class_names == ("cat", "eel") and len(source) == 2
    left_out = dict(source.listing.ignored.listed)
    assert left_out["dog/"] == "a folder without images, so no class"
    assert {"@eaDir/", "__MACOSX/", "lost+found/", "cat/@eaDir/", "dog/notes.txt"} <= left_out.keys()
    assert "2 train images of 2 classes; 6 left out: " in data.said[0] and "@eaDir/" in data.said[0]


def test_a_link_loop_ends(tmp_path):
    put(tmp_path / "cat" / "1.jpg", file_of(noise(0), "JPEG"))
    (tmp_path / "cat" / "again").symlink_to(tmp_path / "cat")
    (tmp_path / "cat" / "up").symlink_to(tmp_path)
    source = FolderSource(tmp_path)
    assert len(source) == 1 and ("cat/again/", "a link to a folder that it lies in") in source.listing.ignored.listed


def test_a_single_image_is_refused_with_what_to_give(tmp_path):
    path = save(tmp_path / "cat.png")
    with pytest.raises(StoreError, match="a single image; give the folder that it lies in"):
        open_data((str(path),))


def test_values_of_data_are_parsed_once():
    spec = DataSpec("labelled=/a=b")
    assert (spec.key, spec.path) == ("labelled", "/a=b") and DataSpec(spec) == spec == "labelled=/a=b"
    assert (DataSpec("./a=b").key, DataSpec("./a=b").path) == (None, "./a=b")
    assert DataSpec("digits").is_embedded and DataSpec("validation=none").holds_nothing_out
    assert DataSpec("masks=x").at("/y") == "masks=/y" and DataSpec("x").at("/y") == "/y"


# Splits, however they are called


def photos(*paths):
    for k, path in enumerate(paths):
        put(path, file_of(noise(k), "JPEG"))


def sets(*specs):
    """{key: (paths, class names)}, and what is said of them."""
    data = open_data([str(spec) for spec in specs])
    found = {
        key: ([source.path_of(i) for i in range(len(source))], source.class_names)
        for key, source in data.sources.items()
    }
    return found, " ".join(data.said)


@pytest.mark.parametrize(
    ("train", "val"),
    [("Train", "Val"), ("Training", "Testing"), ("TRAIN", "test"), ("seg_train", "seg_test"), ("train_set", "val_set")],
)
def test_split_folders_are_no_classes_however_they_are_called(tmp_path, train, val):
    """`Training` and `Testing` were two classes, and the test images were trained on."""
    photos(*(tmp_path / split / c / "0.jpg" for split in (train, val) for c in ("cat", "dog")))
    classes = ("cat", "dog")
    assert sets(tmp_path)[0] == {key: (["cat/0.jpg", "dog/0.jpg"], classes) for key in ("train", "validation")}


def test_a_competitions_flat_train_and_test_are_no_classes(tmp_path):
    photos(tmp_path / "train" / "0.jpg", tmp_path / "test" / "1.jpg")
    found, said = sets(tmp_path)
    assert found == {"train": (["0.jpg"], ())} and "1 left out: test/" in said
    photos(*(tmp_path / "of vehicles" / c / "0.jpg" for c in ("bus", "train", "test tube")))
    assert sets(tmp_path / "of vehicles", NOTHING_HELD_OUT)[0]["train"][1] == ("bus", "test tube", "train")


def test_beton_files_are_of_the_split_that_their_names_say(tmp_path):
    """All but `val.beton` was trained on: `validation.beton`, and FFCV's `val_500_0.50_90.beton`."""
    for split in ("train", "val"):
        photos(tmp_path / "set" / split / "cat" / f"{split}.jpg")
    convert(prepare(tmp_path / "set", Options()), tmp_path / "out")
    for train, others in (("train_500", ["val_500"]), ("a", ["validation"]), ("train", ["val", "test"])):
        there = tmp_path / train
        put(there / f"{train}.beton", (tmp_path / "out" / "train.beton").read_bytes())
        for name in others:
            put(there / f"{name}.beton", (tmp_path / "out" / "val.beton").read_bytes())
        photos(there / "cat" / "0.jpg")
        found, said = sets(there)
        assert found == {"train": (["cat/train.jpg"], ("cat",)), "validation": (["cat/val.jpg"], ("cat",))}
        assert ("test.beton (of a test set)" in said) == ("test" in others)
        assert "cat/ (a folder of images beside the .beton files)" in said


def test_the_archive_that_image_folders_were_unpacked_from_is_left_out(tmp_path):
    """`images.tar` beside `train/` and `val/`, or beside classes, was taken for shards without labels."""
    photos(*(tmp_path / "set" / c / "0.jpg" for c in ("cat", "dog")))
    for classes in (tmp_path / "set", tmp_path / "split"):
        if classes.name == "split":
            photos(classes / "train" / "cat" / "0.jpg", classes / "val" / "cat" / "1.jpg")
        put(classes / "images.tar", tar_of({"cat/0.jpg": b"?"}))
        put(classes / "index.parquet", b"?")
        found, said = sets(classes, NOTHING_HELD_OUT)
        assert "cat/0.jpg" in found["train"][0] and "2 left out: images.tar" in said


def test_shards_in_split_folders_of_either_case(tmp_path):
    """Those in `Testing/` were not seen."""
    for name in ("training", "Testing"):
        put(tmp_path / name / "0.tar", tar_of({f"{name}.jpg": file_of(noise(0), "JPEG"), f"{name}.cls": b"3"}))
    assert {key: paths for key, (paths, _) in sets(tmp_path)[0].items()} == {
        "train": ["training.jpg"],
        "validation": ["Testing.jpg"],
    }


def test_a_table_that_says_splits_is_divided(tmp_path):
    """The test images of a table of all were trained on."""
    photos(*(tmp_path / f"{k}.jpg" for k in range(4)))
    table = tmp_path / "all.csv"
    rows = "path,label,Data set\n0.jpg,cat,train\n1.jpg,dog,train\n2.jpg,dog,{}\n3.jpg,cat,test\n"
    table.write_text(rows.format("valid"))
    found, said = sets(table)
    classes = ("cat", "dog")
    assert found["train"] == (["0.jpg", "1.jpg"], classes) and found["validation"] == (["2.jpg"], classes)
    assert "1 left out: 3.jpg (of a test set)" in said
    table.write_text(rows.format("train"))
    assert sets(table)[0]["validation"] == (["3.jpg"], classes)
    table.write_text(rows.format("fold 3"))
    with pytest.raises(StoreError, match="its column 'Data set' says 'fold 3', which is neither train, val nor test"):
        sets(table)


def test_a_set_given_twice_is_refused(tmp_path):
    """Its images counted twice, and the half of them that was held out stood among those learnt from."""
    photos(*(tmp_path / split / "cat" / f"{split}.jpg" for split in ("train", "val")))
    (tmp_path / "link").symlink_to(tmp_path / "train")
    for twice in (f"{tmp_path}/", tmp_path / "train", tmp_path / "link"):
        with pytest.raises(StoreError, match="given twice as train images, first .*/train/cat/train.jpg"):
            sets(tmp_path, twice)
    for k in range(2):
        photos(tmp_path / f"{k}.jpg")
        (tmp_path / f"{k}.csv").write_text(f"path,label\n{k}.jpg,cat\n")
    assert sets(*(tmp_path / f"{k}.csv" for k in range(2)), NOTHING_HELD_OUT)[0]["train"][0] == ["0.jpg", "1.jpg"]


# Label lists


@pytest.mark.parametrize(
    "written",
    ["cat/1.jpg\ndog/2 of 2.jpg\n", "﻿cat/1.jpg\r\ndog/2 of 2.jpg\r\n", "/data/train/cat/1.jpg\ntrain/dog/2 of 2.jpg"],
)
def test_a_line_of_a_list_is_one_image_with_its_folder(tmp_path, written):
    """Lines were split at spaces, folders in them ignored, and a byte order mark was kept in the first name."""
    for k, path in enumerate(("cat/1.jpg", "cat/2 of 2.jpg", "dog/1.jpg", "dog/2 of 2.jpg")):
        put(tmp_path / "set" / path, file_of(noise(k), "JPEG"))
    (tmp_path / "list.txt").write_bytes(written.encode())
    source = FolderSource(tmp_path / "set")
    assert resolve(Listed(str(tmp_path / "list.txt")), source).ids.tolist() == [0, 3]
    (tmp_path / "list.txt").write_text("cat/1.jpg\ncow/2 of 2.jpg\n")
    with pytest.raises(StoreError, match="1 of its 2 images are not in .*, first cow/2 of 2.jpg"):
        resolve(Listed(str(tmp_path / "list.txt")), source)
    (tmp_path / "list.txt").write_text("1.jpg\n")
    with pytest.raises(StoreError, match=r"several images called 1\.jpg: which is meant\? Write class/name"):
        resolve(Listed(str(tmp_path / "list.txt")), source)


def test_a_folder_in_a_list_means_the_class_also_where_classes_are_numbers(tmp_path):
    """`10/1.jpg` was refused as one of several, or was the image of another number."""
    photos(*(tmp_path / "set" / path for path in ("1/0.jpg", "10/0.jpg", "10/1.jpg")))
    source = FolderSource(tmp_path / "set")
    (tmp_path / "list.txt").write_text("10/0.jpg\n/data/train/10/1.jpg\n")
    assert resolve(Listed(str(tmp_path / "list.txt")), source).ids.tolist() == [1, 2]
    (tmp_path / "list.txt").write_text("1/1.jpg\n")
    with pytest.raises(StoreError, match="1 of its 1 images are not in .*, first 1/1.jpg"):
        resolve(Listed(str(tmp_path / "list.txt")), source)


# Damage that headers show


def test_all_that_cannot_be_used_is_found_at_once(tmp_path):
    """One file a try: an empty file, a page of HTML, a panorama of 72 megapixels; a WebP called .jpg is read."""
    put(tmp_path / "cat" / "0.jpg", file_of(noise(0), "JPEG"))
    put(tmp_path / "cat" / "empty.jpg", b"")
    put(tmp_path / "cat" / "page.jpg", b"<html>not found</html>")
    put(tmp_path / "cat" / "panorama.png", file_of(Image.new("1", (12_000, 6_000)), "PNG"))
    put(tmp_path / "cat" / "webp.jpg", file_of(noise(1), "WEBP"))
    source = FolderSource(tmp_path)
    assert source.unreadable == {
        1: "it is empty",
        2: "not a JPEG, PNG, WebP, TIFF, BMP or GIF",
        3: f"12000 x 6000 pixels are more than the {1 << 26} allowed",
    }
    assert [path for _, path, _ in open_data((str(tmp_path), NOTHING_HELD_OUT)).unreadable()] == [
        "cat/empty.jpg",
        "cat/page.jpg",
        "cat/panorama.png",
    ]
