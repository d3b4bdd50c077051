"""CIFAR-10 and CIFAR-100 in their official binary form (cs.toronto.edu/~kriz/cifar.html): no pickles."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from loaders.errors import StoreError
from loaders.store.source import ArraySource

FOLDER = "cifar-10-batches-bin"
TRAIN = tuple(f"data_batch_{k}.bin" for k in range(1, 6))
TEST = ("test_batch.bin",)
CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

FOLDER_100 = "cifar-100-binary"
IMAGES_100 = {"train.bin": 50_000, "test.bin": 10_000}
CLASS_NAMES_100 = "fine_label_names.txt"

_PIXELS = ("pixels", "u1", (3, 32, 32))
_RECORD = np.dtype([("label", "u1"), _PIXELS])
_RECORD_100 = np.dtype([("coarse", "u1"), ("label", "u1"), _PIXELS])
_IMAGES_A_FILE = 10_000


def find(path: Path) -> Path | None:
    """The folder of CIFAR-10's binary files: `path` or the official folder inside it; None where there is neither."""
    return next((f for f in (path, path / FOLDER) if (f / TRAIN[0]).exists() or (f / TEST[0]).exists()), None)


def open_cifar10(path: str | Path) -> tuple[ArraySource, ArraySource]:
    """(50,000 training images, 10,000 test images), in the official order. Raises StoreError naming a bad file."""
    folder = find(Path(path))
    if folder is None:
        raise StoreError(f"{path}: no CIFAR-10; looked for {TRAIN[0]} there and in {FOLDER}/")

    def read(files: tuple[str, ...], name: str) -> ArraySource:
        records = [_records(folder / file, "CIFAR-10", _RECORD, _IMAGES_A_FILE, len(CLASS_NAMES)) for file in files]
        return _source(name, np.concatenate(records), CLASS_NAMES)

    return read(TRAIN, f"{path} (train)"), read(TEST, f"{path} (test)")


def open_cifar100(path: str | Path) -> tuple[ArraySource, ArraySource]:
    """(50,000 training images, 10,000 test images) with the 100 fine classes, in the official order. Raises StoreError
    naming a bad file."""
    folders = (Path(path), Path(path) / FOLDER_100)
    folder = next((f for f in folders if (f / "train.bin").exists() or (f / "test.bin").exists()), None)
    if folder is None:
        raise StoreError(f"{path}: no CIFAR-100 in binary form; looked for train.bin there and in {FOLDER_100}/")
    try:
        names = tuple((folder / CLASS_NAMES_100).read_text().split())
    except OSError as e:
        raise StoreError(f"{folder / CLASS_NAMES_100}: cannot be read: {e.strerror}") from e
    if len(names) != 100:
        raise StoreError(f"{folder / CLASS_NAMES_100}: {len(names)} classes, not 100")
    train, test = (
        _source(f"{path} ({file[:-4]})", _records(folder / file, "CIFAR-100", _RECORD_100, images, 100), names)
        for file, images in IMAGES_100.items()
    )
    return train, test


def _source(name: str, records: np.ndarray, class_names: tuple[str, ...]) -> ArraySource:
    images = np.ascontiguousarray(records["pixels"].transpose(0, 2, 3, 1))
    return ArraySource(name, images, records["label"].astype(np.int64), class_names)


def _records(file: Path, what: str, record: np.dtype, num_images: int, num_classes: int) -> np.ndarray:
    num_bytes = num_images * record.itemsize  # 30,730,000 for a file of CIFAR-10
    try:
        size = file.stat().st_size
        if size != num_bytes:
            raise StoreError(f"{file}: {what}'s has {num_bytes:,} bytes, this one has {size:,}")
        records = np.fromfile(file, record)
    except OSError as e:
        raise StoreError(f"{file}: cannot be read: {e.strerror}") from e
    if (records["label"] >= num_classes).any():
        raise StoreError(f"{file}: not {what}: labels up to {records['label'].max()}")
    return records
