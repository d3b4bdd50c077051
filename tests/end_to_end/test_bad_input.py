"""Mistakes: each ends in one line that says what to do, an exit code other than 0, and no traceback."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner

from fastssl.api.on_ranks import on_ranks
from fastssl.commands.main import main
from fastssl.engine.job import Job
from fastssl.methods.paws import Paws
from tests.end_to_end import command
from tests.support import fakes

SHORT = (*command.CHANGES, "--set", "length=6steps", "--set", "evaluate=knn")
LABELS = "class '0' has 143 images, 500 were asked for"


def invoke(*arguments):
    """What the command line answers, in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(*arguments):
    """The one line of a command that must fail."""
    result = invoke(*arguments)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code != 0
    return only_error(result.output)


def only_error(output):
    assert "Traceback" not in output
    errors = [line for line in output.splitlines() if "rror" in line]
    assert len(errors) == 1 and errors[0] == output.splitlines()[-1], output
    return errors[0]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of six steps with checkpoints of step 4, after which it was evaluated, and 6."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    result = invoke("train", "--out", folder, *SHORT)
    assert result.exit_code == 0, result.output
    return folder


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("paws.digit", "unknown recipe 'paws.digit'; did you mean 'paws.digits'"),
        ("--set lr_peak=1", "lr_peak is rate.peak now: --set rate.peak=1"),
        ("--set rate.peek=1", "unknown key 'peek' in WarmupCosine; did you mean 'peak'?"),
        ("--set batch_globl=1", "unknown key 'batch_globl'; did you mean 'batch_global'?"),
        ("--set encoder.dept=10", "unknown key 'dept' in ResNet; did you mean 'depth'?"),
        ("--set encoder.depth=17", "choose one of 10, 18, 34, 50, 101, 152, 200"),
        ("--set batch_global=many", "a whole number is needed"),
        ("--set batch_global=0", "batch_global is 0, but must be 1 at least"),
        ("--set optimizer.weight_decay=-1", "weight_decay is -1.0, but must be 0 at least"),
        ("--set rate.peak=nan", "peak is nan"),
        ("--set global_view.size=0", "needs a pixel"),
        ("--set length=soon", "write 20epochs or 300steps"),
        ("--set length=0steps", "a stage of 0 steps does nothing"),
        ("--set evaluate=soft-nn,kn", "unknown protocol 'kn'; did you mean 'knn'?"),
        ("--set dataset=cifar10", "unknown key 'dataset'"),
        ("--set tau", "write key=value"),
        ("--labels per-class=ten", "write per-class=COUNT"),
        ("--labels per-class=500", LABELS),
        ("--labels nolist", "label list 'nolist' was not found"),
        ("--set classes_global=20", "wants 20 classes a batch, the data has 10: lower classes_global"),
        ("--set batch_global=5000", "a batch of 5000 needs as many images"),
        ("--seeds zero", "write different whole numbers separated by commas, such as 0,1,2"),
        ("--seeds 0,,1", "--seeds '0,,1'"),
        ("--seeds 0,0", "--seeds '0,0'"),
        ("--seeds 0,1 --out run", "--out names one run"),
        ("--gpus 999", "--gpus 999: this host has"),
        ("--gpus 2 --cpu-ranks 2", "give one of them"),
        ("--loader pil", "--loader pil: digits (train) holds arrays; choose auto or memory"),
        ("--loader fast", "choose auto or memory"),
        ("--data nowhere", "nowhere: no such file or folder"),
        ("--data notes.beton", "damaged or cut short"),
        ("--data empty", "empty: no images; looked for"),
        ("--data support=digits", "no data for 'labelled': give --data PATH or --data labelled=PATH (given: support)"),
        ("paws.cifar10", "paws.cifar10 needs images: --data PATH of the official binary CIFAR-10"),
        ("paws.cifar10 --data cifar", "data_batch_1.bin: CIFAR-10's has 30,730,000 bytes, this one has 3"),
        ("--set precision=fp16 --nonfinite skip-once", "fp16 leaves out steps by itself"),
        ("--init-from nowhere", "nowhere is not there"),
        ("--init-from notes.beton", "notes.beton is no file of weights"),
        ("--out notes.beton", "--out notes.beton cannot be written"),
    ],
)
def test_each_mistake_is_one_line_that_says_what_to_do(arguments, says, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "cifar").mkdir()
    (tmp_path / "cifar" / "data_batch_1.bin").write_bytes(b"abc")
    (tmp_path / "notes.beton").write_text("notes")
    assert says in refused("train", *arguments.split())


