"""Hugging Face's parquet files: a struct of bytes and path a row, a label, class names in the schema's metadata.

They are converted, not trained from: a row's bytes are had only with its whole row group, about 100 MB of it.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from loaders.errors import StoreError
from loaders.store.columns import IMAGES, LABELS, numbered, own_names
from loaders.store.listing import Listing, PassedOver

SUFFIX = ".parquet"
_ROWS = 1000  # looked at together
_GROUPS = 3  # row groups kept while a file is gone through


def list_parquet(name: Path, paths: list[Path]) -> Listing:
    """The images in parquet files, in the order in which they lie there; `name` is what messages call them.

    Raises StoreError where pyarrow is not installed, where columns are missing (those found are named), where rows hold
    only a path, and where files have other columns or classes than the first.
    """
    groups, ignored = _Groups(), PassedOver()
    parts = [_File(path, groups) for path in paths]
    wanted = {(part.image, part.label, part.class_names) for part in parts}
    if len(wanted) > 1:
        raise StoreError(f"{name}: its files have other columns or classes than {paths[0].name}")
    rows = [row for number, part in enumerate(parts) for row in part.rows(number)]
    without = [f"{paths[k].name}: {path}" for _, _, path, k, size in rows if size is None]
    if without:
        raise StoreError(
            f"{name}: {len(without):,} of {len(rows):,} rows hold a path in place of an image's bytes, first "
            f"{without[0]}, as datasets' to_parquet leaves images that it was given as files: load the folder itself, "
            "or write them with their bytes"
        )
    if not rows:
        raise StoreError(f"{name}: no rows")
    labels = [label for label, *_ in rows]
    names = own_names([row[2] for row in rows], [path.stem for path in paths], [row[3] for row in rows])
    class_names, numbers = numbered(labels, parts[0].class_names)
    places = np.array([(size, parts[k].time, at, k) for _, at, _, k, size in rows], np.int64).reshape(-1, 4)
    return Listing(name, class_names, numbers, names, places, ignored, tuple(parts), paths=names)


class _Groups:
    """The image columns of the last few row groups, for whichever thread asks."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[Path, int], Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, file: _File, group: int) -> Any:
        with self._lock:
            key = (file.path, group)
            if key not in self._kept:
                self._kept[key] = file.images_of(group)
                while len(self._kept) > _GROUPS:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(key)
            return self._kept[key]


class _File:
    """One parquet file as a container: its images' bytes one after the other, as if it held nothing else."""

    def __init__(self, path: Path, groups: _Groups):
        self.path, self._groups = path, groups
        self._file = _opened(path)
        self.time = path.stat().st_mtime_ns
        self._starts = np.zeros(1, np.int64)  # of each row's bytes, and the end
        metadata = self._file.metadata
        counts = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        self._first_rows = np.cumsum([0, *counts])
        self.image, self.label, self.class_names = self._columns()

    def _columns(self) -> tuple[str, str | None, tuple[str, ...]]:
        """Names of the columns of images and labels, and of the classes. Raises StoreError where there are none."""
        import pyarrow.types as types

        schema = self._file.schema_arrow
        found = ", ".join(f"{field.name} ({field.type})" for field in schema)
        images = [f.name for f in schema if types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
        image = next((name for name in IMAGES if name in images), images[0] if len(images) == 1 else None)
        if image is None:
            raise StoreError(
                f"{self.path}: which column holds the images? A struct of bytes and path called {IMAGES[0]} is looked "
                f"for; found are {found}"
            )
        described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        classes = [name for name, kind in described.items() if isinstance(kind, dict) and kind.get("names")]
        rest = [field.name for field in schema if field.name != image]
        label = next((name for name in (*LABELS, *classes) if name in rest), None)
        if label is None and rest:
            raise StoreError(f"{self.path}: which column holds the labels? Call it label; found are {found}")
        names = described.get(label, {}).get("names") or () if label else ()
        return image, label, tuple(map(str, names))

    def rows(self, number: int) -> Iterator[tuple[Any, int, str | None, int, int | None]]:
        """(label, where its bytes begin, path, `number`, how many bytes) of each row; None for what a row lacks."""
        import pyarrow.compute as compute

        columns = [self.image, *([self.label] if self.label else [])]
        starts, end = [0], 0
        for batch in self._file.iter_batches(batch_size=_ROWS, columns=columns):
            images = batch.column(batch.schema.get_field_index(self.image))
            sizes = compute.binary_length(compute.struct_field(images, "bytes")).to_pylist()
            has_path = images.type.get_field_index("path") >= 0
            paths = compute.struct_field(images, "path").to_pylist() if has_path else [None] * len(sizes)
            labels = batch.column(batch.schema.get_field_index(self.label)).to_pylist() if self.label else paths
            for size, path, label in zip(sizes, paths, labels, strict=True):
                yield label if self.label else None, end, path, number, size
                end += size or 0
                starts.append(end)
        self._starts = np.array(starts, np.int64)

    def images_of(self, group: int) -> Any:
        """The bytes of a row group's images, an array of pyarrow's."""
        import pyarrow.compute as compute

        table = self._file.read_row_group(group, columns=[f"{self.image}.bytes"])
        return compute.struct_field(table.column(0), "bytes")

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` on, of one image. Raises OSError."""
        row = int(np.searchsorted(self._starts, offset, side="right")) - 1
        group = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        data: bytes = self._groups.get(self, group)[row - int(self._first_rows[group])].as_py()
        skipped = offset - int(self._starts[row])
        return data[skipped : skipped + size]


def _opened(path: Path) -> Any:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise StoreError(f"{path}: parquet files need pyarrow: the extra parquet") from None
    try:
        return ParquetFile(path)
    except (ArrowException, OSError) as e:
        raise StoreError(f"{path}: damaged, or no parquet file: {str(e).splitlines()[0]}") from e
