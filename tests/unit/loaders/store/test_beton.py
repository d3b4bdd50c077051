"""The `.beton` file: FFCV's layout to the byte, round trips, and that damage is an error in words, never a crash."""

import io
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loaders.errors import StoreError
from loaders.store.beton import BetonReader, BetonWriter

PAGE = 1 << 21
LABELS = [1, 0, -1, 1]
NAMES = ["n02_7.JPEG", "n01_1.JPEG", 'odd "name" é.JPEG', "n02_8.JPEG"]
CLASSES = ("n01", "n02")
HEADER, FIELD = 24, 1041
ROW = 40  # image 13 bytes, padded to 16; label 8; name 16


def jpeg(height: int, width: int, mode: str = "RGB", seed: int = 0) -> bytes:
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    pixels = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


JPEGS = [jpeg(9, 13), jpeg(20, 7, "L"), jpeg(5, 5, seed=1), jpeg(31, 33, seed=2)]
SIZES = [[9, 13], [20, 7], [5, 5], [31, 33]]


def write(path, jpegs=JPEGS, labels=LABELS, names=NAMES, classes=CLASSES):
    with BetonWriter(path, len(jpegs), classes, page_size=PAGE) as writer:
        for data, label, name in zip(jpegs, labels, names, strict=True):
            writer.add(data, label, name)
    return path


@pytest.fixture
def beton(tmp_path):
    return write(tmp_path / "set.beton")


def test_round_trip_keeps_every_byte_label_size_and_name(beton):
    reader = BetonReader(beton)
    assert len(reader) == 4
    assert [reader.jpeg(i) for i in range(4)] == JPEGS
    assert reader.labels.dtype == np.int64 and reader.labels.tolist() == LABELS
    assert reader.sizes.dtype == np.int32 and reader.sizes.tolist() == SIZES
    assert [reader.name(i) for i in range(4)] == NAMES
    assert reader.class_names == CLASSES and reader.num_classes == 2


def test_layout_is_ffcvs_version_2(beton):
    """A misplaced field would read well here and nowhere else: parse with FFCV's numbers, not with our types."""
    data = beton.read_bytes()
    version, num_fields, page_size, num_samples, table_ptr = struct.unpack_from("<HHIQQ", data)
    assert (version, num_fields, page_size, num_samples) == (2, 3, PAGE, 4)
    fields = [struct.unpack_from("<B16s", data, HEADER + k * FIELD) for k in range(3)]
    assert [(t, name.rstrip(b"\0")) for t, name in fields] == [(2, b"image"), (1, b"label"), (5, b"name")]
    regions = {ptr: size for _, ptr, size in struct.iter_unpack("<QQQ", data[table_ptr:])}
    assert len(regions) == 8 and min(regions) == PAGE
    for i in range(4):
        row = HEADER + 3 * FIELD + i * ROW
        mode, width, height, ptr = struct.unpack_from("<BHHQ", data, row)
        (label,) = struct.unpack_from("<q", data, row + 16)
        name_ptr, name_size = struct.unpack_from("<QQ", data, row + 24)
        assert (mode, [height, width], label) == (0, SIZES[i], LABELS[i])
        assert data[ptr : ptr + regions[ptr]] == JPEGS[i]
        assert regions[name_ptr] == name_size
        text = data[name_ptr : name_ptr + name_size]
        assert text[-1:] == b"\0" and json.loads(text[:-1]) == NAMES[i]


def test_no_region_straddles_a_page(tmp_path):
    """FFCV's page cache reads a region out of one page; one across two would be read wrongly."""
    padded = [jpeg(8, 8) + bytes(700_000 + 1000 * i) for i in range(7)]  # bytes after the end marker are allowed
    path = write(tmp_path / "pages.beton", padded, [0] * 7, [f"{i}.JPEG" for i in range(7)], ("a",))
    reader = BetonReader(path)
    assert [reader.jpeg(i) for i in range(7)] == padded
    starts = reader._jpeg_ptr // PAGE
    ends = (reader._jpeg_ptr + reader._jpeg_size - 1) // PAGE
    assert (starts == ends).all() and starts.tolist() == [1, 1, 2, 2, 3, 3, 4]