def test_a_mistake_claims_no_directory(tmp_path):
    """The corrected command must not be told that the directory holds another run."""
    assert LABELS in refused("train", "--out", "run", "--labels", "per-class=500")
    result = invoke("train", "--out", "run", *SHORT, "--set", "length=1steps")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("arguments", "differs"),
    [
        (["supervised.digits"], "recipe: paws.digits -> supervised.digits"),
        ([*SHORT, "--set", "tau=0.2"], "(stages.0.config.tau: 0.1 -> 0.2)"),
        ([*SHORT, "--seeds", "1"], "seed: 0 -> 1"),
        ([*SHORT, "--data", "digits", "--data", "validation=digits"], "data.validation"),
    ],
    ids=["recipe", "setting", "seed", "data"],
)
def test_directory_of_another_run_is_left_alone(finished, arguments, differs):
    before = (finished / "resolved.json").read_bytes()
    line = refused("train", *arguments, "--out", finished)
    assert "holds another run" in line and differs in line and "choose another --out" in line
    assert (finished / "resolved.json").read_bytes() == before


def overflow_at_step_2(method, nets, step, horizon):
    """In the place of `after_step`: the step's loss was finite, its weights are not."""
    if step == 2:
        next(nets.online.parameters()).data.flatten()[0] = float("inf")


@pytest.mark.parametrize("broken", ["loss", "weights"])
def test_what_is_not_finite_stops_with_step_ids_and_last_good_checkpoint(broken, tmp_path, monkeypatch):
    """Catches a checkpoint of broken weights, saved because the loss before it was still finite."""
    arguments = ("train", "--out", "run", *SHORT, "--set", "checkpoint_every=1steps")
    if broken == "weights":
        monkeypatch.setattr(Paws, "after_step", overflow_at_step_2)
    else:
        arguments += ("--set", "rate.peak=1e30")
    line = refused(*arguments)
    step = int(line.partition("step ")[2].split()[0])
    saved = sorted((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert saved and f"the last good checkpoint is run/checkpoints/{saved[-1].name}" in line
    assert int(saved[-1].name.removeprefix("step-")) == step - 1
    assert "image ids: unlabelled " in line and "support " in line
    for path in saved:
        weights = torch.load(path / "state.pt", weights_only=True)["nets"]["online"]
        assert all(w.isfinite().all() for name, w in weights.items() if "running" not in name)
    assert refused(*arguments) == line


def truncate(state):
    state.write_bytes(state.read_bytes()[:-100])


def flip_a_bit(state):
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)


def lose_the_digest(state):
    state.with_name("digest.json").unlink()


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lose_the_digest])
def test_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so(finished, tmp_path, damage):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "result.json").unlink()
    damage(run / "checkpoints" / "step-00000006" / "state.pt")
    result = invoke("train", "--out", run, *SHORT)
    assert result.exit_code == 0, result.output
    assert f"warning: checkpoint {run}/checkpoints/step-00000006 is damaged" in result.output
    assert "going back to step 4" in result.output
    assert command.metrics(run) == command.metrics(finished)


def test_no_whole_checkpoint_is_an_error(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "result.json").unlink()
    for state in run.glob("checkpoints/*/state.pt"):
        truncate(state)
    assert "can be read; start afresh in another --out" in refused("train", "--out", run, *SHORT)
    assert "can be read" in refused("evaluate", run, "--protocol", "knn")


def test_init_from_other_shapes_loads_nothing(finished):
    line = refused("train", "--out", "run", "--init-from", finished, *SHORT, "--set", "out_features=16")
    assert "2 tensors do not fit (projection.fc3.bias is [8], not [16]; projection.fc3.weight is" in line


def test_damaged_json_is_named(finished, tmp_path):
    for name in ("resolved.json", "result.json"):
        run = shutil.copytree(finished, tmp_path / name)
        (run / name).write_text("{")
        assert f"{name} cannot be read" in refused("train", "--out", run, *SHORT)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("evaluate", "empty", "--protocol", "knn"), "empty is no run directory: it has no resolved.json"),
        (("evaluate", "nowhere", "--protocol", "knn"), "nowhere is no run directory: it has no resolved.json"),
        (("evaluate", "empty", "--protocol", "soft"), "unknown protocol 'soft'; did you mean 'soft-nn'?"),
        (("embed", "empty"), "empty is no run directory"),
    ],
)
def test_commands_on_what_is_no_run(arguments, says, tmp_path):
    (tmp_path / "empty").mkdir()
    assert says in refused(*arguments)


