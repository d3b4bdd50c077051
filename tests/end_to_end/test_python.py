"""`fastssl.train` and what it returns: the command's weights, nothing printed, nothing left behind."""

import json
import multiprocessing
import threading

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import fastssl
from fastssl.commands.main import main
from fastssl.errors import ConfigError, FastsslError
from fastssl.run_dir.checkpoint import Checkpoints
from loaders.errors import LoaderError
from tests.end_to_end import command

SHORT = dict(change.split("=") for change in command.TINY)


def weights(run):
    return Checkpoints(run / "checkpoints").load_newest(print)["nets"]["online"]


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return fastssl.train("paws.digits", out=tmp_path_factory.mktemp("python") / "run", set=SHORT)


def test_weights_and_metrics_are_the_commands_to_the_bit(run, tmp_path):
    """Draws of this process that leak into a run, a setting written otherwise; and the second run of a process."""
    torch.manual_seed(5)
    ours = torch.rand(3)
    torch.manual_seed(5)
    again = fastssl.train("paws.digits", out=tmp_path / "again", set=SHORT)
    assert torch.rand(3).equal(ours)  # a run draws nothing from the caller's generator
    given = ["train", "paws.digits", *command.CHANGES, "--out", str(tmp_path / "typed")]
    assert CliRunner().invoke(main, given, catch_exceptions=False).exit_code == 0
    typed = weights(tmp_path / "typed")
    for path in (run.path, again.path):
        found = weights(path)
        assert found.keys() == typed.keys() and all(found[key].equal(typed[key]) for key in typed)
        assert metrics(path) == metrics(tmp_path / "typed")


def test_a_run_tells_what_it_measured_and_shows_its_networks(run, tmp_path):
    assert run.metrics["step"].tolist() == list(range(1, 13)) and np.isfinite(run.metrics["loss"]).all()
    assert run.evaluations["step"].tolist() == [4, 8, 12]
    assert fastssl.open_run(run.path).evaluate("knn")["knn_top1"] == run.result["knn_top1"]
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), np.uint8)
    features = run.embed(images)
    encoder = run.encoder()
    with torch.no_grad():
        own = encoder(torch.stack([encoder.transform(image) for image in images]))
    assert features.shape == (20, encoder.num_features)
    np.testing.assert_allclose(own.numpy(), features, rtol=1e-5, atol=1e-5)
    assert len(run.predict(images).classes) == 20
    assert (run.export(tmp_path / "export") / "backbone.safetensors").exists()
    page = run.report()
    assert "<svg" in page and page._repr_html_().startswith("<iframe srcdoc=")
    with pytest.raises(ConfigError, match="no run directory"):
        fastssl.open_run(tmp_path)


def test_nothing_is_printed_unless_asked(tmp_path, capfd):
    changes = SHORT | {"length": "2steps", "evaluate": "knn"}
    fastssl.train("paws.digits", out=tmp_path / "quiet", set=changes).evaluate("knn")
    assert capfd.readouterr() == ("", "")
    fastssl.train("paws.digits", out=tmp_path / "quiet", progress=True, set=changes)
    assert "finished: paws.digits" in capfd.readouterr().out


class Enough(Exception):
    pass


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_exception_leaves_no_rank_thread_or_lock(tmp_path, ranks):
    """A run that can neither be continued nor begun anew in this process, ranks that go on alone."""
    steps = []

    def heard(record):
        steps.append(record["step"])
        if len(steps) == 3:
            raise Enough

    threads = set(threading.enumerate())
    settings = {"out": tmp_path / "run", "set": SHORT | {"evaluate": "knn"}, "cpu_ranks": ranks}
    with pytest.raises(Enough):
        fastssl.train("paws.digits", progress=heard, **settings)
    assert steps == [1, 2, 3]
    assert multiprocessing.active_children() == []
    assert {thread for thread in threading.enumerate() if thread.name.startswith("fastssl")} <= threads
    if ranks == 1:
        assert fastssl.train("paws.digits", **settings).metrics["step"].tolist() == list(range(1, 13))


def test_a_thread_of_the_users_can_train(tmp_path):
    """Signal handlers, which only the main thread may set."""
    done = []
    settings = {"out": tmp_path / "run", "set": SHORT | {"length": "2steps", "evaluate": "knn"}}
    thread = threading.Thread(target=lambda: done.append(fastssl.train("paws.digits", **settings)))
    thread.start()
    thread.join()
    assert done[0].result["steps"] == 2


def test_bad_input_is_the_commands_one_line(tmp_path):
    for given, said in (
        ({"data": "/nowhere"}, "no such file"),
        ({"set": {"epoch": 3}}, "did you mean 'epochs'"),
        ({"gpus": 1, "cpu_ranks": 1}, "give one of them"),
        ({"colour": 3}, "no setting 'colour'"),
        ({"recipe": "paws.digit"}, "paws.digits"),
    ):
        with pytest.raises((FastsslError, LoaderError), match=said) as error:
            fastssl.train(**({"recipe": "paws.digits", "out": tmp_path / "run"} | given))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_recipes_are_listed_with_what_they_train():
    recipes = fastssl.list_recipes()
    assert "handwritten digits" in recipes["paws.digits"] and all(recipes.values())
