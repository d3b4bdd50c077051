"""Fine-tuning through the real command line: from a run of PAWS to a classifier and to SuNCEt, and what is refused."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from fastssl.commands.main import main
from tests.end_to_end import command


def options(*changes):
    """The smallest networks and batches, for three steps."""
    common = ("encoder.base_width=4", "length=3steps", "precision=fp32", "log_every=1steps")
    return [part for change in (*common, *changes) for part in ("--set", change)]


PAWS = options("out_features=8", "batch_global=16", "images_per_class=2")
CLASSIFIER = options("head.features=32", "batch_global=16")
SUNCET = options("out_features=8", "images_per_class=2")


def train(recipe, out, *arguments, images="images"):
    data = ("--data", images, "--labels", "all")
    return CliRunner().invoke(main, ["train", recipe, "--out", str(out), *data, *map(str, arguments)])


def trained(*arguments, **data):
    """Output of a command that must succeed."""
    result = train(*arguments, **data)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten classes of images, the first five of them apart, and a run of PAWS on them."""
    folder = tmp_path_factory.mktemp("finetune")
    rng = np.random.default_rng(0)
    for kind, num_classes in (("images", 10), ("five", 5)):
        for label in range(num_classes):
            path = folder / kind / f"class{label}"
            path.mkdir(parents=True)
            for i in range(5):
                Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(path / f"{label}-{i}.png")
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        trained("paws.cifar10_small", "paws", *PAWS)
        trained("supervised.cifar10_finetune", "finetuned", "--init-from", "paws", *CLASSIFIER)
    return folder


@pytest.fixture(autouse=True)
def _here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def test_a_run_of_paws_is_fine_tuned():
    """The first loss is that of logits of zero, and then it moves."""
    lines = command.metrics(Path("finetuned"))
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] == pytest.approx(math.log(10), rel=1e-6) and losses[1] != losses[0]
    evaluated = next(line["evaluation"] for line in lines if "evaluation" in line)
    assert {"classifier_top1", "knn_top1"} <= evaluated.keys()


def test_a_run_of_paws_is_fine_tuned_for_nearest_neighbours():
    trained("suncet.cifar10_small", "suncet", "--init-from", "paws", *SUNCET)
    lines = command.metrics(Path("suncet"))
    assert sum("loss" in line for line in lines) == 3
    assert "soft_nn_top1" in next(line["evaluation"] for line in lines if "evaluation" in line)


@pytest.mark.parametrize("recipe", ["supervised.cifar10_finetune", "suncet.cifar10_small"])
def test_what_to_start_from_is_asked_for_at_the_door(recipe):
    result = train(recipe, "none")
    assert result.exit_code == 1 and f"{recipe} builds on another run: give --init-from PATH" in result.output
    assert not Path("none").exists()


@pytest.mark.parametrize(
    ("init", "changes", "says"),
    [
        ("paws", ["encoder.base_width=8"], "has another encoder"),
        ("paws", ["head.features=64"], "has another first projection layer"),
        ("paws", ["eval_view.pixels.mean=0.0", "eval_view.pixels.std=1.0"], "was trained on pixels of mean [0.4914"),
        ("finetuned", ["head=none"], "classifies what a first projection layer makes"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_to_set(init, changes, says, tmp_path):
    """And what it says to set helps."""
    arguments = ["--init-from", init, *CLASSIFIER, *(part for change in changes for part in ("--set", change))]
    result = train("supervised.cifar10_finetune", tmp_path / "run", *arguments)
    assert result.exit_code == 1 and says in result.output and "nothing loaded" in result.output, result.output
    if remedy := re.findall(r"--set \S+", result.output):
        trained("supervised.cifar10_finetune", tmp_path / "next", *arguments, *" ".join(remedy).split())


def test_classes_that_differ_get_a_new_classifier(tmp_path):
    """Which starts at logits of zero, as none that was learnt does; beside the trunk that was."""
    said = trained(
        "supervised.cifar10_finetune", tmp_path / "run", "--init-from", "finetuned", *CLASSIFIER, images="five"
    )
    assert said.count("a new classifier for 5 classes: finetuned/checkpoints/step-00000003/state.pt tells 10") == 1
    losses = [line["loss"] for line in command.metrics(tmp_path / "run") if "loss" in line]
    assert losses[0] == pytest.approx(math.log(5), rel=1e-6)
