"""The ways that data takes into a run and results out of it, each walked once through the real command line."""

import csv
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from fastssl.commands.main import main
from loaders.store.beton import BetonWriter
from loaders.store.cifar import CLASS_NAMES, open_cifar10
from tests.end_to_end import command

CIFAR = [
    part
    for change in (
        "encoder.base_width=4", "out_features=8", "batch_global=16", "images_per_class=2", "length=2steps",
        "precision=fp32", "log_every=1steps",
    )
    for part in ("--set", change)
]  # fmt: skip
DIGITS = (*command.CHANGES, "--set", "length=3steps", "--set", "precision=fp32")


def invoke(*arguments):
    """The output of a command that must succeed; without what it only tells a person."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def images(cifar10_dir):
    """1,000 training images of CIFAR-10 as (JPEG bytes, label)."""
    source, _ = open_cifar10(cifar10_dir)

    def jpeg(pixels):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=95)
        return file.getvalue()

    return [(jpeg(source.images[i]), int(source.labels[i])) for i in range(1000)]


def losses(run_dir):
    return [record["loss"] for record in command.metrics(Path(run_dir)) if "loss" in record]


def test_beton_of_jpegs_trains_through_pil(images):
    with BetonWriter("train.beton", len(images), CLASS_NAMES) as writer:
        for i, (jpeg, label) in enumerate(images):
            writer.add(jpeg, label, f"{i}.jpg")
    options = ("--data", "train.beton", "--labels", "per-class=20", "--loader", "pil", "--out", "run", *CIFAR)
    output = invoke("train", "paws.cifar10_small", *options, "--data", "validation=none")
    assert "train.beton: all, 1,000 images; 16 a step" in output
    assert "train.beton: 20-per-class-split-0, 200 images; 20 a step" in output
    assert "warning: no validation images, so nothing is evaluated: give --data validation=PATH" in output
    assert len(losses("run")) == 2 and np.isfinite(losses("run")).all()
    again = invoke("train", "paws.cifar10_small", *options)  # it goes on as it was begun: nothing is held out
    assert "finished: paws.cifar10_small" in again and "held out" not in again


def test_unlabelled_folder_beside_a_small_labelled_one_trains_paws(images):
    """Many images without classes and few with: the field's real case."""
    for i, (jpeg, label) in enumerate(images[:200]):
        path = Path("labelled", CLASS_NAMES[label]) if i < 100 else Path("many")
        path.mkdir(parents=True, exist_ok=True)
        (path / f"{i}.jpg").write_bytes(jpeg)
    data = ("--data", "unlabelled=many", "--data", "labelled=labelled")
    output = invoke("train", "paws.cifar10_small", *data, "--labels", "all", "--out", "run", *CIFAR)
    shown = np.array([label for _, label in images[:100]])  # all ten classes, whose names are in order
    counts = np.bincount(shown)
    held = np.where(counts > 1, np.maximum(1, counts // 10), 0)
    assert "many: all, 100 images; 16 a step" in output
    assert f"labelled: all, {100 - held.sum()} images; 20 a step" in output
    assert f"labelled: no validation images, so {held.sum()} of its 100 are held out" in output
    assert f"one image is {100 / held.sum():.0f} points of a score" in output
    assert len(losses("run")) == 2 and np.isfinite(losses("run")).all()

    scores = json.loads(invoke("evaluate", "run", "--protocol", "soft-nn"))
    assert scores["step"] == 2 and scores["provenance"]["validation"]["count"] == held.sum()
    both = [*data, "--data", "validation=labelled"]
    anew = ["train", "paws.cifar10_small", "--labels", "all", *CIFAR]
    for words in (["evaluate", "run", "--protocol", "soft-nn"], anew):
        refused = CliRunner().invoke(main, [*words, *both])
        assert refused.exit_code == 1
        assert "100 of 100 validation images are among the labelled images of labelled too" in refused.output

    written = invoke("embed", "run").split()
    assert written == [f"run/embeddings/{role}.json" for role in ("labelled", "unlabelled", "validation")]
    features = np.load("run/embeddings/unlabelled.features.npy")
    assert features.shape == (100, 32) and features.dtype == np.float32 and np.isfinite(features).all()
    assert (np.load("run/embeddings/unlabelled.labels.npy") == -1).all()
    labels, ids = (np.load(f"run/embeddings/labelled.{name}.npy") for name in ("labels", "ids"))
    assert (np.bincount(labels) == counts - held).all()
    assert (np.bincount(np.load("run/embeddings/validation.labels.npy"), minlength=10) == held).all()
    with open("run/embeddings/labelled.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["row", "id", "file", "class"] and [int(row[0]) for row in rows] == list(range(len(labels)))
    assert [int(row[1]) for row in rows] == ids.tolist()
    assert [row[3] for row in rows] == [CLASS_NAMES[label] for label in labels]
    files = {f"{CLASS_NAMES[label]}/{i}.jpg" for i, (_, label) in enumerate(images[:100])}
    assert {row[2] for row in rows} < files and all(row[2].startswith(f"{row[3]}/") for row in rows)
    about = json.loads(Path("run/embeddings/labelled.json").read_text())
    assert about["class_names"] == list(CLASS_NAMES) and about["table"]["file"] == "labelled.csv"
    assert about["table"]["sha256"] == hashlib.sha256(Path("run/embeddings/labelled.csv").read_bytes()).hexdigest()
    unlabelled = Path("run/embeddings/unlabelled.csv").read_text().splitlines()
    assert len(unlabelled) == 101 and unlabelled[1].endswith(".jpg,")
    Path("many").rename("elsewhere")
    refused = CliRunner().invoke(main, ["evaluate", "run", "--protocol", "soft-nn"]).output
    assert "Error: many: no such file or folder; it is what the run was trained on: give --data" in refused


def test_seeds_their_spread_and_what_a_finished_run_says():
    command_line = ("train", "--seeds", "0,1", *DIGITS)
    output = invoke(*command_line)
    results = [json.loads(Path(f"runs/paws.digits-seed{seed}/result.json").read_text()) for seed in (0, 1)]
    scores = [result["soft_nn_top1"] for result in results]
    assert [result["seed"] for result in results] == [0, 1]
    assert losses("runs/paws.digits-seed0") != losses("runs/paws.digits-seed1")
    assert f"soft_nn_top1: {100 * np.mean(scores):.1f} ± {100 * np.std(scores, ddof=1):.1f} (2 seeds)" in output
    kept = json.loads(Path("runs/paws.digits-seeds-0-1.json").read_text())
    assert kept["scores"]["soft_nn_top1"]["values"] == scores

    run = "runs/paws.digits-seed0"
    again = json.loads(invoke("evaluate", run, "--protocol", "soft-nn"))
    assert again["soft_nn_top1"] == scores[0] and again["provenance"] == results[0]["provenance"]

    before = {path: path.stat().st_mtime_ns for path in Path(run).rglob("*")}
    output = invoke("train", *DIGITS)
    assert output.startswith(f"finished: paws.digits, seed 0, in {run}\n")
    assert f"soft_nn_top1{' ' * 19}{scores[0]:.4f}" in output and f"fastssl evaluate {run}" in output
    assert before == {path: path.stat().st_mtime_ns for path in Path(run).rglob("*")}


def test_resume_never_starts_over(tmp_path):
    """Catches old checkpoints that outlive a fresh start and are continued from at the next stop."""
    invoke("train", "--out", "run", *DIGITS)
    first = losses("run")
    Path("run/checkpoints/step-00000003").rename("run/checkpoints/step-00000009")  # of a longer run, say
    invoke("train", "--out", "run", "--resume", "never", *DIGITS)
    assert [path.name for path in Path("run/checkpoints").glob("step-*")] == ["step-00000003"]
    assert losses("run") == first


def test_init_from_takes_the_weights_alone():
    invoke("train", "--out", "first", *DIGITS)
    invoke("train", "--out", "second", "--init-from", "first", *DIGITS)
    invoke("train", "--out", "third", "--init-from", "first/checkpoints/step-00000003", *DIGITS)
    assert losses("second") == losses("third") != losses("first")
    assert len(losses("second")) == 3
