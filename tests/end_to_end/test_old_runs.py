"""Run directories that an earlier commit made: today's code looks at them and continues them as that commit did.

Both sides run here, in this environment, with one thread. Needs the git history that holds the commit.
"""

import json
import math
import os
import re

import numpy as np
import pytest
import safetensors.torch
import torch

from fastssl.config.plain import from_plain
from tools import old_runs
from tools.old_runs import RUNS
from tools.other_commit import ROOT, NoSuchCommit
from tools.same_as import REFERENCE, difference

# Run -> what the one line says where a half-finished one cannot be continued: their colours have other bits today.
REFUSED = dict.fromkeys(("semppl.cifar10_small", "simclrv2.cifar10_small"), "rounds images otherwise")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    """What `old_runs.make` leaves, with what the old code said in `old`; on CIFAR-10 only where there is one."""
    cifar10 = request.getfixturevalue("cifar10_dir") if os.environ.get("FASTSSL_TEST_CIFAR10") else None
    folder = tmp_path_factory.mktemp("made")
    try:
        old_runs.make(REFERENCE, folder, cifar10)
    except NoSuchCommit as error:
        pytest.skip(str(error))
    return folder


@pytest.fixture(scope="module")
def old(folder):
    """What the commit said of each command."""
    return json.loads((folder / "old" / "told.json").read_text())


@pytest.fixture(scope="module")
def today(folder, old):
    """What today's code says of the same commands, its files in FOLDER/NAME/today; the half-finished runs go on."""
    commands = {}
    for name, run in RUNS.items():
        if f"{name} train" in old:
            looks = old_runs.looking(run, folder / name / "run", folder / name / "today")
            commands |= {f"{name} {what}": command for what, command in looks.items()}
            commands[f"{name} train"] = old_runs.training(run, folder / "images", folder / name / "half")
    return old_runs.told(ROOT, commands, folder / "new")


@pytest.fixture(params=RUNS)
def name(request):
    if RUNS[request.param].on_cifar10:
        request.getfixturevalue("cifar10_dir")
    return request.param


def succeeded(answer):
    assert answer["exit_code"] == 0, answer["stderr"]
    return answer["stdout"]


def lost(said, now, path=""):
    """Where `now` does not say what `said` says; it may say more. Averages may round otherwise, for rows are summed in
    other blocks now; one image among a million would be seen."""
    if isinstance(said, dict) and isinstance(now, dict):
        return [each for key in said for each in lost(said[key], now.get(key), f"{path}.{key}")]
    if isinstance(said, float) and isinstance(now, float) and math.isclose(said, now, rel_tol=1e-6):
        return []
    return [] if said == now else [f"{path}: {said!r} became {now!r}"]


def test_what_is_lost_is_named():
    assert lost({"a": {"b": 1, "c": 2.0}}, {"a": {"b": 1, "c": 2.5}, "d": 0}) == [".a.c: 2.0 became 2.5"]
    assert lost({"a": {"b": 1}}, {}) == [".a: {'b': 1} became None"]
    assert lost({"a": 0.5}, {"a": 0.5 * (1 + 2e-6)}) and lost({"a": 0.5}, {"a": 0.5 * (1 + 1e-7)}) == []


def test_it_is_evaluated_the_same_to_the_image(name, old, today):
    said, now = (json.loads(succeeded(answers[f"{name} evaluate"])) for answers in (old, today))
    assert len([key for key in said if key.endswith("_top1")]) == len(RUNS[name].protocols)
    assert lost(said, now) == []


def test_its_embeddings_are_the_same(name, folder, today):
    succeeded(today[f"{name} embed"])
    arrays = sorted((folder / name / "embeddings").glob("*.npy"))
    assert {path.name.split(".")[1] for path in arrays} == {"features", "labels", "ids"} and len(arrays) >= 6
    for path in arrays:
        ours = np.load(folder / name / "today" / "embeddings" / path.name)
        theirs = np.load(path)
        assert ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes(), path.name


def test_its_export_holds_the_same_tensors(name, folder, today):
    succeeded(today[f"{name} export"])
    theirs, ours = folder / name / "export", folder / name / "today" / "export"
    said, now = (json.loads((export / "config.json").read_text()) for export in (theirs, ours))
    assert said["files"].keys() == {"backbone.safetensors", "heads.safetensors"}
    for file in said["files"]:
        one, other = (safetensors.torch.load_file(export / file) for export in (ours, theirs))
        assert one.keys() == other.keys() and len(one) > 0
        assert [key for key in one if not torch.equal(one[key], other[key])] == []
    encoders = [from_plain(object, each["architecture"].pop("encoder")) for each in (said, now)]
    assert encoders[0] == encoders[1]  # written in full today
    parts = ("layout", "network", "networks", "architecture", "input", "accuracy", "provenance")
    assert lost({part: said[part] for part in parts}, now) == []


def test_it_is_reported(name, old, today, folder):
    for answers, page in ((old, "report.html"), (today, "today/report.html")):
        assert succeeded(answers[f"{name} report"]) == f"{folder / name / page}\n"
    page = (folder / name / "today" / "report.html").read_text()
    scores = json.loads((folder / name / "run" / "result.json").read_text())
    top1 = [value for key, value in scores.items() if key.endswith("_top1")]
    assert name in page and top1 and all(f"{100 * value:.1f}" in page for value in top1)


def test_a_half_finished_run_ends_as_the_commits_own(name, folder, today):
    answer, run = today[f"{name} train"], folder / name
    if name in REFUSED:
        (line,) = [line for line in answer["stderr"].splitlines() if not line.startswith("note: ")]
        assert answer["exit_code"] == 1 and REFUSED[name] in line
        return
    assert re.search(r"continues +from step [1-9]", succeeded(answer))
    assert difference(run / "half", run / "run") is None
    assert (run / "half" / "result.json").exists()
