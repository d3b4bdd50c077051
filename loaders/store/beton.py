"""The `.beton` file, FFCV's open format (version 2), in NumPy alone; the only place that knows its bytes.

Layout, all little-endian::

    header                 24 bytes: version, number of fields, page size, number of samples, allocation table pointer
    field descriptors      1041 bytes each: type, name, 1024 bytes of arguments
    metadata table         one aligned row a sample: what each field says of it (sizes, label, pointers)
    data                   from the next multiple of the page size on; no region straddles a page
    allocation table       to the end of the file: (sample, pointer, size) of every region

Ours has three fields: `image` (RGBImageField, JPEG mode), `label` (IntField) and `name` (JSONField, so that FFCV's own
`JSONField.unpack` reads it). JPEG bytes are stored as they come. Names lie together after the images, so that reading
all of them does not touch the images' pages. Class names are a JSON list after the names; the label field's
arguments, which FFCV ignores, say where.

Images may also be stored decoded (FFCV's raw mode): RGB, row by row, as many bytes as the image's sizes ask for. What
a conversion has done to the pixels is a line in the image field's arguments, which FFCV ignores as well.

Source: FFCV 1.0.2, types.py, memory_allocator.py, fields/. Files written by FFCV itself are read too, in any of its
write modes; they have no class names, and names only if there is a bytes or JSON field called `name`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import BinaryIO

import numpy as np

from loaders.errors import StoreError
from loaders.files import whole_file
from loaders.store.images import as_tiff
from loaders.store.jpeg import jpeg_header, orientation_of
from loaders.store.open_file import OpenFile
from loaders.store.source import digest

VERSION = 2
PAGE_SIZE = 1 << 24  # FFCV's default of 8 MiB is less than ImageNet's largest JPEG (about 15 MiB)
MAX_CLASSES = 1 << 20  # a label beyond this is damage, not a class

_MIN_PAGE_SIZE, _MAX_PAGE_SIZE = 1 << 21, 1 << 31  # FFCV's writer: 2 MiB; below 2**32
_MAX_FIELDS = 64
_JPEG_MODE, _RAW_MODE = 0, 1
_CLASS_NAMES_TAG = b"fastssl class names"
_CHANGED_TAG = b"fastssl changed pixels: "
_SAMPLED, _SAMPLE_BYTES = 64, 1 << 16  # of images stored decoded, what a fingerprint looks at

_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ]
)
_FIELD = np.dtype([("type_id", "<u1"), ("name", "S16"), ("arguments", "<u1", (1024,))])
_ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
_CLASS_NAMES = np.dtype([("tag", f"S{len(_CLASS_NAMES_TAG)}"), ("ptr", "<u8"), ("size", "<u8")])

_REGION = np.dtype([("ptr", "<u8"), ("size", "<u8")])
_IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
_INT, _IMAGES, _BYTES, _JSON = 1, 2, 3, 5
_ROW_TYPES = {  # type id -> what the metadata table holds of it
    0: np.dtype("<f8"),
    _INT: np.dtype("<i8"),
    _IMAGES: _IMAGE,
    _BYTES: _REGION,
    4: np.dtype("<u8"),  # arrays: NumPy, and 6: torch
    _JSON: _REGION,
    6: np.dtype("<u8"),
}


def _table_type(type_ids: list[int]) -> np.dtype:
    return np.dtype([(f"f{k}", _ROW_TYPES[t]) for k, t in enumerate(type_ids)], align=True)


def data_start(num_images: int, page_size: int = PAGE_SIZE) -> int:
    """Where the data of a file of ours with up to `num_images` images begins: a multiple of the page size."""
    end = _HEADER.itemsize + 3 * _FIELD.itemsize + num_images * _table_type([_IMAGES, _INT, _JSON]).itemsize
    return end + -end % page_size


def place(sizes: np.ndarray, start: int, page_size: int = PAGE_SIZE) -> tuple[np.ndarray, int]:
    """Places int64 [N] of regions of `sizes` int64 [N] bytes, one after the other from `start` on, such that none
    straddles a page; and the end. No size may exceed the page."""
    assert not len(sizes) or sizes.max() <= page_size
    ends, places = np.cumsum(sizes), np.empty(len(sizes), np.int64)
    first, before = 0, 0
    while first < len(sizes):
        beyond = int(np.searchsorted(ends, before + page_size - start % page_size, side="right"))
        if beyond > first:
            places[first:beyond] = start + (ends - sizes)[first:beyond] - before
            start += int(ends[beyond - 1]) - before
            first, before = beyond, int(ends[beyond - 1])
        else:
            start += -start % page_size
    return places, start


@dataclass(frozen=True)
class Stored:
    """Images whose bytes are in the file already; arrays are [N]."""

    heights: np.ndarray
    widths: np.ndarray
    labels: np.ndarray  # -1: none
    ptrs: np.ndarray
    sizes: np.ndarray
    names: Sequence[str]
    raw: bool = False  # decoded, not JPEG
    changed: str = ""  # what was done to their pixels, in words


def write_tables(
    file: BinaryIO, stored: Stored, class_names: tuple[str, ...], end: int, page_size: int = PAGE_SIZE
) -> None:
    """Make `file` a `.beton`: all but the images' bytes, which lie between `data_start` and `end`."""
    texts = [json.dumps(name).encode() + b"\0" for name in stored.names]  # FFCV's JSONField ends with a null
    text_sizes = np.fromiter(map(len, texts), np.int64, len(texts))
    text_ptrs, names_end = place(text_sizes, end, page_size)
    at = None
    for ptr, text in zip(text_ptrs.tolist(), texts, strict=True):
        if ptr != at:  # each seek costs a system call: there are millions of names, and a few pages
            file.seek(ptr)
        file.write(text)
        at = ptr + len(text)
    class_list = json.dumps(class_names).encode()
    file.write(class_list)

    num_images = len(texts)
    regions = np.zeros((2, num_images), _ALLOCATION)
    regions["sample_id"] = np.arange(num_images)
    regions["ptr"] = stored.ptrs, text_ptrs
    regions["size"] = stored.sizes, text_sizes
    file.write(regions.tobytes())
    file.truncate()

    fields = np.zeros(3, _FIELD)
    fields["type_id"] = _IMAGES, _INT, _JSON
    fields["name"] = b"image", b"label", b"name"
    where = np.array((_CLASS_NAMES_TAG, names_end, len(class_list)), _CLASS_NAMES)
    fields["arguments"][1, : where.nbytes] = np.frombuffer(where.tobytes(), np.uint8)
    if stored.changed:
        line = np.frombuffer(_CHANGED_TAG + stored.changed.encode(), np.uint8)
        fields["arguments"][0, : len(line)] = line
    table = np.zeros(num_images, _table_type([_IMAGES, _INT, _JSON]))
    image, label, name = (table[f] for f in ("f0", "f1", "f2"))
    image["mode"] = _RAW_MODE if stored.raw else _JPEG_MODE
    image["width"], image["height"], image["data_ptr"] = stored.widths, stored.heights, stored.ptrs
    label[:] = stored.labels
    name["ptr"], name["size"] = text_ptrs, text_sizes
    header = np.array((VERSION, 3, page_size, num_images, names_end + len(class_list)), _HEADER)
    file.seek(0)
    for part in (header, fields, table):
        file.write(part.tobytes())


