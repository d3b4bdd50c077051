"""What tests of the conversion share: a conversion in one thread, what it leaves, and files to spoil."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loaders.convert import manifest
from loaders.convert.conversion import Options, convert, prepare
from tests.support.imagenet_trees import encoded

PHOTO = encoded(0, 40, 60)
PNG16 = io.BytesIO()
Image.fromarray(np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000).save(PNG16, "PNG")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setattr(manifest, "_num_threads", lambda: 1)


def run(source: Path, out: Path, **options):
    return convert(prepare(source, Options(**options)), out)


def contents(out: Path) -> dict[str, str]:
    """File name -> sha256, hidden ones too."""
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(out.iterdir())}


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]