def test_file_appears_only_when_complete(tmp_path):
    path = tmp_path / "set.beton"
    with pytest.raises(StoreError, match="1 of the 2 announced"), BetonWriter(path, 2, page_size=PAGE) as writer:
        writer.add(JPEGS[0], 0, "a.JPEG")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), BetonWriter(path, 1, page_size=PAGE) as writer:
        writer.add(JPEGS[0], 0, "a.JPEG")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("data", "label", "message"),
    [
        (JPEGS[0], 2, "label 2"),
        (JPEGS[0], -2, "label -2"),
        (b"\x89PNG....", 0, "not a JPEG"),
        (JPEGS[0][:20], 0, "without a frame header"),
        (jpeg(4, 4, "CMYK"), 0, "4 components"),
        (JPEGS[0] + bytes(PAGE), 0, "do not fit a page"),
    ],
)
def test_writer_refuses_what_readers_could_not_use(tmp_path, data, label, message):
    with pytest.raises(StoreError, match=message) as e, BetonWriter(tmp_path / "x", 1, CLASSES, PAGE) as writer:
        writer.add(data, label, "bad.JPEG")
    assert "bad.JPEG" in str(e.value)


def patched(path, offset, form, *values):
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, offset, *values)
    path.write_bytes(data)
    return path


FIRST_ROW = HEADER + 3 * FIELD


@pytest.mark.parametrize(
    ("offset", "form", "value", "message"),
    [
        (0, "<H", 1, "not a .beton file"),
        (2, "<H", 0, "0 fields"),
        (2, "<H", 65535, "65535 fields"),
        (4, "<I", 3, "page size"),
        (8, "<Q", 2**60, "table of images"),  # must not allocate 40 exabytes
        (8, "<Q", 0, "holds no images"),
        (16, "<Q", 2**63, "table of regions"),
        (16, "<Q", HEADER, "table of regions"),
        (HEADER, "<B", 77, "unknown type"),
        (HEADER, "<B", 1, "no image field"),
        (FIRST_ROW, "<B", 2, r"image 0 is stored in mode 2; 0 \(JPEG\) and 1 \(raw\) are read"),
        (FIRST_ROW, "<B", 1, "raw image 0 of 13 x 9 has .* bytes, not 3 a pixel"),
        (FIRST_ROW + 1, "<H", 0, "no pixels"),
        (FIRST_ROW + 5, "<Q", 2**64 - 8, "not in the table of regions"),
        (FIRST_ROW + 5, "<Q", 12, "not in the table of regions"),
        (FIRST_ROW + 16, "<q", -2, "label -2"),
        (FIRST_ROW + 16, "<q", 2, "label 2"),
        (FIRST_ROW + 24, "<Q", 2**64 - 1, "name of image 0"),
        (FIRST_ROW + 32, "<Q", 2**63, "name of image 0 has two lengths"),
    ],
)
def test_damaged_tables_are_refused_at_the_door(beton, offset, form, value, message):
    with pytest.raises(StoreError, match=message) as e:
        BetonReader(patched(beton, offset, form, value))
    assert str(beton) in str(e.value)


def test_region_beyond_the_file_is_refused(beton):
    """An offset and a size that are each plausible but together wrap or leave the file."""
    (table,) = struct.unpack_from("<Q", beton.read_bytes(), 16)
    for size in (2**64 - 1, 2**40, 0):
        with pytest.raises(StoreError, match="image 0"):
            BetonReader(patched(beton, table + 16, "<Q", size))


@pytest.mark.parametrize("keep", [0, 10, 24, 3000, PAGE - 1, PAGE + 100, -24, -1])
def test_truncated_file_is_refused(beton, keep):
    data = beton.read_bytes()
    beton.write_bytes(data[:keep])
    with pytest.raises(StoreError):
        BetonReader(beton)


