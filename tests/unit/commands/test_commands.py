"""The command line as users see it: which options there are, and that each stands in one place."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from fastssl.commands.main import main
from fastssl.commands.train import train
from fastssl.engine.job import Job
from fastssl.engine.settings import Settings
from fastssl.evaluation import protocol_names

# A new knob is a field of a recipe, set by --set; an option needs a reason to be here.
OF_TRAIN = {
    "--data", "--out", "--gpus", "--cpu-ranks", "--step", "--loader", "--cache-gib", "--damaged", "--resume",
    "--allow-change", "--init-from", "--unsafe-pickle", "--stage-to", "--log-to", "--nonfinite", "--watchdog",
    "--labels", "--set", "--sweep", "--held-out", "--seeds", "--dry-run", "--submit", "--nodes", "--gpus-per-node",
    "--cpus-per-rank", "--partition", "--time",
}  # fmt: skip


def options(command):
    return {flag for parameter in command.params for flag in parameter.opts if flag.startswith("--")}


def test_train_has_these_options_and_no_others():
    assert options(train) == OF_TRAIN


def test_every_setting_of_a_job_has_its_option():
    """Catches a setting that only Python can reach, and an option that reaches nothing."""
    flags = {field.metadata["option"].flag for field in Settings.__dataclass_fields__.values()}
    assert flags <= OF_TRAIN and len(flags) == len(Settings.__dataclass_fields__)
    assert Settings.__dataclass_fields__.keys() <= Job.__dataclass_fields__.keys()


def test_a_job_of_the_bare_command_is_a_job_of_defaults():
    context = train.make_context("train", ["--dry-run"])
    for name, field in Settings.__dataclass_fields__.items():
        assert context.params[name] == field.default, name


def test_values_that_a_setting_has_not_are_refused():
    for wrong in (["--step", "fast"], ["--damaged", "skip"], ["--watchdog", "-1"], ["--cache-gib", "many"]):
        said = CliRunner().invoke(main, ["train", *wrong])
        assert said.exit_code == 2 and wrong[0] in said.output and wrong[1] in said.output


def test_help_of_evaluate_names_every_protocol():
    said = CliRunner().invoke(main, ["evaluate", "--help"]).output
    assert [name for name in protocol_names() if name not in said] == []


@pytest.mark.parametrize("name", [None, *main.commands])
def test_help_is_on_one_screen_with_examples_first(name):
    """An option more that pushes it off the screen, a command without an example."""
    said = CliRunner().invoke(main, [*([name] if name else []), "--help"], prog_name="fastssl").output.splitlines()
    assert len(said) <= 40 and max(map(len, said)) <= 80
    assert said[2].startswith(f"  fastssl {name or ''}")


def test_help_needs_no_torch():
    """Catches an import at the top of a command's file, which costs every call of the command line seconds."""
    code = (
        "import sys; from click.testing import CliRunner; from fastssl.commands.main import main; "
        "assert CliRunner().invoke(main, ['train', '--help']).exit_code == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("shell", "says"),
    [
        ("exec {} >&-", "True False"),  # a run met no standard output: `NoneType` has no attribute
        ("mkdir gone; cd gone; rmdir ../gone; exec {}", "is gone: cd to one"),  # a traceback of multiprocessing
    ],
)
def test_a_process_that_was_started_oddly(shell, says, tmp_path):
    code = (
        "import os, sys; from fastssl.commands.main import main; main(['recipes'], standalone_mode=False); "
        "sys.stderr.write(f'{os.get_inheritable(1)} {sys.stdout.isatty()}')"
    )
    command = shell.format(shlex.join([sys.executable, "-c", code]))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    found = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert says in found.stderr, found.stderr
