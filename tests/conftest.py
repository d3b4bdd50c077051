"""Fixtures for the real data that lies outside the repository.

FASTSSL_TEST_DATA names a folder with label lists and sample images, FASTSSL_TEST_CIFAR10 one with CIFAR-10's official
binary files. Unset, a test that needs one skips and says so; set, a missing file is a failure.

Where there is no GPU, Triton kernels run under their interpreter.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fastssl.commands import installed

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when triton is imported, which torch's optimisers also do


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave kernels out whose interpreter does not run with this NumPy; that they compile is tested all the same."""
    known = [row for row in installed.pairs() if "interpreter" in row.remedy]
    if known and "TRITON_INTERPRET" in os.environ:
        skip = pytest.mark.skip(reason=f"{known[0].found}: {known[0].remedy}")
        for item in items:
            if item.path.stem.endswith("_triton"):
                item.add_marker(skip)


def _folder(variable: str, holds: str, witness: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: it names the folder with {holds}")
    folder = Path(value)
    if not (folder / witness).exists():
        pytest.fail(f"{variable} is set, but {folder / witness} is missing")
    return folder


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder with `splits/` (label lists) and `imagenet-sample/` (a few hundred training images)."""
    return _folder("FASTSSL_TEST_DATA", "splits/ and imagenet-sample/", "splits")


@pytest.fixture(scope="session")
def cifar10_dir() -> Path:
    """`cifar-10-batches-bin`: data_batch_1.bin to data_batch_5.bin, test_batch.bin, batches.meta.txt."""
    return _folder("FASTSSL_TEST_CIFAR10", "CIFAR-10's binary files (data_batch_1.bin, ...)", "data_batch_1.bin")
