"""How runs of a sweep agree on few and on many held-out images."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.stats import pearsonr, spearmanr

from fastssl.commands.main import main as fastssl
from tools import validation_sizes


def test_agreement_is_scipys():
    """With equal accuracies among them. Catches ranks by order, and the loss of the wrong choice."""
    rng = np.random.default_rng(0)
    few, many = rng.integers(0, 6, 12) / 10, rng.random(12)
    runs = {f"run {i}": {"1": few[i], "9": many[i]} for i in range(12)}
    found = validation_sizes.agreement({"images": {"1": 10, "9": 90}, "runs": runs})
    assert found["1"]["correlation"] == pytest.approx(pearsonr(few, many).statistic)
    assert found["1"]["rank_correlation"] == pytest.approx(spearmanr(few, many).statistic)
    assert found["1"]["lost"] == pytest.approx(many.max() - many[few.argmax()])
    assert found["9"] == {"correlation": pytest.approx(1), "rank_correlation": pytest.approx(1), "lost": 0.0}


def test_a_sweep_of_digits_is_scored_on_several_sizes(tmp_path, monkeypatch):
    """From the command line: nested images of each class that no run learnt from; more than there are is said in a
    line, and so is a folder that holds no sweep."""
    monkeypatch.chdir(tmp_path)
    sweep = ["supervised.digits", "--labels", "per-class=5", "--set", "steps=4", "--set", "batch_global=50"]
    sweep += ["--sweep", "rate.peak=1e-6,0.01,0.1", "--out", "out", "--held-out", "per-class=3 of not:per-class=5"]
    done = CliRunner().invoke(fastssl, ["train", *sweep])
    assert done.exit_code == 0, done.output
    told = CliRunner().invoke(validation_sizes.main, ["out", "--per-class", "1,3,40"])
    assert told.exit_code == 0, told.output
    found = json.loads((tmp_path / "out" / validation_sizes.TABLE).read_text())
    assert found["images"] == {"1": 10, "3": 30, "40": 400} and len(found["runs"]) == 3
    swept = json.loads((tmp_path / "out" / "sweep.json").read_text())["runs"]
    assert {name: row["3"] for name, row in found["runs"].items()} == {n: row["top1"] for n, row in swept.items()}
    assert "400 images (40 a class)" in told.output
    refused = CliRunner().invoke(validation_sizes.main, ["out", "--per-class", "9999"])
    assert refused.exit_code == 1 and "9999 were asked for" in refused.output and "Traceback" not in refused.output
    (tmp_path / "empty").mkdir()
    refused = CliRunner().invoke(validation_sizes.main, ["empty"])
    assert refused.exit_code == 1 and "empty holds no sweep" in refused.output
