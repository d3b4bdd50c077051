"""Whose a run directory is: one live job's, with the settings it was begun with, the same on every rank."""

import json
import os
import shutil
import signal
from dataclasses import replace

import pytest

from fastssl import dist
from fastssl.engine import claim, same_everywhere, stages
from fastssl.errors import FastsslError
from fastssl.run_dir import lock as run_lock
from tests.end_to_end import command
from tests.end_to_end.test_bad_input import SHORT, invoke, refused
from tests.ranks.pool import run_ranks
from tests.support import fakes

LONG = ("train", "--out", "run", *command.CHANGES, "--set", "length=100000steps", "--set", "checkpoint_every=1steps")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of six steps that has come to step 4."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    result = invoke("train", "--out", folder, *SHORT)
    assert result.exit_code == 0, result.output
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    return folder


def test_a_directory_in_use_is_refused_and_free_once_its_job_was_killed(tmp_path, monkeypatch):
    """Catches two jobs that write one directory, and a lock that does not say who has it or outlives a kill."""
    monkeypatch.setattr(run_lock, "PATIENCE_S", 0.1)
    with command.running(tmp_path, *LONG) as process:
        command.wait_until(lambda: process.poll() is not None or command.steps_logged(tmp_path / "run") > 0)
        line = refused(*LONG)
        holder = f"host {os.uname().nodename}, pid {process.pid}, since 2"
        assert line.startswith(f"Error: run is in use by another job ({holder}")
        command.kill(process.pid)
        assert process.wait() == -signal.SIGKILL
    assert (tmp_path / "run" / "lock").exists()
    with run_lock.held(tmp_path / "run"):
        pass


def test_the_ranks_of_a_job_that_is_just_ending_are_waited_for(tmp_path):
    """Catches a requeued job that fails because the one before it takes a second to go."""
    with command.running(tmp_path, *LONG) as process:
        command.wait_until(lambda: process.poll() is not None or command.steps_logged(tmp_path / "run") > 0)
        process.send_signal(signal.SIGTERM)
        with run_lock.held(tmp_path / "run"):
            pass


def test_a_setting_may_differ_only_by_name(stopped, tmp_path):
    """Catches drift that passes unseen, a name that allows more than it says, and a change that leaves no trace."""
    run = shutil.copytree(stopped, tmp_path / "run")
    begun = (run / "resolved.json").read_bytes()
    drifted = ("train", "--out", run, *SHORT, "--set", "tau=0.2", "--set", "sharpen_T=0.5")
    line = refused(*drifted, "--allow-change", "tau")
    assert "(stages.0.config.sharpen_T: 0.25 -> 0.5)" in line and line.endswith("--allow-change sharpen_T")
    assert (run / "resolved.json").read_bytes() == begun

    result = invoke(*drifted, "--allow-change", "tau", "--allow-change", "config.sharpen_T")
    assert result.exit_code == 0, result.output
    changed = ["stages.0.config.sharpen_T: 0.25 -> 0.5", "stages.0.config.tau: 0.1 -> 0.2"]
    assert f"note: continued with other settings: {'; '.join(changed)}" in result.output.splitlines()
    assert " from step 4\n" in result.output
    resolved = json.loads((run / "resolved.json").read_text())
    assert resolved["stages"][0]["config"]["tau"] == 0.2 and "tau=0.2" in resolved["run"]["changes"]
    assert [allowed["changed"] for allowed in resolved["allowed"]] == [changed]
    assert resolved["versions"] == json.loads(begun)["versions"]
    assert invoke("evaluate", run, "--protocol", "knn").exit_code == 0
    assert invoke(*drifted).exit_code == 0  # now the command it is made with
    back = refused("train", "--out", run, *SHORT, "--allow-change", "config")
    assert "is finished, and nothing in it can change" in back


@pytest.mark.parametrize("allowed", [(), ("--allow-change", "batch_global")], ids=["unsaid", "allowed"])
def test_images_a_step_do_not_change(allowed, stopped, tmp_path):
    """Catches a run that says it is finished, and has trained nothing more: with twice the images a step an epoch has
    half the steps, and those that were done count for twice the epochs."""
    run = shutil.copytree(stopped, tmp_path / "run")
    line = refused("train", "--out", run, *SHORT, "--set", "batch_global=64", *allowed)
    assert "was begun with 32 images a step, and this is 64: how far a run has come is kept in steps" in line
    assert "keep 32, or start another --out with --init-from" in line and "--allow-change" not in line


def test_a_run_of_other_rounding_is_continued_only_where_that_is_said(stopped, tmp_path, monkeypatch):
    """Catches a run that goes on, in silence, on images of other bits; and one that is finished, or whose ops are the
    same, and can be looked at no more."""
    run = shutil.copytree(stopped, tmp_path / "run")
    again = ("train", "--out", run, *SHORT)
    resolved = json.loads((run / "resolved.json").read_text())
    assert resolved.pop("rounding") == claim.ROUNDING
    (run / "resolved.json").write_text(json.dumps(resolved))  # as it was begun before it was said
    monkeypatch.setattr(claim, "SAME_BITS", {1: frozenset({"Affine"})})  # so Noise is not
    assert "rounds images otherwise" in refused(*again)
    result = invoke(*again, "--allow-change", "rounding")
    assert result.exit_code == 0 and "note: continued with other settings: rounding: 1 -> " in result.output
    assert json.loads((run / "resolved.json").read_text())["rounding"] == claim.ROUNDING

    monkeypatch.setattr(claim, "ROUNDING", claim.ROUNDING + 1)
    assert "finished: " in invoke(*again).output
    same = shutil.copytree(stopped, tmp_path / "same")
    monkeypatch.setattr(claim, "SAME_BITS", {claim.ROUNDING - 1: frozenset({"Affine", "Noise"})})
    assert " from step 4\n" in invoke("train", "--out", same, *SHORT).output


def differing(job, what):
    """Rank 2's job, code or data is another; what each rank is told."""
    if dist.rank() == 2:
        if what == "settings":
            job = replace(job, seed=1)
        elif what == "data":
            job = replace(job, data=("digits", "validation=digits"))
        else:
            same_everywhere.code_digest = lambda: "0"
    try:
        stages.run(job)
    except FastsslError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize("what", ["code", "settings", "data"])
def test_a_rank_that_differs_is_named_at_the_start(what, tmp_path):
    """Catches ranks that average gradients of different losses, images or code: training goes on all the same."""
    job = fakes.job(fakes.stages("paws"), tmp_path / "run", world=3)
    told = run_ranks(3, differing, job, what)
    assert len(set(told)) == 1
    assert told[0].startswith(f"rank 2 on {os.uname().nodename} has other {what} than 2 of 3 ranks")
    if what == "settings":
        assert "(seed: 0 -> 1)" in told[0]
    assert not (tmp_path / "run").exists()
