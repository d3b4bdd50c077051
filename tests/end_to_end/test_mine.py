"""One's own images, from a folder to predictions: paws.mine, supervised.mine from it, simclrv2.mine without labels."""

import csv
import json

import pytest
from click.testing import CliRunner

from fastssl.commands.main import main
from tests.support.swatches import swatch

SHORT = ("--set", "encoder.base_width=16", "--set", "epochs=1")


def fastssl(*arguments):
    result = CliRunner().invoke(main, [str(each) for each in arguments], catch_exceptions=False)
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A hundred and twenty images of three shades, forty of each."""
    folder = tmp_path_factory.mktemp("photos")
    for k, name in enumerate(("dark", "grey", "light")):
        for i in range(40):
            swatch(folder / name / f"{i}.png", 5 * k + i / 40, form="PNG", size=36)
    return folder


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mine") / "run"
    code, output = fastssl("train", "paws.mine", "--data", photos, "--labels", "per-class=5", "--out", folder, *SHORT)
    assert code == 0, output
    return folder, output


def test_choices_are_said_and_the_run_evaluates_and_predicts(run, photos, tmp_path):
    folder, output = run
    assert "crops of 32 pixels" in output and "show one of 3 classes" in output
    assert "2 stages" in output and "of one: labels.epochs, pretrain.epochs" in output
    assert output.count("\nnext\n") == 1 and f"fastssl report {folder}" in output  # at the end alone
    code, scores = fastssl("evaluate", folder, "--protocol", "knn")
    assert code == 0 and 0 <= json.loads(scores[scores.index("{") :])["knn_top1"] <= 1
    code, output = fastssl("predict", folder, "--data", photos, "--out", tmp_path / "p.csv")
    assert code == 0, output
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert len(rows) == 120 and {row["class"] for row in rows} <= {"dark", "grey", "light"}


def test_the_same_command_continues_and_another_recipe_begins_from_it(run, photos, tmp_path):
    """Choices that come out otherwise the second time, networks that do not fit each other."""
    folder, _ = run
    code, output = fastssl("train", "paws.mine", "--data", photos, "--labels", "per-class=5", "--out", folder, *SHORT)
    assert code == 0 and "finished: paws.mine" in output
    code, output = fastssl("train", "supervised.mine", "--data", photos, "--init-from", folder, "--out",
                           tmp_path / "tuned", *SHORT)  # fmt: skip
    assert code == 0 and "weights from" in output, output


def test_images_without_any_label_need_simclr(photos, tmp_path):
    for k in range(2):
        for file in (photos / "dark").iterdir():
            (tmp_path / "flat").mkdir(exist_ok=True)
            (tmp_path / "flat" / f"{k}-{file.name}").write_bytes(file.read_bytes())
    (tmp_path / "flat" / "100.png").write_bytes(file.read_bytes())
    for i in range(30):
        (tmp_path / "flat" / f"more-{i}.png").write_bytes(file.read_bytes())
    code, output = fastssl("train", "paws.mine", "--data", tmp_path / "flat", "--out", tmp_path / "a")
    assert code == 1 and "simclrv2.mine" in output and len(output.splitlines()) == 1
    code, output = fastssl("train", "simclrv2.mine", "--data", tmp_path / "flat", "--out", tmp_path / "b", *SHORT)
    assert code == 0, output


def test_bad_sets_are_refused_before_anything_is_made(photos, tmp_path):
    for k, name in enumerate("ab"):
        for i in range(15):
            swatch(tmp_path / "few" / name / f"{i}.png", k, form="PNG", size=36)
    for data, said in (
        (tmp_path / "few", "28 images to learn from"),
        (photos / "dark", "40 images to learn from are too few"),
    ):
        code, output = fastssl("train", "supervised.mine", "--data", data, "--out", tmp_path / "run")
        assert code == 1 and said in output and len(output.splitlines()) == 1
    assert not (tmp_path / "run").exists()
