"""Compiled kernels give the same bits in the process that compiled them as in those that load them from the cache."""

import os
import subprocess
import sys
from pathlib import Path

_DIGESTS = """
import hashlib
import numpy as np
from loaders.finish import numba_cpu
from loaders.plan import ops
from loaders.plan.draws import mix, uniforms
from loaders.plan.views import IMAGENET, Filter
from loaders.renderers.resample import CODES, resize_boxes

images = np.random.default_rng(0).integers(0, 256, (6, 56, 60, 3), dtype=np.uint8)
crops = np.empty((6, 40, 40, 3), np.uint8)
boxes = np.tile([3.0, 5.0, 50.0, 49.0], (6, 1))
resize_boxes(images, np.arange(6), boxes, True, CODES[Filter.BILINEAR], crops)
print("resize", hashlib.sha256(crops.tobytes()).hexdigest())
chain = (ops.Flip(1.0), ops.ColourJitter(1.0, 0.8, 0.8, 0.8, 0.2), ops.Grayscale(0.2), ops.GaussianBlur(1.0))
for op in (*chain, ops.Affine(1.0), ops.Noise(1.0), ops.GaussianKernelBlur(1.0), ops.HsvNoise(1.0)):
    out = np.empty(crops.shape, np.float32)
    table = op.parameters(uniforms(mix(np.arange(6)), op.num_draws))
    numba_cpu.finish(crops, (op,), (table,), IMAGENET, out)
    print(type(op).__name__, hashlib.sha256(out.tobytes()).hexdigest())
"""


def test_fresh_and_cached_code_agree_bit_for_bit(tmp_path):
    """Catches freedoms of fastmath that change rounding: a run that is continued loads what the first one compiled."""
    root = Path(__file__).parents[4]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", _DIGESTS]
    fresh, cached = (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout for _ in range(2)
    )
    assert fresh.count("\n") == 9 and fresh == cached
