"""Images stored decoded: the same pixels as from their JPEGs, whoever renders them."""

import os
import resource
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from fastssl.commands.main import main
from fastssl.profiling.workload import Cycled
from loaders.convert import manifest
from loaders.convert.conversion import Options, convert, prepare
from loaders.convert.judge import Reencode
from loaders.convert.manifest import MANIFEST, read_manifest, verify
from loaders.errors import StoreError
from loaders.loader import Loader, bind
from loaders.plan.plan import Plan
from loaders.plan.views import Centre, Rrc, Shuffled, Stream, View
from loaders.renderers import turbo
from loaders.store.apart import check_apart
from loaders.store.beton import BetonSource
from loaders.store.data import open_data
from loaders.store.images import as_tiff, decode
from loaders.store.source import Concatenated
from loaders.store.staging import stage
from tests.support.imagenet_trees import encoded, folder_tree

VIEWS = (View("crop", 24, Rrc((0.2, 1.0)), copies=2), View("centre", 16, Centre(20)))


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(manifest, "_num_threads", lambda: 1)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """An image folder with grey, CMYK, PNG and rotated files, one that is cut short and one that is none."""
    root = folder_tree(tmp_path_factory.mktemp("tree"), 3)
    folder = sorted((root / "train").iterdir())[0]
    photo = Image.fromarray(np.random.default_rng(7).integers(0, 256, (40, 52, 3), np.uint8))
    photo.convert("L").save(folder / "grey.JPEG")
    photo.convert("CMYK").save(folder / "cmyk.JPEG")
    photo.save(folder / "png.JPEG", "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(folder / "turned.JPEG", exif=exif)
    whole = encoded(5, 30, 44)
    (folder / "cut.JPEG").write_bytes(whole[: len(whole) // 2])
    (folder / "none.JPEG").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def stores(tree, tmp_path_factory):
    """(as JPEG, as pixels): the folders that the conversion of `tree` makes."""
    out = tmp_path_factory.mktemp("stores")
    for name, raw in (("jpeg", False), ("raw", True)):
        convert(prepare(tree, Options(raw=raw)), out / name)
    return out / "jpeg", out / "raw"


def batches(path: Path, renderer: str, rank: int = 0, world: int = 1) -> list[np.ndarray]:
    plan = Plan((Stream("s", "train", VIEWS, Shuffled(), 4),), "s", seed=3)
    found = []
    with Loader(bind(plan, open_data((str(path),))), renderer=renderer, threads=1, rank=rank, world=world) as loader:
        for batch in loader.batches(0, 4):
            found += [batch.parts["s"].x[v.name].numpy().copy() for v in VIEWS]
            batch.release()
    return found


@pytest.mark.parametrize("renderer", ["turbo", "pil"])
def test_batches_are_those_of_the_jpegs(stores, renderer):
    """Catches other pixels than the JPEG store's: exchanged channels or sides, an odd file decoded another way."""
    expected, found = batches(stores[0], "pil"), batches(stores[1], renderer)
    assert len(expected) == 8 and all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batches_of_the_jpegs(stores, world):
    expected, shares = batches(stores[0], "pil"), [batches(stores[1], "turbo", rank, world) for rank in range(world)]
    for k, whole in enumerate(expected):
        copies = VIEWS[k % len(VIEWS)].copies
        parts = [share[k].reshape(copies, -1, *whole.shape[1:]) for share in shares]
        assert np.array_equal(np.concatenate(parts, axis=1).reshape(whole.shape), whole)


def test_a_camera_s_photo_has_a_page_that_holds_it(tmp_path):
    """72 MB decoded: more than any file may have that is stored as it is."""
    (tmp_path / "tree").mkdir()
    Image.new("RGB", (6000, 4000), (9, 99, 199)).save(tmp_path / "tree" / "photo.jpg")
    convert(prepare(tmp_path / "tree", Options(raw=True)), tmp_path / "out")
    source = BetonSource(tmp_path / "out" / "train.beton")
    assert source.is_raw.all() and source.read_pixels(0, np.empty(0, np.uint8)).shape == (4000, 6000, 3)


def test_what_is_stored_and_what_is_left_out(stores):
    """Catches an image in the set whose pixels nobody could decode, and sides that were not turned upright."""
    jpeg, raw = (BetonSource(path / "train.beton") for path in stores)
    assert raw.sizes.tolist() == jpeg.sizes.tolist() and raw.labels.tolist() == jpeg.labels.tolist()
    assert [raw.name_of(i) for i in range(len(raw))] == [jpeg.name_of(i) for i in range(len(jpeg))]
    assert [52, 40] in raw.sizes.tolist()
    for i in range(len(raw)):
        assert raw.num_bytes[i] == 3 * raw.sizes[i].prod()
        assert np.array_equal(np.asarray(decode(raw.jpeg(i))), np.asarray(decode(jpeg.jpeg(i))))
    said = read_manifest(stores[1])
    left_out = sorted(row["file"].rpartition("/")[2] for row in said["splits"]["train"]["quarantined"])
    assert left_out == ["cut.JPEG", "none.JPEG"] and said["options"]["pixels"] == "raw"
    assert raw.fingerprint() != jpeg.fingerprint()
    assert verify(stores[1]) == said


def test_a_damaged_byte_is_found(tree, tmp_path):
    convert(prepare(tree, Options(raw=True)), tmp_path)
    beton = BetonSource(tmp_path / "train.beton")
    with open(beton.path, "r+b") as file:
        file.seek(int(beton._jpeg_ptr[2]) + 10)
        file.write(b"\x01\x02\x03")
    with pytest.raises(StoreError, match="1 of .* images are damaged"):
        verify(tmp_path)


def test_turbo_cuts_from_the_buffer_that_was_read(stores, monkeypatch):
    """Catches a raw image that is copied, or decoded as the file that other renderers get."""
    monkeypatch.setattr(turbo, "decode_jpeg", None)
    monkeypatch.setattr(BetonSource, "jpeg", None)
    assert len(batches(stores[1], "turbo")) == 8
    source, buffer = BetonSource(stores[1] / "train.beton"), np.zeros(1 << 20, np.uint8)
    assert np.shares_memory(source.read_pixels(0, buffer), buffer)
    small = source.read_pixels(0, buffer[:5])
    assert small is not None and np.array_equal(small, source.read_pixels(0, buffer))


def test_joined_with_images_that_are_encoded(stores):
    jpeg, raw = (BetonSource(path / "train.beton") for path in stores)
    joined, buffer = Concatenated([jpeg, raw], jpeg.class_names), np.zeros(1 << 20, np.uint8)
    assert joined.read_pixels(0, buffer) is None
    assert np.array_equal(joined.read_pixels(len(jpeg), buffer), raw.read_pixels(0, buffer.copy()))


def test_a_raw_image_of_another_size_than_its_region_is_refused(stores, tmp_path):
    data = bytearray((stores[1] / "train.beton").read_bytes())
    row = 24 + 3 * 1041  # header, three fields
    (width,) = struct.unpack_from("<H", data, row + 1)
    struct.pack_into("<H", data, row + 1, width + 1)
    (tmp_path / "wrong.beton").write_bytes(data)
    with pytest.raises(StoreError, match=rf"raw image 0 of {width + 1} x \d+ has \d+ bytes, not 3 a pixel"):
        BetonSource(tmp_path / "wrong.beton")


def test_a_file_that_shrinks_is_an_error_and_not_a_crash(tree, tmp_path):
    convert(prepare(tree, Options(raw=True)), tmp_path)
    source = BetonSource(tmp_path / "train.beton")
    os.truncate(source.path, int(source._jpeg_ptr[1]) + 5)
    with pytest.raises(StoreError, match="became shorter while it was open: image 1 is gone"):
        source.read_pixels(1, np.empty(1 << 20, np.uint8))


def test_smaller_images_are_those_of_the_smaller_jpegs(tree, tmp_path):
    """And both say so where they are opened, so that nobody makes them smaller once more."""
    for name, raw in (("jpeg", False), ("raw", True)):
        convert(prepare(tree, Options(reencode=Reencode(80, 20), raw=raw)), tmp_path / name)
    jpeg, raw_source = (BetonSource(tmp_path / name / "train.beton") for name in ("jpeg", "raw"))
    assert jpeg.sizes.max() == 20 and raw_source.sizes.tolist() == jpeg.sizes.tolist()
    for i in range(len(jpeg)):
        assert np.array_equal(np.asarray(decode(jpeg.jpeg(i))), np.asarray(decode(raw_source.jpeg(i))))
    for name in ("jpeg", "raw"):
        how = "no side longer than 20, JPEG of quality 80"
        assert f": a folder of .beton files, pixels changed ({how}): " in open_data((str(tmp_path / name),)).said[0]
        with pytest.raises(StoreError, match=rf"nothing to convert: .* changed already \({how}\); --max-side, --pix"):
            prepare(tmp_path / name, Options(reencode=Reencode(80, 10)))


def test_a_fingerprint_tells_pixels_apart(stores, tree, tmp_path):
    """Catches one of sizes and labels alone: of images as large as others, or written anew at another quality, decoded
    ones have as many bytes."""
    fingerprints = {BetonSource(stores[1] / "train.beton").fingerprint()}
    for quality in (30, 90):
        convert(prepare(tree, Options(reencode=Reencode(quality, 1000), raw=True)), tmp_path / str(quality))
        source = BetonSource(tmp_path / str(quality) / "train.beton")
        assert source.sizes.tolist() == BetonSource(stores[1] / "train.beton").sizes.tolist()
        fingerprints.add(source.fingerprint())
    assert len(fingerprints) == 3


def test_plain_backgrounds_are_not_taken_for_the_same_images(tmp_path):
    """Different things on white, of one size: their last pixels are the same."""
    for split, first in (("train", 0), ("val", 10)):
        (tmp_path / "tree" / split / "thing").mkdir(parents=True)
        for i in range(first, first + 10):
            photo = np.full((64, 64, 3), 255, np.uint8)
            photo[8:24, 8:24] = 10 * i
            Image.fromarray(photo).save(tmp_path / "tree" / split / "thing" / f"{split}_{i}.png")
    convert(prepare(tmp_path / "tree", Options(raw=True)), tmp_path / "out")
    assert check_apart(open_data((str(tmp_path / "out"),))) == []
    again = [f"{key}={tmp_path / 'out' / 'train.beton'}" for key in ("labelled", "validation")]
    with pytest.raises(StoreError, match="10 of 10 validation images are among the labelled images"):
        check_apart(open_data(again))


def test_a_staged_copy_is_the_store(stores, tmp_path, monkeypatch):
    (copy,) = stage((str(stores[1]),), tmp_path / "local", lambda *_: None)
    there, here = (BetonSource(Path(folder) / "train.beton") for folder in (stores[1], copy))
    assert here.fingerprint() == there.fingerprint() and here.is_raw.all()
    assert all(here.stored(i) == there.stored(i) for i in range(len(there)))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    size = sum(file.stat().st_size for file in stores[1].glob("*.beton")) / 1e9
    with pytest.raises(StoreError, match=rf"{size:.1f} GB are needed, 0.0 GB are free: {size:.1f} GB are missing"):
        stage((str(stores[1]),), tmp_path / "elsewhere", lambda *_: None)


def test_a_profile_reads_pixels_as_training_does(stores):
    """Catches a measurement in which images that are stored decoded are decoded all the same."""
    jpeg, raw = (BetonSource(path / "train.beton") for path in stores)
    cycled, buffer = Cycled(raw, 3 * len(raw), 2), np.zeros(1 << 20, np.uint8)
    assert np.array_equal(cycled.read_pixels(len(raw) + 1, buffer), raw.read_pixels(1, buffer.copy()))
    assert Cycled(jpeg, 3, 2).read_pixels(0, buffer) is None


def test_a_file_system_without_large_files_says_so_before_the_first_image(tree, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    seen: list[tuple[str, int, int]] = []
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(StoreError, match=r"takes no file of [\d,]+ bytes, .*: File too large; choose a folder"):
            convert(prepare(tree, Options(raw=True)), tmp_path, lambda *said: seen.append(said))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert seen == []


def test_a_tiff_is_what_every_decoder_takes_it_for():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 3), np.uint8)
    assert np.array_equal(np.asarray(decode(as_tiff(pixels.tobytes(), 5, 9))), pixels)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--reencode", "90,512"], "--reencode QUALITY,MAX_SIDE is now --max-side N [--quality Q]"),
        (["--quality", "80"], "--quality 80 is that of images that are written anew: give --max-side too"),
    ],
)
def test_options_that_do_not_fit(tree, tmp_path, words, said):
    done = CliRunner().invoke(main, ["convert-imagenet", str(tree), str(tmp_path / "out"), *words])
    assert done.exit_code != 0 and said in done.output + str(done.exception)


def test_the_disk_is_said_before(tree, tmp_path):
    """Catches a raw store that is announced with the JPEGs' bytes."""
    done = CliRunner().invoke(main, ["convert-imagenet", str(tree), str(tmp_path), "--pixels", "raw", "--dry-run"])
    plan = prepare(tree, Options(raw=True))
    needed = sum(map(plan.bytes_needed, plan.splits))
    assert done.exit_code == 0 and f"needs {needed / 2**30:.2f} GiB" in done.output
    convert(plan, tmp_path / "out")
    written = sum(f.stat().st_size for f in (tmp_path / "out").iterdir() if f.name != MANIFEST)
    assert written <= needed <= 1.01 * written + 20_000


def test_threads_share_a_file(stores):
    source = BetonSource(stores[1] / "train.beton")
    with ThreadPoolExecutor(4) as pool:
        many = list(
            pool.map(lambda k: source.read_pixels(k % len(source), np.empty(1 << 20, np.uint8)).copy(), range(64))
        )
    for k, pixels in enumerate(many):
        assert np.array_equal(pixels, np.asarray(decode(source.jpeg(k % len(source)))))
