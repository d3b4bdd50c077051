"""`--sweep`: settings chosen on training images that no run learnt from; the validation images come last, once."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastssl.commands.sweep import prepare, run
from fastssl.engine.job import Job
from fastssl.errors import FastsslError, Stopped
from fastssl.recipes.resolve import resolve
from loaders.labels.subsets import resolve as subset_of
from loaders.plan.views import parse_subset
from loaders.store.digits import open_digits
from tests.end_to_end import command
from tests.end_to_end.test_bad_input import invoke, refused

SETTINGS = (
    "encoder.base_width=4", "batch_global=40", "length=10steps", "checkpoint_every=5steps", "evaluate_every=5steps",
    "log_every=1steps", "evaluate=classifier", "precision=fp32", "rate.warmup=0steps",
)  # fmt: skip
SHORT = ("train", "supervised.digits", *(part for change in SETTINGS for part in ("--set", change)), "--out", "out")
GRID = ("--sweep", "rate.peak=1e-6,0.1")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def record(out="out"):
    return json.loads((Path(out) / "sweep.json").read_text())


def evaluations(run_dir):
    return [line for line in command.metrics(run_dir) if "evaluation" in line]


@pytest.fixture
def folder(tmp_path):
    """Eight digits a class as PNG files; the validation files are no images."""
    train, validation = open_digits()
    for split, source, count in (("train", train, 8), ("val", validation, 4)):
        for c in range(10):
            (tmp_path / "digits" / split / str(c)).mkdir(parents=True)
            for i in np.flatnonzero(source.labels == c)[:count]:
                Image.fromarray(source.images[i, :, :, 0]).save(tmp_path / "digits" / split / str(c) / f"{i}.png")
    shutil.copytree(tmp_path / "digits" / "val", tmp_path / "whole")
    for path in (tmp_path / "digits" / "val").rglob("*.png"):
        path.write_text("poison")
    return tmp_path / "digits"


def test_validation_images_that_cannot_be_opened_stop_nothing_but_the_last_evaluation(folder, tmp_path):
    """Would catch a choice that looks at validation images, and a continued sweep that trains again. The labels are
    none of the held-out ones, so `final/` is the chosen run: bitwise, and measured on validation images once."""
    arguments = (
        *SHORT,
        *GRID,
        "--data",
        folder,
        "--labels",
        "per-class=5",
        "--held-out",
        "per-class=3 of not:per-class=5",
    )
    line = refused(*arguments)
    assert "digits/val: none of its 40 images can be used, e.g. 0/" in line
    done = record()
    assert list(done["runs"]) == ["rate.peak=1e-6", "rate.peak=0.1"] and "final" not in done
    assert done["held_out"]["count"] == 30 and done["runs"]["rate.peak=0.1"]["steps"] == 10
    best = max(done["runs"], key=lambda name: done["runs"][name]["top1"])
    assert done["chosen"] == best == "rate.peak=0.1"
    states = {path: path.stat().st_mtime_ns for path in Path("out").rglob("state.pt")}

    shutil.copytree(tmp_path / "whole", folder / "val", dirs_exist_ok=True)
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    assert states == {path: path.stat().st_mtime_ns for path in states}
    final = json.loads(Path("out/final/result.json").read_text())
    assert final["provenance"]["validation"]["count"] == 40 and final["provenance"]["labelled"]["count"] == 50
    assert record()["final"]["top1"] == final["classifier_top1"] and record()["runs"] == done["runs"]
    newest = "checkpoints/step-00000010/state.pt"
    assert (Path("out/final") / newest).read_bytes() == (Path("out") / best / newest).read_bytes()
    table = Path("out/sweep.md").read_text()
    assert table in result.output and "| **0.1** | **10** | **" in table and table.count("single seed") == 1
    again = invoke(*arguments).output
    assert again.count("finished: ") == 1 and again.endswith(table + "\n")

    shown = invoke("evaluate", f"out/{best}", "--protocol", "classifier")  # a run of the sweep stays one
    assert json.loads(shown.stdout)["classifier_top1"] == done["runs"][best]["top1"]


def test_where_all_labels_are_used_the_held_out_ones_come_back_for_the_last_training():
    """Would catch held-out images that a run of the sweep learnt from, a final run without them, and one that looks at
    the validation images more than once."""
    result = invoke(*SHORT, *GRID, "--labels", "all")
    assert result.exit_code == 0, result.output
    source, _ = open_digits()
    for name, row in record()["runs"].items():
        its_own = json.loads(Path("out", name, "result.json").read_text())
        assert row["top1"] == its_own["classifier_top1"] and row["top1_ci95"] == its_own["classifier"]["top1_ci95"]
        behind, resolved = its_own["provenance"], json.loads(Path("out", name, "resolved.json").read_text())
        learnt = subset_of(parse_subset(resolved["stages"][0]["config"]["labels"]), source)
        held_out = subset_of(parse_subset("per-class=12"), source)
        assert behind["labelled"]["split_sha256"] == learnt.sha256
        assert behind["validation"]["split_sha256"] == held_out.sha256 == record()["held_out"]["sha256"]
        assert learnt.count + held_out.count == len(source) and not np.intersect1d(learnt.ids, held_out.ids).size
        assert resolved["data"].keys() == {"train"} and len(evaluations(Path("out", name))) == 2
    final = json.loads(Path("out/final/result.json").read_text())
    assert final["provenance"]["labelled"]["split"] == "all" and final["provenance"]["validation"]["split"] == "all"
    assert final["provenance"]["validation"]["data"] == "digits (held out)"
    assert len(evaluations(Path("out/final"))) == 1 and final["steps"] == 10


# ------------------------------------------------------------------------- what a sweep makes of its runs, untrained


def sweep_of(*swept, labels="per-class=10", out="out"):
    changes = (f"labels={labels}",)
    stages = resolve("supervised.digits", changes)
    return prepare(Job("supervised.digits", stages, changes, ("digits",), Path(out), 0, "cpu", 1), swept, None)


class Untrained:
    """In the place of training: each run's accuracy by its rate; "diverges"; or an exception."""

    def __init__(self, found):
        self.found, self.asked = found, []

    def __call__(self, job):
        self.asked.append(job.out.name)
        job.out.mkdir(parents=True, exist_ok=True)
        if not (job.out / "weights").exists():
            (job.out / "weights").write_text(job.out.name)
        found = self.found[job.out.name.removeprefix("rate.peak=")]
        if isinstance(found, Exception):
            raise found
        if found == "diverges":
            (job.out / "nonfinite-step-00000003.json").write_text("{}")
            raise FastsslError("step 3 gave a loss that is not finite")
        (job.out / "result.json").write_text("{}")
        return {"classifier_top1": found, "classifier": {"top1_ci95": [found - 0.1, found + 0.1]}, "steps": 7}


