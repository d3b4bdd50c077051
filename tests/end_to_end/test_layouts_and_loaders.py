"""Layouts with loaders through the real command line: the same losses, scores and tables of embeddings from all."""

import csv
import json
from importlib.util import find_spec

import numpy as np
import pytest
from click.testing import CliRunner

from fastssl.commands.main import main
from tests.end_to_end import command
from tests.support.imagenet_trees import folder_tree, wnids
from tests.support.layouts import LAYOUTS

SMALLEST = ("encoder.base_width=4", "batch_global=4", "length=2steps", "precision=fp32", "log_every=1steps")
ROWS = (
    ("tiny_imagenet", "pil"), ("kaggle", "ffcv"), ("betons", "turbo"), ("raw_betons", "turbo"),
    ("class_archives", "dali"),
)  # fmt: skip
PACKAGES = {"ffcv": "ffcv", "dali": "nvidia"}


def invoke(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def walked(folder, layout, loader, tree):
    """Train, evaluate and embed; (losses, scores, rows of the tables of embeddings by role, without files, and the
    features)."""
    (folder / "laid").mkdir(parents=True)
    data = [part for value in LAYOUTS[layout](tree, folder / "laid") for part in ("--data", value)]
    run, changes = folder / "run", [part for change in SMALLEST for part in ("--set", change)]
    invoke("train", "supervised.cifar10_small", *data, "--labels", "all", "--loader", loader, "--out", run, *changes)
    scores = json.loads(invoke("evaluate", run, "--protocol", "knn"))
    invoke("embed", run)
    tables, features = {}, {}
    for role in ("unlabelled", "validation"):
        with open(run / "embeddings" / f"{role}.csv", newline="") as file:
            tables[role] = [(row["id"], row["class"]) for row in csv.DictReader(file)]
        features[role] = np.load(run / "embeddings" / f"{role}.features.npy").tolist()
    losses = [record["loss"] for record in command.metrics(run) if "loss" in record]
    return losses, scores["knn_top1"], tables, features


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return folder_tree(tmp_path_factory.mktemp("tree") / "tree", 3, 5, 2)


@pytest.fixture(scope="module")
def reference(tree, tmp_path_factory):
    return walked(tmp_path_factory.mktemp("reference"), "folders", "turbo", tree)


@pytest.mark.parametrize(("layout", "loader"), ROWS)
def test_a_run_is_the_same_from_each(layout, loader, tree, reference, tmp_path):
    """Would catch a layout that numbers images or classes otherwise, and a loader that the command line ignores data
    with. DALI's pixels are near the others', not theirs."""
    if loader in PACKAGES and not find_spec(PACKAGES[loader]):
        pytest.skip(f"the extra {loader} is not installed")
    losses, score, tables, features = walked(tmp_path, layout, loader, tree)
    assert losses == (pytest.approx(reference[0], rel=0.02) if loader == "dali" else reference[0])
    assert tables == reference[2] and len(tables["validation"]) == 6
    assert {name for _, name in tables["unlabelled"]} == set(wnids(3))
    assert (score, features) == (reference[1], reference[3]) or loader == "dali"
