"""What is not finite: described so that it can be done again, or left out once."""

import json
from dataclasses import replace

import pytest
import torch

from fastssl import dist
from fastssl.engine import stages
from fastssl.engine.join import facts_of
from fastssl.engine.train import TrainingDiverged
from fastssl.methods.base import Steps
from fastssl.methods.paws import Paws
from fastssl.recipes.resolve import resolve
from loaders.loader import bind
from loaders.store.data import open_data
from tests.end_to_end import command
from tests.end_to_end.test_bad_input import SHORT, invoke, overflow_at_step_2, refused
from tests.ranks.pool import run_ranks
from tests.support import fakes
from tests.support.interrupted import run_in_pieces


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_diverged_step_is_described_and_done_again_from_the_last_checkpoint(tmp_path):
    """Catches a dump of other ids than the step's, a replay that starts from the wrong step or changes the run, and one
    that finds the symptom only: the loss is not finite because a module's output is not."""
    line = refused("train", "--out", "run", *SHORT, "--set", "rate.peak=1e30", "--set", "checkpoint_every=1steps")
    step = int(line.partition("step ")[2].split()[0])
    dump = tmp_path / "run" / f"nonfinite-step-{step:08d}.json"
    assert f"fastssl replay run/{dump.name} does the step again" in line
    described = json.loads(dump.read_text())
    assert (described["step"], described["ranks"], described["checkpoint"]) == (step - 1, 1, f"step-{step - 1:08d}")
    assert described["loss_by_rank"][0]["total"] in ("nan", "inf", "-inf")
    (stage,) = stages_of(tmp_path / "run")
    plan = bind(stage.config.build(facts_of(open_data(("digits",)), 0), {}).plan(), open_data(("digits",))).plan
    assert described["ids"] == {name: plan.rows(name, step - 1).ids.tolist() for name in ("unlabelled", "support")}

    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    result = invoke("replay", dump)
    assert result.exit_code == 0, result.output
    first, where, *found = result.output.splitlines()
    checkpoint = tmp_path / "run" / "checkpoints" / f"step-{step - 1:08d}"
    assert first == f"from checkpoint {checkpoint} by eager steps to step {step}; ranks: 1"
    assert where.startswith(f"step {step}, rank 0 on ")
    assert found[0].startswith("  module online.") and any(words.startswith("  loss: ") for words in found)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def stages_of(run):
    resolved = json.loads((run / "resolved.json").read_text())
    return resolve(resolved["recipe"], tuple(resolved["run"]["changes"]))


def test_weights_that_a_finite_step_broke_are_named(tmp_path, monkeypatch):
    """Catches a replay that looks at losses alone, and one that trusts the dump: weights are looked at now and then,
    so the step that broke them may be an earlier one."""
    monkeypatch.setattr(Paws, "after_step", overflow_at_step_2)
    refused("train", "--out", "run", *SHORT, "--set", "checkpoint_every=6steps", "--set", "log_every=6steps")
    (dump,) = (tmp_path / "run").glob("nonfinite-*.json")
    result = invoke("replay", dump)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("from the initial weights by eager") and lines[1].startswith("step 3, rank 0 on ")
    assert lines[2] == "  weights of trunk.conv1.weight after the step: 0 nan and 1 inf of 36, the first of 1"


def test_what_does_not_come_about_again_is_said(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(Paws, "after_step", overflow_at_step_2)
        refused("train", "--out", "run", *SHORT)
    (dump,) = (tmp_path / "run").glob("nonfinite-*.json")
    assert "it does not come about again" in invoke("replay", dump).output


def test_a_file_that_describes_no_step(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    assert "other.json describes no step" in refused("replay", "other.json")


class Fickle(fakes.TinySemppl):
    """Its loss is not finite on the last rank at the steps in `at`; it has an average and a queue."""

    at: tuple[int, ...] = ()

    def loss(self, nets, batch):
        parts = super().loss(nets, batch)
        bad = int(batch.step) in self.at and dist.rank() == dist.world_size() - 1
        return {name: value * float("nan") if bad else value for name, value in parts.items()}


def fickle_job(folder, at, world=1, **changes):
    fakes.FAMILIES["fickle"], Fickle.at = Fickle, at
    (stage,) = fakes.stages("fickle")
    return fakes.job((replace(stage, checkpoint_every=Steps(1), keep_checkpoints=9),), folder, world=world, **changes)


def state_after(folder, step):
    return torch.load(folder / "checkpoints" / f"step-{step:08d}" / "state.pt", weights_only=True)


def tensors(value, path=""):
    if isinstance(value, dict):
        return {p: t for key, part in value.items() for p, t in tensors(part, f"{path}.{key}").items()}
    return {path: value} if torch.is_tensor(value) else {}


def skipping(folder, world):
    """Runs that leave out the step of number 2, whole and in pieces, and one that meets another; what that one says."""
    stages.run(fickle_job(folder / "whole", (2,), world, nonfinite="skip-once"))
    run_in_pieces(fickle_job(folder / "pieces", (2,), world, nonfinite="skip-once"), every=2)
    stages.run(fickle_job(folder / "first", (0,), world, nonfinite="skip-once"))
    try:
        stages.run(fickle_job(folder / "twice", (2, 4), world, nonfinite="skip-once"))
    except TrainingDiverged as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize("world", [1, 2])
def test_a_step_that_is_left_out_leaves_no_trace_and_a_second_one_stops(world, tmp_path):
    """Catches a momentum, average, statistic or queue that took the step, on the ranks whose loss was finite too; a
    count that a resume forgets, so that a step is left out after each."""
    told = skipping(tmp_path, 1) if world == 1 else run_ranks(2, skipping, tmp_path, 2)[0]
    before, after = (tensors(state_after(tmp_path / "whole", step)) for step in (2, 3))
    assert len(after) > 20 and [name for name in before if not torch.equal(before[name], after[name])] == []
    final, pieces = (state_after(tmp_path / run, 6) for run in ("whole", "pieces"))
    assert final["num_left_out"] == 1
    assert all(torch.equal(tensor, tensors(pieces)[name]) for name, tensor in tensors(final).items())
    assert not torch.equal(final["nets"]["online"]["head.weight"], after[".nets.online.head.weight"])
    counts = [line["left_out_steps"] for line in command.metrics(tmp_path / "whole") if "loss" in line]
    assert counts == [0, 0, 1, 1, 1, 1]
    momenta = tensors(state_after(tmp_path / "first", 1)["optimizer"]["state"])
    assert momenta and all(not m.any() for m in momenta.values())
    assert told.startswith("step 5 gave a loss")
    described = json.loads((tmp_path / "twice" / "nonfinite-step-00000005.json").read_text())
    assert described["loss_by_rank"][-1]["total"] == "nan"
    assert world == 1 or described["loss_by_rank"][0]["total"] == 0