def test_file_cut_while_open_is_an_error_not_a_crash(beton):
    reader = BetonReader(beton)
    os.truncate(beton, PAGE + len(JPEGS[0]) + 3)
    assert reader.jpeg(0) == JPEGS[0]
    with pytest.raises(StoreError, match="image 1 is gone"):
        reader.jpeg(1)
    with pytest.raises(StoreError, match="name of image 0 is gone"):
        reader.name(0)


def test_missing_file_and_foreign_file(tmp_path):
    with pytest.raises(StoreError, match="No such file"):
        BetonReader(tmp_path / "none.beton")
    (tmp_path / "text.beton").write_text("this is no beton file at all")
    with pytest.raises(StoreError, match="not a .beton file"):
        BetonReader(tmp_path / "text.beton")


def test_random_damage_is_read_or_refused(beton):
    """300 files with up to eight bytes changed: StoreError, or a reader whose every access works or says StoreError."""
    good = np.frombuffer(beton.read_bytes(), np.uint8)
    heads = np.concatenate([HEADER + k * FIELD + np.arange(60) for k in range(3)])
    images_end = PAGE + sum(map(len, JPEGS))
    tables = np.r_[0:HEADER, heads, FIRST_ROW : FIRST_ROW + 4 * ROW, PAGE:images_end:50, images_end : len(good)]
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        bad = good.copy()
        places = rng.choice(tables, rng.integers(1, 9))
        bad[places] = rng.integers(0, 256, len(places))
        beton.write_bytes(bad)
        try:
            reader = BetonReader(beton)
            for i in range(len(reader)):
                reader.jpeg(i)
                reader.name(i)
            reader.fingerprint()
        except StoreError:
            refused += 1
    assert 60 < refused < 300  # both outcomes occur: the damage reaches the tables, and is not always fatal


def test_files_as_ffcv_writes_them_are_read(beton):
    """FFCV leaves the arguments empty and calls its fields what the user likes; names are optional."""
    data = bytearray(beton.read_bytes())
    data[HEADER + FIELD + 17 : HEADER + 2 * FIELD] = bytes(FIELD - 17)  # no class list
    data[HEADER + 1 : HEADER + 17] = b"picture".ljust(16, b"\0")
    data[HEADER + 2 * FIELD + 1 : HEADER + 2 * FIELD + 17] = b"caption".ljust(16, b"\0")
    beton.write_bytes(data)
    reader = BetonReader(beton)
    assert reader.jpeg(3) == JPEGS[3] and reader.labels.tolist() == LABELS
    assert reader.class_names == ("0", "1") and reader.name(3) == "3"


def test_fingerprint_tells_sets_apart(tmp_path, beton):
    same = BetonReader(write(tmp_path / "same.beton")).fingerprint()
    assert BetonReader(beton).fingerprint() == same
    relabelled = write(tmp_path / "labels.beton", labels=[0, 0, -1, 1])
    reordered = write(tmp_path / "order.beton", jpegs=[JPEGS[k] for k in (1, 0, 2, 3)])
    renamed = write(tmp_path / "classes.beton", classes=("n01", "n03"))
    assert len({same, *(BetonReader(p).fingerprint() for p in (relabelled, reordered, renamed))}) == 4


def test_real_photographs_keep_bytes_and_sizes(tmp_path):
    """Cameras write headers that no encoder of ours does; Pillow reads the sizes independently."""
    folder = os.environ.get("FASTSSL_TEST_DATA")
    if not folder:
        pytest.skip("FASTSSL_TEST_DATA is not set: no real JPEGs (imagenet-sample/)")
    files = sorted((Path(folder) / "imagenet-sample").glob("*/*.JPEG"))
    assert files, f"no JPEGs in {folder}/imagenet-sample"
    with BetonWriter(tmp_path / "sample.beton", len(files), ("all",)) as writer:
        for file in files:
            writer.add(file.read_bytes(), 0, file.name)
    reader = BetonReader(tmp_path / "sample.beton")
    for i, file in enumerate(files):
        with Image.open(file) as image:
            assert reader.sizes[i].tolist() == [image.height, image.width], file
        assert reader.jpeg(i) == file.read_bytes() and reader.name(i) == file.name
