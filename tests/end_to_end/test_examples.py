"""Each of `examples/` that is a program runs, short, and does what it says."""

import csv
import json
import runpy

import numpy as np
import pytest
import torch
from PIL import Image

import fastssl
from tests.end_to_end import command
from tests.support import plain_resnet
from tests.support.swatches import swatch

EXAMPLES = command.ROOT / "examples"
SHORT = {"encoder.base_width": 16, "epochs": 1}


def example(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for k, name in enumerate(("dark", "grey", "light")):
        for i in range(40):
            swatch(folder / name / f"{i}.png", 5 * k + i / 40, form="PNG", size=36)
    return folder


@pytest.fixture(scope="module")
def table(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("few_labels")
    return example("few_labels")["few_labels"](photos, photos / "dark", "per-class=5", out, SHORT)


def test_a_loop_of_ones_own_learns(photos, capsys):
    losses = example("own_loop")["train"](str(photos), epochs=3, size=32)
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert capsys.readouterr().out.count("epoch") == 3


def test_few_labels_ends_with_a_table(table):
    rows = list(csv.DictReader(table.open()))
    assert len(rows) == 40 and {row["class"] for row in rows} <= {"dark", "grey", "light"}


def test_weights_in_plain_torch_give_the_runs_features(photos, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "torchvision", plain_resnet.TORCHVISION)
    wide = {
        "encoder": "resnet(10,stem=cifar)",
        "steps": 2,
        "evaluate": "classifier",
    }  # torchvision knows no narrow ones
    run = fastssl.train("supervised.mine", data=photos, out=tmp_path / "run", set=wide)
    folder, module = run.export(tmp_path / "export"), example("use_weights")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 44, 3), np.uint8))
    (tmp_path / "photo").mkdir()
    image.save(tmp_path / "photo" / "0.png")
    with torch.no_grad():
        features = module["load"](folder)(module["prepared"](folder, image))
    np.testing.assert_allclose(features.numpy(), run.embed(tmp_path / "photo"), rtol=1e-3, atol=1e-4)


def test_the_notebooks_cells_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "notebook.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert "fastssl.train" in code[0]
    small = {change.partition("=")[0]: change.partition("=")[2] for change in command.TINY}
    monkeypatch.setattr(fastssl, "train", lambda *a, **k: _train(*a, **{**k, "set": small}), raising=False)
    _train = fastssl.__getattr__("train")
    names: dict = {}
    for each in code:
        exec(each, names)
    assert len(names["losses"]) == 12 and names["encoder"].num_features == 32
