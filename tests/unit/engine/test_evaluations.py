"""Evaluations of a run: what they need is looked at before its first step; what they lose is their numbers alone."""

import json
from dataclasses import replace

import numpy as np
import pytest

from fastssl.commands.dry_run import describe
from fastssl.engine import stages
from fastssl.errors import ConfigError, FastsslError
from fastssl.evaluation import knn, soft_nn
from fastssl.methods.base import Steps
from loaders.errors import RenderError, StoreError
from loaders.loader import Loader
from loaders.store.data import DataSets, open_data
from tests.end_to_end.command import metrics
from tests.ranks.pool import run_ranks
from tests.support import fakes


def job_of(folder, labels="per-class=10", evaluate=("knn",), **changes):
    """Six steps of a method that looks at no label, evaluated after each third."""
    (stage,) = fakes.stages("contrast")
    config = replace(stage.config, labels=labels)
    stage = replace(stage, config=config, evaluate=evaluate, evaluate_every=Steps(3), checkpoint_every=Steps(100))
    return fakes.job((stage,), folder, **changes)


def with_validation_labels(labels):
    digits = open_data(("digits",))
    validation = replace(digits.sources["validation"], labels=labels)
    return DataSets({**digits.sources, "validation": validation})


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"labels": "nolist.txt"}, StoreError, r"label list 'nolist.txt' was not found.* by the evaluation knn\)$"),
        ({"labels": "per-class=1", "evaluate": ("linear",)}, ConfigError, r"it needs two of a class .*linear\)$"),
        ({"evaluate": ("classifier",)}, ConfigError, r"TinyContrast has no logits to classify by"),
        ({"evaluate": ("transfer",)}, ConfigError, r"nothing to measure on: give --data KEY=PATH"),
    ],
)
def test_what_an_evaluation_lacks_is_said_before_the_first_step(settings, error, says, tmp_path):
    """Catches hours of training that end at a list that is not there, which a dry run had not said either."""
    job = job_of(tmp_path / "run", **settings)
    for command in (describe, stages.run):
        with pytest.raises(error, match=says):
            command(job)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_a_result_says_is_known_before_the_first_step(tmp_path, monkeypatch):
    """Catches labels that nothing asks for but the result, once all is done, and which are not there."""
    monkeypatch.delattr(knn, "check")
    with pytest.raises(StoreError, match=r"label list 'nolist.txt' was not found"):
        stages.run(job_of(tmp_path / "run", labels="nolist.txt"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_validation_images_without_labels_are_refused_before_the_first_step(tmp_path, monkeypatch):
    """Catches a folder of validation images without classes that is looked at after training, in a later stage too."""
    blank = with_validation_labels(np.full(len(open_data(("digits",)).get("validation")), -1))
    monkeypatch.setattr(stages, "open_data", lambda *_, **__: blank)
    chain = fakes.job(fakes.stages("simclrv2"), tmp_path / "chain")
    unevaluated = replace(chain, stages=(replace(chain.stages[0], evaluate=()), *chain.stages[1:]))
    for job in (job_of(tmp_path / "run"), unevaluated):
        with pytest.raises(ConfigError, match="355 validation images carry no label, so nothing can be measured"):
            stages.run(job)
        assert not list(job.out.rglob("metrics.jsonl"))


def test_a_dry_run_says_what_will_evaluate_and_what_cannot(tmp_path):
    assert "evaluated    by knn\n" in describe(job_of(tmp_path))
    assert "evaluated" not in describe(job_of(tmp_path, evaluate=()))


def test_an_evaluation_that_fails_costs_its_numbers(tmp_path, monkeypatch, capsys):
    """Catches a run that ends at a mistake of one protocol, other protocols that lose their numbers with it, and steps
    that are lost with the process because their checkpoint was still to come."""
    measured, saved = knn.evaluate, []

    def evaluate(subject):
        saved.append(sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")))
        raise FastsslError("no neighbours today") if len(saved) == 1 else ZeroDivisionError("k is 0")

    monkeypatch.setattr(knn, "evaluate", evaluate)
    job = job_of(tmp_path, evaluate=("knn", "soft-nn"))
    result = stages.run(job)
    assert saved == [["step-00000003"], ["step-00000003", "step-00000006"]]
    assert result["steps"] == 6 and "knn_top1" not in result and result["soft_nn_top1"] > 0
    assert json.loads((tmp_path / "result.json").read_text())["failed_evaluations"] == {
        "knn": "ZeroDivisionError: k is 0"
    }
    warnings = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert warnings == [
        "warning: the evaluation knn after step 3 failed: no neighbours today",
        "warning: the evaluation knn after step 6 failed: ZeroDivisionError: k is 0",
    ]
    evaluations = [each["evaluation"] for each in metrics(tmp_path) if "evaluation" in each]
    assert [each["failed_evaluations"]["knn"] for each in evaluations] == [
        "no neighbours today",
        "ZeroDivisionError: k is 0",
    ]
    monkeypatch.setattr(knn, "evaluate", measured)
    assert "failed_evaluations" not in stages.run(job_of(tmp_path / "other"))


def test_a_kill_within_an_evaluation_loses_neither_steps_nor_numbers(tmp_path, monkeypatch):
    """Catches an evaluation that is never made up for, its step being saved already, and one that is done twice."""
    whole, broken, measured = job_of(tmp_path / "whole"), job_of(tmp_path / "broken"), knn.evaluate
    expected, may_come = stages.run(whole), []

    def evaluate(subject):
        if not may_come.pop():
            raise KeyboardInterrupt
        return measured(subject)

    monkeypatch.setattr(knn, "evaluate", evaluate)
    for each in ([False], [False, True]):  # after step 3; after step 6, once that of step 3 is made up for
        may_come[:] = each
        with pytest.raises(KeyboardInterrupt):
            stages.run(broken)
    may_come[:] = [True]
    assert stages.run(broken)["knn_top1"] == expected["knn_top1"] and may_come == []
    assert metrics(broken.out) == metrics(whole.out)
    assert [each["step"] for each in metrics(whole.out) if "evaluation" in each] == [3, 6]


def _fails_everywhere(folder):
    def evaluate(subject):
        raise FastsslError("nothing near")

    soft_nn.evaluate = evaluate
    return stages.run(job_of(folder, evaluate=("soft-nn", "knn"), world=2))


def _meets_a_damaged_image(folder):
    """On the first rank alone: the image is among its share."""
    crops = Loader._crops

    def damaged(self, rows, slot):
        if rows.stream == "validation" and 7 in rows.ids:
            raise RenderError("image 7 cannot be decoded", 7)
        return crops(self, rows, slot)

    Loader._crops = damaged
    return stages.run(job_of(folder, world=2))


def test_ranks_agree_on_an_image_that_one_of_them_could_not_decode(tmp_path):
    """Catches a rank that leaves the pass at its damaged image, while the others wait for its rows."""
    one, other = run_ranks(2, _meets_a_damaged_image, tmp_path)
    said = "1 of 355 validation images cannot be used, first 7 of digits (held out): mend or remove them"
    assert one["failed_evaluations"] == other["failed_evaluations"] == {"knn": said} and one["steps"] == 6


def test_an_evaluation_that_fails_on_two_ranks_costs_its_numbers(tmp_path):
    """Catches ranks that part ways where an evaluation ends early."""
    one, other = run_ranks(2, _fails_everywhere, tmp_path)
    assert one["failed_evaluations"] == other["failed_evaluations"] == {"soft-nn": "nothing near"}
    assert one["knn_top1"] == other["knn_top1"] > 0
