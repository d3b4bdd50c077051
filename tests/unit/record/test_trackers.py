"""TensorBoard read back by its own reader, and Weights & Biases as a module that writes down what it is told."""

import sys
import types

import pytest

from fastssl.errors import ConfigError
from fastssl.record.recorder import Recorder
from fastssl.record.trackers import WANDB_RUN_ID, check_trackers, numbers


def line(step, loss):
    return {"step": step, "epoch": step / 8, "loss": loss, "lr": 0.1, "time": {"wait_share": 0.5, "eta_s": None}}


def write(run_dir, steps, tracker, resume_step=0):
    with Recorder(run_dir, main=True, resume_step=resume_step, log_to=(tracker,), plain=True) as recorder:
        for step, loss in steps:
            recorder.log(line(step, loss))
        recorder.evaluation({"step": steps[-1][0], "epoch": 1.0, "evaluation": {"knn_top1": 0.5, "knn": {"k": 10}}})


def curve(run_dir, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_has_the_curves_and_no_ghosts_after_a_resume(tmp_path):
    """Catches points of steps that were done again under other values, and an old run's that a fresh one shows."""
    write(tmp_path, [(1, 9.0)], "tensorboard")
    write(tmp_path, [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)], "tensorboard")
    write(tmp_path, [(3, 3.5), (4, 4.5)], "tensorboard", resume_step=2)
    assert curve(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5)]
    assert curve(tmp_path, "time/wait_share")[0] == (1, 0.5) and curve(tmp_path, "evaluation/knn_top1") == [(4, 0.5)]


class FakeRun:
    def __init__(self, told):
        self.told = told

    def define_metric(self, name, **how):
        self.told.append(("define_metric", name, how))

    def log(self, values):
        self.told.append(("log", values))

    def finish(self):
        self.told.append(("finish",))


@pytest.fixture
def wandb(monkeypatch):
    """What W&B is told: [(function, arguments...), ...]."""
    told = []
    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace()
    module.init = lambda **settings: told.append(("init", settings)) or FakeRun(told)
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return told


def test_wandb_continues_one_run_whatever_stops_it(tmp_path, wandb):
    """Catches a new run at W&B for every restart, and curves over W&B's own count, which goes on after a resume."""
    (tmp_path / "resolved.json").write_text('{"recipe": "paws.digits"}')
    write(tmp_path, [(1, 1.0), (2, 2.0)], "wandb")
    write(tmp_path, [(2, 2.5)], "wandb", resume_step=1)
    first, second = (call[1] for call in wandb if call[0] == "init")
    assert first == second and first["id"] == (tmp_path / WANDB_RUN_ID).read_text().strip()
    assert first["resume"] == "allow" and first["config"] == {"recipe": "paws.digits"} and first["project"] == "fastssl"
    assert ("define_metric", "*", {"step_metric": "step"}) in wandb
    losses = [(call[1]["step"], call[1]["loss"]) for call in wandb if call[0] == "log" and "loss" in call[1]]
    assert losses == [(1, 1.0), (2, 2.0), (2, 2.5)] and wandb[-1] == ("finish",)


def test_two_directories_are_two_runs(tmp_path, wandb):
    for name in "ab":
        write(tmp_path / name, [(1, 1.0)], "wandb")
    first, second = (call[1]["id"] for call in wandb if call[0] == "init")
    assert first != second


def test_only_the_main_rank_tells(tmp_path, wandb):
    with Recorder(tmp_path, main=False, log_to=("wandb",)) as recorder:
        recorder.log(line(1, 1.0))
    assert wandb == []


def test_what_is_missing_is_said_before_training(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--log-to wandb needs the package of that name: install the extra wandb"):
        check_trackers(("wandb",))
    with pytest.raises(ConfigError, match="did you mean 'wandb'"):
        check_trackers(("wandbb",))


def test_words_and_lists_are_left_to_the_file():
    record = {"step": 3, "loss": "nan", "time": {"ranks": {"wait_s_p50": [1.0]}, "step_s": 2}}
    assert numbers(record) == {"time/step_s": 2}
