"""Exports of runs in timm, by the lines of their cards and by `examples/use_weights.py`. Skips without timm."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fastssl
from fastssl.engine.reopen import open_run
from fastssl.nn.trunks.trunk import Trunk
from tests.support.swatches import swatch

try:
    import timm
except ImportError as error:
    pytest.skip(f"the extra `timm` is missing: {error}", allow_module_level=True)

ROOT = Path(__file__).parents[3]
SMALL = {"view.size": 32, "eval_view.size": 32, "batch_global": 4, "steps": 1, "evaluate": "()"}
OF_TIMM = (
    "resnet18", "resnet50", "vit_small_patch16_224", "vit_tiny_patch16_224", "convnext_atto", "efficientnet_b0",
    "regnety_002",
)  # fmt: skip
OURS = ("resnet(18)", "resnet(50)", "vit(224,16,192,12,3)")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for k, name in enumerate(("dark", "grey", "light")):
        for i in range(40):
            swatch(folder / name / f"{i}.png", 5 * k + i / 40, form="PNG", size=36)
    return folder


def exported(photos: Path, encoder: str, folder: Path) -> tuple[Trunk, Path]:
    """The trunk that a run of one step ended with, and the folder of its export."""
    run = fastssl.train("supervised.mine", data=photos, out=folder / "run", set=SMALL | {"encoder": encoder})
    subject, _ = open_run(folder / "run", ())
    trunk = subject.nets.online.get_submodule("trunk")
    assert isinstance(trunk, Trunk)
    layout = torch.contiguous_format  # training has the other, whose convolutions round otherwise
    return trunk.to("cpu", memory_format=layout).eval(), run.export(folder / "export")


@pytest.mark.parametrize("encoder", [*(f"timm:{model}" for model in OF_TIMM), *OURS])
def test_the_card_s_lines_give_the_run_s_features_in_timm(encoder, photos, tmp_path, monkeypatch):
    """To the bit, on crops of the run's size and of another. Catches a network that takes its first size alone."""
    trunk, folder = exported(photos, encoder, tmp_path)
    card = (folder / "README.md").read_text()
    (lines,) = [block for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if "timm." in block]
    assert f'timm.create_model("{encoder.removeprefix("timm:")}"' in lines or encoder in OURS
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(lines, names)
    for size in (32, 96):
        x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            features = names["model"](x)
            assert torch.equal(features, trunk(x)) and features.std() > 0


def test_the_page_s_lines_take_paws_s_resnet(photos, tmp_path):
    page = (ROOT / "docs" / "weights.md").read_text()
    (lines,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "timm." in block]
    trunk, folder = exported(photos, "resnet(50)", tmp_path)
    path = "runs/paws.rn50_100ep-seed0/export"
    assert path in lines
    names: dict = {}
    exec(lines.replace(path, str(folder)), names)
    assert all(torch.equal(t, trunk.state_dict()[name]) for name, t in names["model"].state_dict().items())


@pytest.mark.parametrize("encoder", ["timm:vit_tiny_patch16_224", "timm:regnety_002", "vit(224,16,192,12,3)"])
def test_the_example_gives_a_photo_s_features_in_timm(encoder, photos, tmp_path):
    """Catches an input that is prepared otherwise than the run's."""
    _, folder = exported(photos, encoder, tmp_path)
    example = runpy.run_path(str(ROOT / "examples" / "use_weights.py"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 44, 3), np.uint8))
    (tmp_path / "photo").mkdir()
    image.save(tmp_path / "photo" / "0.png")
    model = example["load"](folder)
    assert type(model).__module__.startswith(timm.__name__) and not model.training
    with torch.no_grad():
        features = model(example["prepared"](folder, image)).numpy()
    wanted = fastssl.open_run(tmp_path / "run").embed(tmp_path / "photo")
    np.testing.assert_allclose(features, wanted, rtol=1e-3, atol=1e-4)
