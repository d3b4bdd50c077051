"""Images that the benchmarks' tests share."""

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Forty small JPEGs in two classes."""
    root = tmp_path_factory.mktemp("images")
    for label in ("a", "b"):
        (root / label).mkdir()
        for i in range(20):
            small = np.random.default_rng(i).integers(0, 256, (5, 6, 3), np.uint8)
            image = Image.fromarray(small).resize((64, 48), Image.Resampling.BICUBIC)
            image.save(root / label / f"{i}.JPEG", quality=90)
    return root