def test_top5_stands_beside_the_accuracy_that_chooses(capsys):
    """Where the protocol gives it."""
    start = Untrained({"0.1": 0.6, "0.2": 0.5, "final": 0.5})
    run(sweep_of("rate.peak=0.1,0.2"), lambda job: start(job) | {"classifier_top5": 0.9})
    assert record()["final"]["top5"] == record()["runs"]["rate.peak=0.1"]["top5"] == 0.9
    table = capsys.readouterr().out
    assert "| held out, classifier_top1 | top-5 | validation, classifier_top1 |" in table
    assert "| 0.2 | 7 | 50.0 [40.0, 60.0] | 90.0 |  |" in table and "(single seed); top-5 90.0** |" not in table
    assert "50.0 [40.0, 60.0] (single seed); top-5 90.0 |" in table


def test_of_equals_the_first_is_chosen_and_what_diverged_is_not_tried_again(capsys):
    """Would catch a run of which nothing is known, taken for the best."""
    start = Untrained({"9": "diverges", "0.1": 0.8, "0.2": 0.8, "0.3": 0.7, "final": 0.5})
    sweep = sweep_of("rate.peak=9,0.1,0.2,0.3")
    run(sweep, start)
    assert start.asked == ["rate.peak=9", "rate.peak=0.1", "rate.peak=0.2", "rate.peak=0.3", "final"]
    assert record()["chosen"] == "rate.peak=0.1" and record()["runs"]["rate.peak=9"] == {"diverged": True}
    assert Path("out/final/weights").read_text() == "rate.peak=0.1"  # which learnt from all labels already
    table = capsys.readouterr().out.splitlines()
    assert "| 9 | – | diverged |  |" in table
    assert "| **0.1** | **7** | **80.0 [70.0, 90.0]** | 50.0 [40.0, 60.0] (single seed) |" in table
    assert "| 0.2 | 7 | 80.0 [70.0, 90.0] |  |" in table
    run(sweep, start)
    assert start.asked[5:] == ["final"]  # which knows that it is finished
    with pytest.raises(FastsslError, match="every run of the sweep in out2 diverged"):
        run(sweep_of("rate.peak=9", out="out2"), start)


def test_a_sweep_that_is_stopped_continues_where_it_was():
    """Would catch a stop taken for a divergence, accuracies lost by it, and a sweep over other settings let in."""
    start = Untrained({"0.1": 0.6, "0.2": Stopped("saved and stopped"), "final": 0.5})
    with pytest.raises(Stopped):
        run(sweep_of("rate.peak=0.1,0.2"), start)
    assert record()["runs"]["rate.peak=0.1"]["top1"] == 0.6 and "rate.peak=0.2" not in record()["runs"]
    with pytest.raises(FastsslError, match=r"out holds another sweep \(grid.rate.peak.1: 0.2 -> 0.3\): choose another"):
        run(sweep_of("rate.peak=0.1,0.3"), start)
    start.found["0.2"] = FastsslError("no space left")
    with pytest.raises(FastsslError, match="no space left"):
        run(sweep_of("rate.peak=0.1,0.2"), start)
    start.found["0.2"] = 0.7
    run(sweep_of("rate.peak=0.1,0.2"), start)
    assert record()["chosen"] == "rate.peak=0.2" and record()["final"]["top1"] == 0.5


