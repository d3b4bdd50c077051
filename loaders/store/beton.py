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

Source: FFCV 1.0.2, types.py, memory_allocator.py, fields/. Files written by FFCV itself are read too, if their images
are stored as JPEG; they have no class names, and names only if there is a bytes or JSON field called `name`.
"""

from __future__ import annotations

import json
import os
import weakref
from pathlib import Path
from types import TracebackType

import numpy as np

from loaders.errors import StoreError
from loaders.store.jpeg import jpeg_header
from loaders.store.source import digest

VERSION = 2
PAGE_SIZE = 1 << 24  # FFCV's default of 8 MiB is less than ImageNet's largest JPEG (about 15 MiB)
MAX_CLASSES = 1 << 20  # a label beyond this is damage, not a class

_MIN_PAGE_SIZE, _MAX_PAGE_SIZE = 1 << 21, 1 << 31  # FFCV's writer: 2 MiB; below 2**32
_MAX_FIELDS = 64
_JPEG_MODE = 0
_CLASS_NAMES_TAG = b"fastssl class names"

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
        self._partial = self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")
        self._class_names, self._page_size = tuple(class_names), page_size
        self._fields = np.zeros(3, _FIELD)
        self._fields["type_id"] = _IMAGES, _INT, _JSON
        self._fields["name"] = b"image", b"label", b"name"
        self._table = np.zeros(num_images, _table_type([_IMAGES, _INT, _JSON]))
        self._names: list[str] = []
        self._allocations = np.zeros(2 * num_images, _ALLOCATION)
        self._num_allocations = 0
        self._end = _HEADER.itemsize + self._fields.nbytes + self._table.nbytes
        self._end += -self._end % page_size

    def __enter__(self) -> BetonWriter:
        try:
            self._file = open(self._partial, "wb")  # noqa: SIM115 - closed in __exit__
        except OSError as e:
            raise StoreError(f"{self.path}: cannot write there: {e.strerror}") from e
        self._file.seek(self._end)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
                os.replace(self._partial, self.path)
                _sync_folder(self.path.parent)
        finally:
            self._file.close()
            self._partial.unlink(missing_ok=True)

    def add(self, jpeg: bytes, label: int, name: str) -> None:
        """Append an image: grey or three-component JPEG bytes, a label (-1: none), its bare file name."""
        i = len(self._names)
        if i == len(self._table):
            raise StoreError(f"{self.path}: {name} is one image more than the {i} announced")
        try:
            height, width, components = jpeg_header(jpeg)
        except StoreError as e:
            raise StoreError(f"{name}: {e}") from None
        if components not in (1, 3):
            raise StoreError(f"{name}: a JPEG of {components} components; convert it to RGB first")
        num_classes = len(self._class_names) or MAX_CLASSES
        if not -1 <= label < num_classes:
            raise StoreError(f"{name}: label {label} is not in -1..{num_classes - 1}")
        row = self._table[i]
        row["f0"] = _JPEG_MODE, width, height, self._append(i, jpeg, name)
        row["f1"] = label
        self._names.append(name)

    def _append(self, i: int, data: bytes, name: str) -> int:
        """Write `data` where it does not straddle a page; returns its place."""
        if len(data) > self._page_size:
            raise StoreError(f"{name}: {len(data)} bytes do not fit a page of {self._page_size}: raise page_size")
        if self._end % self._page_size + len(data) > self._page_size:
            self._end += -self._end % self._page_size
            self._file.seek(self._end)
        ptr = self._end
        self._file.write(data)
        self._end += len(data)
        self._allocations[self._num_allocations] = i, ptr, len(data)
        self._num_allocations += 1
        return ptr

    def _finish(self) -> None:
        if len(self._names) < len(self._table):
            raise StoreError(f"{self.path}: {len(self._names)} of the {len(self._table)} announced images were written")
        for i, name in enumerate(self._names):
            data = json.dumps(name).encode() + b"\0"  # FFCV's JSONField ends with a null
            self._table[i]["f2"] = self._append(i, data, name), len(data)
        class_names = json.dumps(self._class_names).encode()
        where = np.array((_CLASS_NAMES_TAG, self._end, len(class_names)), _CLASS_NAMES)
        self._fields["arguments"][1, : where.nbytes] = np.frombuffer(where.tobytes(), np.uint8)
        self._file.write(class_names)
        self._end += len(class_names)
        header = np.array((VERSION, 3, self._page_size, len(self._table), self._end), _HEADER)
        self._file.write(self._allocations.tobytes())
        self._file.seek(0)
        for part in (header, self._fields, self._table):
            self._file.write(part.tobytes())
        self._file.flush()
        os.fsync(self._file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class BetonFile:
    """An open `.beton` file. All tables are checked against the file's length before anything trusts them.

    Reads with `pread`, so threads share it, and a file that shrinks while it is open is an error, not a SIGBUS.
    """

    channels = 3

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise StoreError(f"{path}: cannot be read: {e.strerror}") from e
        self.close = weakref.finalize(self, os.close, self._fd)
        try:
            self._read_tables()
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def jpeg(self, i: int) -> bytes:
        return self._pread(int(self._jpeg_ptr[i]), int(self._jpeg_size[i]), f"image {i}")

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
        return digest(self.class_names, [self._length], self._jpeg_size, self.labels, self.sizes)

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
        images = table[f"f{self._column(fields, _IMAGES, 'image')}"]
        if (images["mode"] != _JPEG_MODE).any():
            raise StoreError(f"{self.path}: image {_first(images['mode'] != _JPEG_MODE)} is not stored as JPEG")
        self.sizes = np.stack([images["height"], images["width"]], axis=1).astype(np.int32)
        if (self.sizes == 0).any():
            raise self._damaged(f"image {_first((self.sizes == 0).any(1))} has no pixels")
        self._jpeg_ptr = images["data_ptr"].copy()
        self._jpeg_size = self._region_sizes(self._jpeg_ptr, regions, "image")

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
            raise StoreError(f"{self.path}: has no {name} field")
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
        """Exactly `size` bytes. One call reads at most 2 GiB, so long tables take several."""
        data = b""
        while len(data) < size:
            try:
                more = os.pread(self._fd, size - len(data), start + len(data))
            except OSError as e:
                raise StoreError(f"{self.path}: {what} cannot be read: {e.strerror}") from e
            if not more:
                raise StoreError(f"{self.path}: the file became shorter while it was open: {what} is gone")
            data = data + more if data else more
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
