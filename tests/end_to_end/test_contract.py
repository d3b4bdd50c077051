"""The contract carries every family: four tiny methods run through the real engine, chained stages included."""

import json

import pytest
import torch

from fastssl.engine.stages import run
from tests.support import fakes


@pytest.mark.parametrize("family", ["paws", "semppl", "simclrv2", "s4l"])
def test_each_family_runs_through_the_engine(family, tmp_path):
    stages = fakes.stages(family)
    result = run(fakes.job(stages, tmp_path))
    assert 0 <= result["soft_nn_top1"] <= 1
    for stage in stages:
        folder = tmp_path if len(stages) == 1 else tmp_path / stage.name
        if stage.do == "produce":
            made = torch.load(folder / "produced.pt", weights_only=True)
            assert made["ids"].tolist() == list(range(len(made["ids"])))
            assert len(made["pseudo_label"]) == len(made["ids"])
            continue
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
        assert all(line["loss"] == line["loss"] for line in lines if "loss" in line)


def test_a_finished_stage_is_not_done_again(tmp_path):
    stages = fakes.stages("simclrv2")
    first = run(fakes.job(stages, tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("state.pt")}
    assert run(fakes.job(stages, tmp_path)) == first
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("state.pt")}


def test_frozen_and_target_get_no_gradient_and_queue_is_saved(tmp_path):
    run(fakes.job(fakes.stages("semppl"), tmp_path))
    state = torch.load(next(tmp_path.glob("checkpoints/step-00000006/state.pt")), weights_only=True)
    assert set(state["nets"]) == {"online", "target", "state"}
    assert state["nets"]["state"]["next"] > 0
    run(fakes.job(fakes.stages("simclrv2"), tmp_path / "chain"))
    state = torch.load(next(tmp_path.glob("chain/distil/checkpoints/step-00000006/state.pt")), weights_only=True)
    assert set(state["nets"]) == {"online"}


def test_a_run_does_not_count_what_earlier_ones_compiled(tmp_path, monkeypatch):
    """Catches the ninth training of a notebook that ends in torch's limit of versions of one function."""
    import torch._dynamo  # as every compiled step does

    forgotten = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: forgotten.append(True))
    run(fakes.job(fakes.stages("paws", steps=1), tmp_path))
    assert forgotten == [True]