def test_unknown_tap_and_missing_checkpoint(finished, tmp_path):
    assert "Paws has no tap 'logits'; it has backbone, h, z" in refused("embed", finished, "--tap", "logits")
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    assert "has no checkpoint yet" in refused("evaluate", run, "--protocol", "knn")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r["versions"].update(fastssl="99.1.0"), "was made by fastssl 99.1.0, and this is fastssl 0"),
        (lambda r: r["stages"][0]["config"].update(taus=1), "stages.0.config: PawsConfig has no 'taus'; did you mean"),
        (
            lambda r: r["stages"][0]["config"].update(tau="1"),
            "stages.0.config.tau: '1' stands where a number is needed",
        ),
        (lambda r: r["stages"][0]["config"].update(type="a:B"), "it is of the module a, which is not loaded"),
        (
            lambda r: r["stages"][0]["config"].update(type="fastssl.methods.vicreg:C"),
            "there is no 'fastssl.methods.vic",
        ),
        (lambda r: r["stages"][0].pop("length"), "stages.0: Stage lacks 'length', which has no default"),
        (lambda r: r.update(stages=[]), "has no stages"),
        (lambda r: r["run"].pop("data"), "is not what fastssl train writes: KeyError('data')"),
        (
            lambda r: r["run"].update(modules={"mine": "/nowhere/mine.py"}),
            "needs the module mine, which was /nowhere/m",
        ),
    ],
)
def test_runs_that_today_cannot_read(change, says, finished, tmp_path):
    """A newer fastssl's, a field, value or type that does not exist, a user's module that is gone."""
    run = shutil.copytree(finished, tmp_path / "run")
    resolved = json.loads((run / "resolved.json").read_text())
    change(resolved)
    (run / "resolved.json").write_text(json.dumps(resolved))
    for looks in (("evaluate", run, "--protocol", "knn"), ("embed", run), ("export", run)):
        assert says in refused(*looks)


def test_a_newer_versions_run_is_not_continued(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "result.json").unlink()
    resolved = json.loads((run / "resolved.json").read_text())
    resolved["versions"]["fastssl"] = "99.1"
    (run / "resolved.json").write_text(json.dumps(resolved))
    assert "was made by fastssl 99.1, and this is fastssl 0" in refused("train", "--out", run, *SHORT)


def test_a_run_outlives_a_changed_recipe(finished, tmp_path):
    """What it wrote counts, not what its recipe says today; a field that it does not have is named once, on stderr."""
    run = shutil.copytree(finished, tmp_path / "run")
    resolved = json.loads((run / "resolved.json").read_text())
    resolved["recipe"] = "paws.of_last_year"
    resolved["stages"][0]["config"]["tau"] = 0.5
    del resolved["stages"][0]["config"]["support_views"]
    (run / "resolved.json").write_text(json.dumps(resolved))
    result = CliRunner().invoke(main, ["evaluate", str(run), "--protocol", "knn", "--protocol", "soft-nn"])
    assert result.exit_code == 0 and set(json.loads(result.stdout)) > {"knn_top1", "soft_nn_top1"}
    assert result.stderr == f"note: {run} does not say PawsConfig.support_views (1 is assumed)\n"


def test_ranks_speak_once(tmp_path):
    """Catches an error once a rank, one that only the log of a launcher shows, and exit code 0."""
    code, output = command.run(tmp_path, "train", "--out", "run", "--cpu-ranks", "3", *SHORT)
    assert code == 1
    assert only_error(output) == "Error: batch 32 does not divide by 3 ranks; nearest: 2 or 4"


def test_a_bug_on_a_rank_is_shown_with_its_traceback(tmp_path):
    """A KeyError is no mistake of the user's: where it arose must be seen, not only that a rank ended."""
    stages = fakes.stages("nonsense")
    with pytest.raises(RuntimeError, match=r"(?s)rank [01]: Traceback.*fakes.py.*KeyError: 'nonsense'"):
        on_ranks(Job("fake", stages, (), ("digits",), tmp_path, 0, "cpu", 2))