def test_every_combination_is_a_run_with_the_recipes_own_held_out_images():
    """Would catch a zip in place of the product, and held-out images that belong to another data set."""
    sweep = sweep_of("rate.peak=0.1,0.2", "epochs=3,5,7")
    assert list(sweep.runs)[:4] == ["rate.peak=0.1,epochs=3", "rate.peak=0.1,epochs=5", "rate.peak=0.1,epochs=7",
                                    "rate.peak=0.2,epochs=3"]  # fmt: skip
    (stage,) = sweep.runs["rate.peak=0.2,epochs=7"].stages
    assert (stage.config.rate.peak, stage.length.count, stage.config.labels) == (0.2, 7, "per-class=10")
    assert sweep.held_out == "per-class=12 of not:per-class=10" and len(sweep.runs) == 6
    everything = sweep_of("rate.peak=0.1", labels="all")
    assert everything.held_out == "per-class=12"
    assert everything.runs["rate.peak=0.1"].stages[0].config.labels == "not:per-class=12"
    imagenet = resolve("supervised.rn50_100pct")
    job = Job("supervised.rn50_100pct", imagenet, (), (), Path("out"), 0, "cpu", 1)
    large = prepare(job, ("rate.peak=0.1",), None)
    assert large.held_out == "paws-heldout"
    for labels in ("s4l-10", "s4l-1"):  # with which that list shares 1,141 and 105 images
        changes = (f"labels={labels}",)
        job = Job("s4l.rotation", resolve("s4l.rotation", changes), changes, (), Path("out"), 0, "cpu", 1)
        assert prepare(job, ("rate.peak=0.1",), None).held_out == f"per-class=12 of not:{labels}"
    assert large.runs["rate.peak=0.1"].stages[0].config.labels == "not:paws-heldout"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--sweep rate.peak", "--sweep 'rate.peak': write KEY=V1,V2,..."),
        ("--sweep rate.peak=", "--sweep 'rate.peak=': write KEY=V1,V2,..."),
        ("--sweep rate.peak=0.1,,0.2", "write KEY=V1,V2,..."),
        ("--sweep rate.peek=0.1", "unknown key 'peek' in WarmupCosine; did you mean 'peak'?"),
        ("--sweep rate.peak=low", "peak=low: a number is needed"),
        ("--sweep rate.peak=0.1 --sweep rate.peak=0.2", "--sweep rate.peak: given twice"),
        ("--sweep rate.peak=0.1,1e-1", "rate.peak=0.1 and rate.peak=1e-1 are the same run"),
        (
            "--sweep epochs=1,2 --sweep length=5steps",
            "epochs=1,length=5steps and epochs=2,length=5steps are the same run",
        ),
        ("--sweep rate.peak=0.1 --set rate.peak=0.2", "rate.peak is both swept and set"),
        ("--sweep train.labels=all,per-class=5", "--sweep labels: "),
        ("--sweep rate.peak=0.1 --set evaluate=", "supervised.digits measures none: --set evaluate=knn"),
        ("--sweep rate.peak=0.1 --seeds 0,1", "leave out several --seeds"),
        ("--sweep rate.peak=0.1 --resume never", "--resume never"),
        ("--held-out per-class=3", "--held-out belongs to --sweep"),
        ("--sweep rate.peak=0.1 --held-out per-class=x", "write per-class=COUNT"),
        (
            "--sweep rate.peak=0.1 --held-out per-class=3",
            "30 of its 30 images are among the training labels (per-class=10)",
        ),
        ("--sweep rate.peak=0.1 --held-out per-class=150", "class '0' has 143 images, 150 were asked for"),
        ("--sweep rate.peak=0.1 --held-out one.txt", "--held-out 'one.txt': it has no image of class '"),
        ("--sweep rate.peak=0.1 --held-out nolist", "label list 'nolist' was not found"),
    ],
)
def test_each_mistake_is_one_line_before_anything_is_trained(arguments, says):
    Path("one.txt").write_text("0\n")
    assert says in refused("train", "supervised.digits", *arguments.split())
    assert not Path("runs").exists()


def test_a_run_is_no_sweep(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "resolved.json").write_text("{}")
    assert "out holds a run, not a sweep" in refused("train", "supervised.digits", "--out", "out", *GRID)


def test_dry_run_names_the_runs(tmp_path):
    result = invoke("train", "supervised.digits", "--dry-run", *GRID)
    assert result.exit_code == 0, result.output
    assert "2 runs: rate.peak=1e-6, rate.peak=0.1" in result.output
    assert "held out     per-class=12 of not:per-class=10; the best run by classifier_top1 goes to" in result.output
    assert "runs/supervised.digits-sweep-seed0/final" in result.output
    assert list(tmp_path.iterdir()) == []
