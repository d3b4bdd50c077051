"""Tables of results say what their runs wrote, and do no run twice."""

import json
from pathlib import Path
from subprocess import CompletedProcess

import click
import pytest

from tools import table as tables

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
DESCRIPTION = """
scores = {"nearest neighbours" = "knn_top1", "classifier" = "classifier_top1"}
seeds = [0, 1]
shared = "--data digits"
[[rows]]
group = "20 labels"
name = "labels alone"
arguments = "supervised.digits"
[[rows]]
group = "20 labels"
name = "PAWS"
arguments = "paws.digits --set 'encoder=ResNet(10)'"
"""


@pytest.fixture
def description(tmp_path):
    path = tmp_path / "digits.toml"
    path.write_text(DESCRIPTION)
    path.with_suffix(".md").write_text(f"# Title\n\n{tables.BEGIN}\nold\n{tables.END}\n\nWords.\n")
    return path


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.toml")), ids=lambda path: path.stem)
def test_pages_say_what_their_results_do(path):
    """A number typed by hand, or a page left behind by its runs."""
    table = tables.read(path)
    assert path.with_suffix(".md").read_text() == tables.page(table)
    cells = [(row, seed) for row in table.rows for seed in table.seeds]
    assert all(table.result(*each).exists() for each in cells)
    assert not table.by_epoch or all(table.evaluations(*each).exists() for each in cells)


def test_what_is_missing_is_run_and_kept_unedited(description, tmp_path, monkeypatch):
    """A run done twice, one skipped, and a result that is written anew rather than copied."""
    done = []

    def train(arguments, *more):
        done.append((arguments[0], more[1]))
        out = Path(more[-1])
        out.mkdir(parents=True)
        stages = {"first": {"trained_s": 3.0}, "last": {"trained_s": 5.0}}
        share = (0.5, 0.75)[int(more[1])]
        result = {"knn_top1": share, "trained_s": 5.0, "stages": stages}
        (out / "result.json").write_text(json.dumps(result) + "  \n")
        return CompletedProcess(arguments, 0, "", "")

    monkeypatch.setattr(tables, "train", train)
    table = tables.read(description)
    table.kept.mkdir()
    table.result(table.rows[0], 0).write_text('{"knn_top1": 0.25, "classifier_top1": 0.5, "trained_s": 4.0}')
    tables.run_missing(table, tmp_path / "runs")
    assert done == [("paws.digits", "0"), ("supervised.digits", "1"), ("paws.digits", "1")]
    assert table.result(table.rows[1], 1).read_text().endswith("}  \n")
    page = tables.page(table)
    assert page.startswith("# Title\n\n<!-- table -->\n\n| ") and page.endswith("\n\nWords.\n") and "old" not in page
    assert "| 20 labels | labels alone | 50.0 ± 35.4 | 50.0 | 6 | 2 |" in page
    assert "|  | PAWS | 62.5 ± 17.7 | – | 8 | 2 |" in page
    assert "    fastssl train paws.digits --set 'encoder=ResNet(10)' --data digits --seeds 0,1" in page


def test_evaluations_are_kept_and_shown_by_epoch(description, tmp_path, monkeypatch):
    """Catches other lines than evaluations, lines written anew, and numbers in percent that are none."""
    description.write_text('by_epoch = {"effective rank" = "effective_rank"}\n' + DESCRIPTION)
    lines = ['{"step": 5, "loss": 1.0}', '{"step": 5,  "epoch": 1.0, "evaluation": {"effective_rank": %s}}',
             '{"step": 9, "epoch": 2.0, "evaluation": {"effective_rank": 4.0}}']  # fmt: skip

    def train(arguments, *more):
        out = Path(more[-1])
        out.mkdir(parents=True)
        (out / "metrics.jsonl").write_text("\n".join(lines) % (1 + int(more[1])) + "\n")
        (out / "result.json").write_text('{"trained_s": 1.0}')
        return CompletedProcess(arguments, 0, "", "")

    monkeypatch.setattr(tables, "train", train)
    table = tables.read(description)
    tables.run_missing(table, tmp_path / "runs")
    assert table.evaluations(table.rows[0], 1).read_text() == "\n".join(lines[1:]) % 2 + "\n"
    page = tables.page(table)
    assert "| effective rank |  | epoch 1 | epoch 2 |" in page
    assert "| 20 labels | PAWS | 1.50 ± 0.71 | 4.00 ± 0.00 |" in page


def test_a_run_that_fails_says_why_and_keeps_nothing(description, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "train", lambda *arguments: CompletedProcess(arguments, 1, "", "Error: no such thing"))
    with pytest.raises(click.ClickException, match="supervised.digits.*no such thing"):
        tables.run_missing(tables.read(description), tmp_path / "runs")
    assert not list(tables.read(description).kept.iterdir())


def test_a_recipe_or_setting_that_does_not_exist_is_refused_before_any_run(description):
    description.write_text(DESCRIPTION.replace("encoder=", "encodr="))
    with pytest.raises(click.ClickException, match="20 labels, PAWS: .*encodr"):
        tables.check(tables.read(description))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "PAWS"', 'name = "labels alone"', "two rows are called 20-labels-labels-alone"),
        ("seeds = [0, 1]", "", "KeyError\\('seeds'\\)"),
        ("[[rows]]", "[rows", "not a table's description"),
    ],
)
def test_descriptions_that_cannot_be_read_are_named(description, old, new, said):
    description.write_text(DESCRIPTION.replace(old, new))
    with pytest.raises(click.ClickException, match=said):
        tables.read(description)
