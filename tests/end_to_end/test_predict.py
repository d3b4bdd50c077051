"""`fastssl predict` on a run, and on what it exported: the same table."""

import csv

import pytest
from click.testing import CliRunner

from fastssl.commands.main import main
from tests.support.swatches import swatch


def fastssl(*arguments):
    result = CliRunner().invoke(main, [str(each) for each in arguments], catch_exceptions=False)
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes that a few steps tell apart, a run on them, and its export."""
    folder = tmp_path_factory.mktemp("predict")
    for name, red in (("dark", 1), ("light", 11)):
        for i in range(8):
            swatch(folder / "sorted" / name / f"{i}.png", red + i / 10, form="PNG")
    changes = ("encoder.base_width=4", "batch_global=8", "length=30steps", "rate.peak=0.05", "labels=all")
    data = (folder / "sorted",)
    given = [word for each in changes for word in ("--set", each)] + [
        word for each in data for word in ("--data", each)
    ]
    code, output = fastssl("train", "supervised.digits", *given, "--out", folder / "run")
    assert code == 0, output
    code, output = fastssl("export", folder / "run")
    assert code == 0, output
    return folder


def test_a_run_and_its_export_say_the_same_of_every_image(folder):
    for where, out in (("run", "a.csv"), ("run/export", "b.csv")):
        code, output = fastssl(
            "predict", folder / where, "--data", folder / "sorted", "--out", folder / out, "--review", folder / "r.html"
        )
        assert code == 0, output
    assert (folder / "a.csv").read_text() == (folder / "b.csv").read_text()
    rows = list(csv.DictReader((folder / "a.csv").open()))
    assert len(rows) == 16 and rows[0].keys() == {"file", "class", "probability", "runner_up"}
    assert all(row["file"].startswith(row["class"]) and 0.5 <= float(row["probability"]) <= 1 for row in rows)
    assert "What to look at next" in (folder / "r.html").read_text()


def test_a_classifier_needs_none_of_the_data_it_learnt_from(folder):
    """A run that is taken to where the new photos are."""
    (folder / "sorted").rename(folder / "elsewhere")
    try:
        code, output = fastssl("predict", folder / "run", "--data", folder / "elsewhere", "--out", folder / "c.csv")
        assert code == 0, output
        rows = list(csv.DictReader((folder / "c.csv").open()))
        assert all(row["file"].startswith(row["class"]) for row in rows) and len(rows) == 16
    finally:
        (folder / "elsewhere").rename(folder / "sorted")


def test_what_cannot_be_predicted_is_one_line(folder, tmp_path):
    for arguments, said in (
        (("run", "--data", tmp_path), "no images"),
        (("run", "--data", folder / "sorted", "--data", folder / "sorted"), "give the images once"),
        (("sorted", "--data", folder / "sorted"), "neither a run nor an exported folder"),
    ):
        code, output = fastssl("predict", folder / arguments[0], *arguments[1:], "--out", tmp_path / "x.csv")
        assert code == 1 and said in output and len(output.splitlines()) == 1
        assert not (tmp_path / "x.csv").exists()
