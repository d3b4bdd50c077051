"""A trunk as an ONNX file, for any number of images: what onnxruntime makes of it is compared with torch before it is
written (the extra `onnx`)."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fastssl.errors import ConfigError, FastsslError
from fastssl.nn.trunks.trunk import Trunk

ONNX = "backbone.onnx"
TOLERANCE = 1e-4  # of the largest feature; two runtimes that add in another order are 5e-5 apart
BATCHES = (1, 7)  # neither is the one that it is traced with
INPUT, OUTPUT = "images", "features"
_NEEDED = ("onnx", "onnxruntime", "onnxscript")


class OnnxError(FastsslError):
    """A trunk that cannot be written as ONNX, or whose features would be others there."""


def refuse_without_onnx() -> None:
    """Raise ConfigError where a library is missing."""
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise ConfigError(f"--format onnx needs {', '.join(missing)}: install the extra `onnx`")


@torch.no_grad()
def as_onnx(trunk: Trunk, channels: int, size: int) -> bytes:
    """The file: `images` [N, channels, size, size], normalised, to `features` [N, num_features], both float32, N free.

    Raises OnnxError where an operation has no counterpart in ONNX, or the features in onnxruntime are not torch's.
    """
    trunk.eval()
    x = torch.zeros(2, channels, size, size)
    with TemporaryDirectory() as folder:
        path = Path(folder) / ONNX
        try:
            torch.onnx.export(
                trunk, (x,), path, input_names=[INPUT], output_names=[OUTPUT], external_data=False, verbose=False,
                dynamo=True, dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}},
            )  # fmt: skip
        except torch.onnx.errors.OnnxExporterError as error:
            raise OnnxError(f"the trunk cannot be written as ONNX: {_first_line(error)}") from error
        content = path.read_bytes()
    _compare(content, trunk, x.shape[1:])
    return content


def _first_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {str(cause).strip().splitlines()[0]}"


def _compare(content: bytes, trunk: Trunk, shape: torch.Size) -> None:
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    for num in BATCHES:
        x = torch.randn(num, *shape, generator=generator)
        features: Tensor = trunk(x)
        (found,) = session.run([OUTPUT], {INPUT: x.numpy()})
        apart = float((torch.from_numpy(found) - features).abs().max() / features.abs().max())
        if not apart <= TOLERANCE:
            raise OnnxError(f"in onnxruntime features of {num} images are {apart:.1g} of the largest from torch's")
