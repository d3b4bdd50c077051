"""Exports as ONNX, and of timm's trunks, used as their model cards say. Skips what needs a library that is missing."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from fastssl.commands.main import main
from fastssl.errors import ConfigError
from fastssl.export import onnx
from fastssl.nn.encoders.resnet import ResNet
from fastssl.nn.encoders.timm_models import Timm
from fastssl.nn.encoders.vit import ViT
from fastssl.nn.trunks.trunk import Trunk
from loaders.plan.views import CIFAR10
from tests.support.definitions import with_moved_norms


def need(*libraries: str) -> None:
    if missing := [name for name in libraries if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{', '.join(missing)} missing: the extras `onnx` and `timm`")


class Unwritable(Trunk):
    """Its features are ordered by an operation that ONNX has not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvalsh(x[:, 0])


class OtherThere(Trunk):
    """What is traced is not what it gives."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)) * (2 if torch.compiler.is_exporting() else 1)


def test_features_are_torch_s_for_any_number_of_images():
    """Catches a batch that is fixed at that of the trace. The trunk's crops have positions that are interpolated."""
    need("onnx", "onnxruntime", "onnxscript")
    import onnxruntime

    trunk = ViT(8, 4, 16, 2, 2).build(1)
    session = onnxruntime.InferenceSession(onnx.as_onnx(trunk, 1, 12))
    for num in (1, 5):
        x = torch.randn(num, 1, 12, 12)
        (found,) = session.run(None, {"images": x.numpy()})
        wanted = trunk(x).detach()
        assert (torch.from_numpy(found) - wanted).abs().max() < 1e-4 * wanted.abs().max()


REAL = {
    "a ResNet": ResNet(10, stem="cifar", base_width=16),
    "a vision transformer": ViT(24, 4, 96, 4, 3),
    "timm's": Timm("efficientnet_b0"),
}


@pytest.mark.parametrize("encoder", REAL.values(), ids=REAL)
def test_features_of_real_images_are_torch_s(encoder, cifar10_dir):
    """Test images of CIFAR-10, one and seven at a time, through networks whose norms are shaken. Catches rounding that
    grows with the brightness and contrast that noise has not."""
    need("onnx", "onnxruntime", "onnxscript", *(("timm", "torchvision") if isinstance(encoder, Timm) else ()))
    import onnxruntime

    images = np.fromfile(cifar10_dir / "test_batch.bin", np.uint8, 14 * 3073).reshape(14, 3073)[:, 1:]
    pixels = torch.from_numpy(images.reshape(14, 3, 32, 32) / np.float32(255))
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (CIFAR10.mean, CIFAR10.std))
    torch.manual_seed(0)
    trunk = with_moved_norms(encoder.build(3)).eval()
    session = onnxruntime.InferenceSession(onnx.as_onnx(trunk, 3, 32))
    for x in (pixels[:1], pixels[:7], pixels[7:]):
        x = (x - mean) / std
        (found,) = session.run(None, {"images": x.numpy()})
        wanted = trunk(x).detach()
        assert (torch.from_numpy(found) - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_what_cannot_be_written_and_what_would_differ_is_refused():
    need("onnx", "onnxruntime", "onnxscript")
    with pytest.raises(onnx.OnnxError, match="the trunk cannot be written as ONNX: "):
        onnx.as_onnx(Unwritable(), 1, 4)
    with pytest.raises(onnx.OnnxError, match="features of 1 images are 1 of the largest from torch's"):
        onnx.as_onnx(OtherThere(), 1, 4)


def test_missing_libraries_are_named_with_the_extra(monkeypatch):
    monkeypatch.setattr(onnx, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(ConfigError, match="--format onnx needs onnxscript: install the extra `onnx`"):
        onnx.refuse_without_onnx()


def code(card: str, holding: str) -> str:
    (found,) = [block for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if holding in block]
    return found


def test_a_run_on_timm_s_backbone_is_used_as_its_card_says(tmp_path: Path):
    """The same features in fastssl's trunk, in timm's network by its names, and in onnxruntime."""
    need("onnx", "onnxruntime", "onnxscript", "timm", "torchvision")
    settings = ("encoder=timm:regnety_002", "steps=2", "evaluate=()")
    changes = [word for setting in settings for word in ("--set", setting)]
    for command in (
        ["train", "supervised.digits", "--out", f"{tmp_path}/run", *changes],
        ["export", f"{tmp_path}/run", "--format", "onnx", "--out", f"{tmp_path}/out"],
    ):
        done = CliRunner().invoke(main, command)
        assert done.exit_code == 0, done.output
    card = (tmp_path / "out" / "README.md").read_text()
    images = torch.rand(7, 1, 8, 8)
    torch.save(images, tmp_path / "out" / "images.pt")
    script = "\n".join((
        "import torch", "torch.set_num_threads(1)", code(card, "timm.create_model"), 'images = torch.load("images.pt")',
        "with torch.no_grad(): torch.save(model(images), 'timm.pt')", "images = images.numpy()",
        code(card, "onnxruntime"), "torch.save(torch.from_numpy(features), 'onnx.pt')",
    ))  # fmt: skip
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path / "out", check=True)
    trunk = Timm("regnety_002").build(1).eval()
    trunk.load_state_dict(load_file(tmp_path / "out" / "backbone.safetensors"))
    wanted = trunk(images).detach()
    assert torch.allclose(torch.load(tmp_path / "out" / "timm.pt"), wanted, atol=1e-6)
    assert (torch.load(tmp_path / "out" / "onnx.pt") - wanted).abs().max() < 1e-4 * wanted.abs().max()
