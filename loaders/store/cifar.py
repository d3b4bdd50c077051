"""CIFAR-10 in its official binary form (cs.toronto.edu/~kriz/cifar.html): no pickles."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from loaders.errors import StoreError
from loaders.store.source import ArraySource

FOLDER = "cifar-10-batches-bin"
TRAIN = tuple(f"data_batch_{k}.bin" for k in range(1, 6))
TEST = ("test_batch.bin",)
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_RECORD = np.dtype([("label", "u1"), ("pixels", "u1", (3, 32, 32))])
_IMAGES_A_FILE = 10_000
_FILE_BYTES = _IMAGES_A_FILE * _RECORD.itemsize  # 30,730,000


def find(path: Path) -> Path | None:
    """The folder of the binary files: `path` or the official folder inside it; None where there is neither."""
    return next((f for f in (path, path / FOLDER) if (f / TRAIN[0]).exists() or (f / TEST[0]).exists()), None)


def open_cifar10(path: str | Path) -> tuple[ArraySource, ArraySource]:
    """(50,000 training images, 10,000 test images), in the official order. Raises StoreError naming a bad file."""
    folder = find(Path(path))
    if folder is None:
        raise StoreError(f"{path}: no CIFAR-10; looked for {TRAIN[0]} there and in {FOLDER}/")
    return _read(folder, TRAIN, f"{path} (train)"), _read(folder, TEST, f"{path} (test)")


def _read(folder: Path, files: tuple[str, ...], name: str) -> ArraySource:
    records = np.concatenate([_records(folder / file) for file in files])
    images = np.ascontiguousarray(records["pixels"].transpose(0, 2, 3, 1))
    return ArraySource(name, images, records["label"].astype(np.int64), CLASS_NAMES)


def _records(file: Path) -> np.ndarray:
    try:
        size = file.stat().st_size
        if size != _FILE_BYTES:
            raise StoreError(f"{file}: a CIFAR-10 binary file has {_FILE_BYTES:,} bytes, this one has {size:,}")
        records = np.fromfile(file, _RECORD)
    except OSError as e:
        raise StoreError(f"{file}: cannot be read: {e.strerror}") from e
    if (records["label"] >= len(CLASS_NAMES)).any():
        raise StoreError(f"{file}: not CIFAR-10: labels up to {records['label'].max()}")
    return records