class BetonWriter:
    """Writes `num_images` images in order; the file appears under its name when the `with` block ends well.

    with BetonWriter(path, num_images, class_names) as writer:
        writer.add(jpeg_bytes, label, "n01440764_10026.JPEG")
    """

    def __init__(
        self, path: str | Path, num_images: int, class_names: tuple[str, ...] = (), page_size: int = PAGE_SIZE
    ):
        """`page_size`, a power of two of at least 2 MiB, must hold the largest image."""
        if page_size & (page_size - 1) or not _MIN_PAGE_SIZE <= page_size <= _MAX_PAGE_SIZE:
            raise StoreError(f"page size {page_size} is not a power of two from {_MIN_PAGE_SIZE} to {_MAX_PAGE_SIZE}")
        if num_images < 1:
            raise StoreError(f"{path}: a .beton file needs at least one image")
        self.path = Path(path)
        self._class_names, self._page_size = tuple(class_names), page_size
        self._num_announced = num_images
        self._rows: list[tuple[int, int, int, int, int]] = []  # height, width, label, ptr, size
        self._names: list[str] = []
        self._end = data_start(num_images, page_size)

    def __enter__(self) -> BetonWriter:
        try:
            self._writing = whole_file(self.path)
            self._file = self._writing.__enter__()
        except OSError as e:
            raise StoreError(f"{self.path}: cannot write there: {e.strerror}") from e
        self._file.seek(self._end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as stack:
            stack.push(self._writing)
            if error is not None:
                raise error
            self._finish()

    def add(self, jpeg: bytes, label: int, name: str) -> None:
        """Append an image: grey or three-component JPEG bytes, a label (-1: none), its bare file name."""
        if len(self._names) == self._num_announced:
            raise StoreError(f"{self.path}: {name} is one image more than the {self._num_announced} announced")
        try:
            height, width, components = jpeg_header(jpeg)
        except StoreError as e:
            raise StoreError(f"{name}: {e}") from None
        if components not in (1, 3):
            raise StoreError(f"{name}: a JPEG of {components} components; convert it to RGB first")
        if orientation_of(jpeg) != 1:
            raise StoreError(f"{name}: its EXIF orientation says that it lies sideways; turn it upright first")
        num_classes = len(self._class_names) or MAX_CLASSES
        if not -1 <= label < num_classes:
            raise StoreError(f"{name}: label {label} is not in -1..{num_classes - 1}")
        if len(jpeg) > self._page_size:
            raise StoreError(f"{name}: {len(jpeg)} bytes do not fit a page of {self._page_size}: raise page_size")
        (ptr,), self._end = place(np.array([len(jpeg)]), self._end, self._page_size)
        self._file.seek(ptr)
        self._file.write(jpeg)
        self._rows.append((height, width, label, int(ptr), len(jpeg)))
        self._names.append(name)

    def _finish(self) -> None:
        num_written = len(self._names)
        if num_written < self._num_announced:
            raise StoreError(f"{self.path}: {num_written} of the {self._num_announced} announced images were written")
        heights, widths, labels, ptrs, sizes = np.array(self._rows, np.int64).T
        stored = Stored(heights, widths, labels, ptrs, sizes, self._names)
        write_tables(self._file, stored, self._class_names, self._end, self._page_size)


class BetonFile(OpenFile):
    """An open `.beton` file. All tables are checked against the file's length before anything trusts them."""

    channels = 3
    unreadable: Mapping[int, str] = MappingProxyType({})  # whatever is damaged shows when it is decoded

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def files(self) -> list[Path]:
        return [self.path]

    @property
    def is_raw(self) -> np.ndarray:
        """bool [N]: stored decoded."""
        raw: np.ndarray = self._raw
        return raw

    @property
    def num_bytes(self) -> np.ndarray:
        return self._jpeg_size.astype(np.int64)

    def tail(self, i: int, size: int) -> bytes:
        length = int(self._jpeg_size[i])
        skipped = max(0, length - size)
        return self._pread(int(self._jpeg_ptr[i]) + skipped, length - skipped, f"image {i}")

    def path_of(self, i: int) -> str:
        """Class and name."""
        label = int(self.labels[i])
        return self.name_of(i) if label < 0 else f"{self.class_names[label]}/{self.name_of(i)}"

    def jpeg(self, i: int) -> bytes:
        """The bytes of an image file: as stored, or of one that is stored decoded a TIFF."""
        if not self._raw[i]:
            return self.stored(i)
        height, width = self.sizes[i].tolist()
        return as_tiff(self.stored(i), height, width)

    def stored(self, i: int) -> bytes:
        """Image `i` as it lies in the file."""
        return self._pread(int(self._jpeg_ptr[i]), int(self._jpeg_size[i]), f"image {i}")

    def read_pixels(self, i: int, buffer: np.ndarray) -> np.ndarray | None:
        if not self._raw[i]:
            return None
        size = int(self._jpeg_size[i])
        pixels = buffer[:size] if size <= len(buffer) else np.empty(size, np.uint8)
        try:
            num_read = self._read_into(int(self._jpeg_ptr[i]), pixels)
        except OSError as e:
            raise StoreError(f"{self.path}: image {i} cannot be read: {e.strerror}") from e
        if num_read < size:
            raise StoreError(f"{self.path}: the file became shorter while it was open: image {i} is gone")
        return pixels.reshape(*self.sizes[i].tolist(), 3)

    def name_of(self, i: int) -> str:
        """The bare file name; the index in files without names."""
        if self._names is None:
            return str(i)
        ptr, size = self._names[i]
        data = self._pread(int(ptr), int(size), f"the name of image {i}").rstrip(b"\0")
        try:
            name = json.loads(data) if self._names_are_json else data.decode()
        except ValueError:
            name = None
        if not isinstance(name, str):
            raise self._damaged(f"the name of image {i} is not text")
        return name

    def fingerprint(self) -> str:
        """Of JPEGs the lengths tell sets apart; of decoded images they say no more than the sides do, so that pixels of
        some are looked at."""
        facts = self.class_names, [self._length], self._jpeg_size, self.labels, self.sizes
        decoded = np.flatnonzero(self._raw)
        if not len(decoded):
            return digest(*facts)
        some = np.unique(np.linspace(0, len(decoded) - 1, _SAMPLED).astype(np.int64))
        return digest(*facts, [self._middle(i) for i in decoded[some].tolist()])

    def _middle(self, i: int) -> bytes:
        """The rows in the middle of image `i`: what it shows is there rather than at its edges."""
        size = int(self._jpeg_size[i])
        count = min(size, _SAMPLE_BYTES)
        return self._pread(int(self._jpeg_ptr[i]) + (size - count) // 2, count, f"image {i}")

    def _read_tables(self) -> None:
        self._length = os.fstat(self._fd).st_size
        if self._length < _HEADER.itemsize:
            raise self._damaged("too short for a header")
        header = self._array(0, _HEADER, 1, "the header")[0]
        if header["version"] != VERSION:
            raise StoreError(f"{self.path}: not a .beton file of format {VERSION}: it begins with {header['version']}")
        num_fields, num_images = int(header["num_fields"]), int(header["num_samples"])
        page_size, table_end = int(header["page_size"]), int(header["alloc_table_ptr"])
        if not 1 <= num_fields <= _MAX_FIELDS:
            raise self._damaged(f"{num_fields} fields")
        if not page_size or page_size & (page_size - 1):
            raise self._damaged(f"page size {page_size} is not a power of two")
        fields = self._array(_HEADER.itemsize, _FIELD, num_fields, "the field table")
        unknown = set(fields["type_id"].tolist()) - _ROW_TYPES.keys()
        if unknown:
            raise StoreError(f"{self.path}: fields of unknown type {sorted(unknown)}")
        table = self._array(
            _HEADER.itemsize + fields.nbytes,
            _table_type(fields["type_id"].tolist()),
            num_images,
            "the table of images",
        )
        if not num_images:
            raise StoreError(f"{self.path}: holds no images")
        rest = self._length - table_end
        if rest < 0 or rest % _ALLOCATION.itemsize:
            raise self._damaged(f"its table of regions should start at byte {table_end} and fill the file")
        regions = self._array(table_end, _ALLOCATION, rest // _ALLOCATION.itemsize, "the table of regions")
        regions = regions[np.argsort(regions["ptr"], kind="stable")]
        self._read_images(fields, table, regions)
        self._read_labels(fields, table)
        self._read_names(fields, table, regions)

    def _read_images(self, fields: np.ndarray, table: np.ndarray, regions: np.ndarray) -> None:
        column = self._column(fields, _IMAGES, "image")
        self.changed = self._read_changed(fields["arguments"][column].tobytes())
        images = table[f"f{column}"]
        self._raw = images["mode"] == _RAW_MODE
        odd = ~self._raw & (images["mode"] != _JPEG_MODE)
        if odd.any():
            i = _first(odd)
            raise self._damaged(f"image {i} is stored in mode {images['mode'][i]}; 0 (JPEG) and 1 (raw) are read")
        self.sizes = np.stack([images["height"], images["width"]], axis=1).astype(np.int32)
        if (self.sizes == 0).any():
            raise self._damaged(f"image {_first((self.sizes == 0).any(1))} has no pixels")
        self._jpeg_ptr = images["data_ptr"].copy()
        self._jpeg_size = self._region_sizes(self._jpeg_ptr, regions, "image")
        wrong = self._raw & (self._jpeg_size != 3 * self.sizes.astype(np.uint64).prod(1))
        if wrong.any():
            i = _first(wrong)
            height, width = self.sizes[i]
            raise self._damaged(f"raw image {i} of {width} x {height} has {self._jpeg_size[i]} bytes, not 3 a pixel")

    def _read_changed(self, arguments: bytes) -> str:
        """What was done to the images' pixels, in words; nothing where that is not known."""
        if not arguments.startswith(_CHANGED_TAG):
            return ""
        try:
            return arguments.removeprefix(_CHANGED_TAG).rstrip(b"\0").decode()
        except ValueError:
            raise self._damaged("what was done to its pixels is not text") from None

    def _read_labels(self, fields: np.ndarray, table: np.ndarray) -> None:
        column = self._column(fields, _INT, "label")
        self.labels = table[f"f{column}"].astype(np.int64)
        self.class_names = self._read_class_names(fields["arguments"][column])
        limit = len(self.class_names) or MAX_CLASSES
        wrong = (self.labels < -1) | (self.labels >= limit)
        if wrong.any():
            i = _first(wrong)
            raise self._damaged(f"image {i} has label {self.labels[i]}, which is not in -1..{limit - 1}")
        if not self.class_names:
            self.class_names = tuple(str(c) for c in range(int(self.labels.max()) + 1))

    def _read_class_names(self, arguments: np.ndarray) -> tuple[str, ...]:
        where = np.frombuffer(arguments.tobytes(), _CLASS_NAMES, 1)[0]
        if where["tag"] != _CLASS_NAMES_TAG:
            return ()
        self._check_inside(where["ptr"][None], where["size"][None], "the class list")
        try:
            names = json.loads(self._pread(int(where["ptr"]), int(where["size"]), "the class list"))
        except ValueError:
            names = None
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or len(names) > MAX_CLASSES:
            raise self._damaged("its class list is not a list of names")
        return tuple(names)

    def _read_names(self, fields: np.ndarray, table: np.ndarray, regions: np.ndarray) -> None:
        column = next(
            (k for k, f in enumerate(fields) if f["name"] == b"name" and f["type_id"] in (_BYTES, _JSON)), None
        )
        self._names = None if column is None else table[f"f{column}"].copy()
        self._names_are_json = column is not None and fields[column]["type_id"] == _JSON
        if self._names is not None:
            sizes = self._region_sizes(self._names["ptr"], regions, "the name of image")
            if (sizes != self._names["size"]).any():
                raise self._damaged(f"the name of image {_first(sizes != self._names['size'])} has two lengths")

    def _column(self, fields: np.ndarray, type_id: int, name: str) -> int:
        """The number of the field called `name`, else of the only field of its type."""
        fitting = [k for k, f in enumerate(fields) if f["type_id"] == type_id]
        called = [k for k in fitting if fields[k]["name"] == name.encode()]
        if not called and len(fitting) != 1:
            raise StoreError(f"{self.path}: {_which(fields[fitting], name)}")
        return (called or fitting)[0]

    def _region_sizes(self, ptr: np.ndarray, regions: np.ndarray, what: str) -> np.ndarray:
        """Sizes uint64 [N] of the regions that begin at `ptr` uint64 [N]; all inside the file."""
        place = np.searchsorted(regions["ptr"], ptr)
        found = place < len(regions)
        found[found] = regions["ptr"][place[found]] == ptr[found]
        if not found.all():
            raise self._damaged(f"{what} {_first(~found)} is not in the table of regions")
        sizes = regions["size"][place]
        self._check_inside(ptr, sizes, what)
        return sizes

    def _check_inside(self, ptr: np.ndarray, size: np.ndarray, what: str) -> None:
        """Unsigned arithmetic that cannot wrap: size <= length, then ptr <= length - size."""
        length = np.uint64(self._length)
        outside = (size == 0) | (size > length) | (ptr > length - np.minimum(size, length))
        if outside.any():
            i = _first(outside)
            raise self._damaged(f"{what} {i} should be {size[i]} bytes from {ptr[i]} on, the file has {self._length}")

    def _array(self, start: int, dtype: np.dtype, count: int, what: str) -> np.ndarray:
        size = count * dtype.itemsize
        if start + size > self._length:
            raise self._damaged(f"{what} should end at byte {start + size}, the file has {self._length}")
        return np.frombuffer(self._pread(start, size, what), dtype, count)

    def _pread(self, start: int, size: int, what: str) -> bytes:
        """Exactly `size` bytes."""
        try:
            data = self._read(start, size)
        except OSError as e:
            raise StoreError(f"{self.path}: {what} cannot be read: {e.strerror}") from e
        if len(data) < size:
            raise StoreError(f"{self.path}: the file became shorter while it was open: {what} is gone")
        return data

    def _damaged(self, how: str) -> StoreError:
        return StoreError(f"{self.path}: damaged or cut short: {how}")


class BetonReader(BetonFile):
    """The file by itself: `len`, `.labels`, `.sizes`, `.jpeg(i)` and `.name(i)`, the bare file name."""

    def name(self, i: int) -> str:
        return self.name_of(i)


class BetonSource(BetonFile):
    """The file as a `loaders.store.source.EncodedSource`."""

    @property
    def name(self) -> str:
        return str(self.path)


def _first(mask: np.ndarray) -> int:
    return int(np.flatnonzero(mask)[0])


def _which(fitting: np.ndarray, name: str) -> str:
    """Why no field of those `fitting` is the one."""
    if not len(fitting):
        return f"has no {name} field"
    names = ", ".join(field.rstrip(b"\0").decode("utf-8", "replace") for field in fitting["name"].tolist())
    return f"has {len(fitting)} fields that could be the {name}: {names}; write the one that is meant as {name!r}"
