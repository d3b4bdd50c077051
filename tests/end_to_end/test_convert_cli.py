"""`fastssl convert-imagenet` as users type it, and that its result is what training opens."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from fastssl.commands.main import main
from loaders.store.data import open_data
from tests.support.imagenet_trees import encoded, folder_tree, official_tree


@pytest.fixture(autouse=True)
def one_core(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})


def typed(*words: object) -> Result:
    return CliRunner().invoke(main, ["convert-imagenet", *map(str, words)])


@pytest.fixture
def tree(tmp_path) -> Path:
    root = folder_tree(tmp_path / "src", 3, per_class=4, val_per_class=2)
    (root / "train" / "n01440764" / "photo.JPEG").write_bytes(encoded(1, mode="CMYK"))
    (root / "train" / "n01440764" / "cut.JPEG").write_bytes(encoded(2)[:-2])
    return root


def test_convert_tells_what_it_did_and_training_opens_the_result(tree, tmp_path):
    out = tmp_path / "out"
    done = typed(tree, out)
    assert done.exit_code == 0, done.output
    for line in (
        "train: 13 images, 4 to 5 in each of 3 classes",
        "  written anew: 1",
        "    n01440764/photo.JPEG: CMYK, now an RGB JPEG",
        "  quarantined, NOT in the set: 1",
        "    n01440764/cut.JPEG: truncated",
        "val: 6 images, 2 to 2 in each of 3 classes",
    ):
        assert line in done.output.splitlines(), done.output
    assert "train: 14 of 14," in done.output and done.output.rstrip().endswith(" s")
    data = open_data((str(out),))
    assert len(data.get("train")) == 13 and np.bincount(data.get("validation").labels).tolist() == [2, 2, 2]
    assert typed("--verify", out).exit_code == 0
    assert typed(tree, out).exit_code == 0


def test_dry_run_writes_nothing(tree, tmp_path):
    done = typed(tree, tmp_path / "out", "--dry-run")
    assert done.exit_code == 0 and not (tmp_path / "out").exists()
    assert "train: 14 images, 3 classes" in done.output and "GiB are free" in done.output


def test_archives_and_options(tree, tmp_path):
    archives = official_tree(tmp_path / "archives", folder_tree(tmp_path / "plain", 2))
    done = typed(archives, tmp_path / "a", "--no-decode-check", "--quality", "80", "--max-side", "16")
    assert done.exit_code == 0, done.output
    assert open_data((str(tmp_path / "a"),)).get("train").sizes.max() == 16
    (tmp_path / "list.txt").write_text("n01440764_9.JPEG\n")
    done = typed(archives, tmp_path / "b", "--subset", tmp_path / "list.txt")
    assert "train: 1 images" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{src}"], "takes SRC and OUT, or --verify OUT"),
        (["{src}", "{out}", "--reencode", "90,512"], "is now --max-side N [--quality Q]"),
        (["{src}", "{out}", "--quality", "80"], "give --max-side too"),
        (["{src}", "{out}", "--subset", "mine"], "label list 'mine' was not found"),
        (["{out}", "{src}"], "out: no such file or folder"),
        (["{src}", "--verify", "{out}"], "--verify OUT stands alone"),
        (["--verify", "{out}"], "manifest.json: cannot be read: No such file or directory"),
    ],
)
def test_mistakes_are_one_line(tree, tmp_path, words, message):
    done = typed(*(word.format(src=tree, out=tmp_path / "out") for word in words))
    assert done.exit_code == 1 and message in done.output
    assert done.output.count("\n") == 1 and done.output.startswith("Error: ")
