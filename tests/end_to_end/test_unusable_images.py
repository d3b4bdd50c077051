"""Folders as people have them: some of the images are none. All are listed at once, and replaced where that is asked
for."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from fastssl.commands.main import main

SETTINGS = (
    "encoder.base_width=4", "out_features=8", "batch_global=12", "images_per_class=2", "classes_global=2",
    "length=2steps", "precision=fp32", "log_every=1steps", "labels=all", "evaluate=knn",
)  # fmt: skip
TRAIN = ("train", "paws.cifar10_small", "--data", "data", "--out", "run", *(w for s in SETTINGS for w in ("--set", s)))
BROKEN = [
    ["data/train", "cat/empty.jpg", "it is empty"],
    ["data/train", "cat/page.jpg", "not a JPEG, PNG, WebP, TIFF, BMP or GIF"],
    ["data/train", "dog/panorama.png", "12000 x 6000 pixels are more than the 67108864 allowed"],
    ["data/val", "dog/cut.jpg", "it is empty"],
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Seven images of each of two classes, three for validation, and what is none among them."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split, count in (("train", 7), ("val", 3)):
        for label, name in enumerate(("cat", "dog")):
            path = Path("data", split, name)
            path.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(100 * label, 100 * label + 100, (40, 40, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(path / f"{split}-{name}-{i}.png")
    Path("data/train/cat/empty.jpg").touch()
    Path("data/train/cat/page.jpg").write_text("<!DOCTYPE html><title>404</title>")
    Image.new("1", (12000, 6000)).save("data/train/dog/panorama.png")
    Path("data/val/dog/cut.jpg").touch()


def listed():
    with open("run/damaged.tsv", newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file, delimiter="\t")
    assert header == ["data", "file", "why"]
    return rows


def test_all_that_cannot_be_used_is_listed_at_once(folder):
    """Catches one file named a try, and validation images that end a run after its training."""
    says = (
        "4 images cannot be used: cat/empty.jpg (it is empty), cat/page.jpg (not a JPEG, PNG, WebP, TIFF, BMP or GIF), "
        "dog/panorama.png (12000 x 6000 pixels are more than the 67108864 allowed), ..."
    )
    dry = CliRunner().invoke(main, [*TRAIN, "--dry-run"])
    assert dry.exit_code == 0 and f"warning: {says}" in dry.output, dry.output
    result = CliRunner().invoke(main, TRAIN)
    assert result.exit_code == 1
    assert result.output.splitlines()[-1] == (
        f"Error: {says}; all are listed in run/damaged.tsv: mend or remove them, or let others of their label stand in "
        "with --damaged replace"
    )
    assert listed() == BROKEN and not Path("run/metrics.jsonl").exists()


def test_all_that_cannot_be_used_is_replaced(folder):
    """Catches a run that stops at an empty file, a page or a panorama all the same, and a damaged validation image that
    counts as another one does, in training or in `fastssl evaluate`."""
    result = CliRunner().invoke(main, [*TRAIN, "--damaged", "replace"])
    assert result.exit_code == 0, result.output
    assert sum("cannot be used: cat/empty.jpg" in line for line in result.output.splitlines()) == 1
    assert "is replaced; " not in result.output  # one by one, as those whose headers said nothing
    assert listed() == BROKEN
    found = json.loads(Path("run/result.json").read_text())
    assert found["knn"]["images"] == 6 and found["knn"]["k_used"]["200"] == 14
    replaced = found["replaced_images"]["unlabelled"]
    assert replaced.keys() == {"0", "1", "9"} and not {0, 1, 9} & set(replaced.values())
    again = CliRunner().invoke(main, ["evaluate", "run", "--protocol", "knn"])
    left_out = "warning: 1 of 7 validation images cannot be used, first dog/cut.jpg of data/val; they are left out"
    assert again.exit_code == 0 and left_out in again.stderr, again.output
    assert json.loads(again.stdout)["knn"]["images"] == 6

    for _, file, _ in BROKEN[:3]:
        Path("data/train", file).unlink()
    Path("data/val", BROKEN[3][1]).unlink()
    mended = CliRunner().invoke(main, [*TRAIN[:5], "mended", *TRAIN[6:]])
    assert mended.exit_code == 0 and not Path("mended/damaged.tsv").exists(), mended.output
