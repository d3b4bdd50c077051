"""Recipes that are the user's, in files outside the repository: `examples/` copied to another folder, with a method, an
encoder and an optimiser of its own."""

import shlex
import shutil
import subprocess
import sys

import pytest

from fastssl.errors import ConfigError
from fastssl.launch.lines import lines
from fastssl.launch.ranks import Ranks
from fastssl.recipes.resolve import canonical, resolve
from tests.end_to_end import command, slurm
from tests.support.interrupted import assert_same_run

EXAMPLES = command.ROOT / "examples"
LAST_STEP = 12
SETTINGS = ("steps=12", "checkpoint_every=3steps", "log_every=1steps", "batch_global=32", "evaluate=knn")
CHANGES = [part for change in SETTINGS for part in ("--set", change)]
TRAIN = ("train", "my_recipes.py:simsiam", "--out", "run", *CHANGES)


def laid_out(folder):
    """A folder with the examples in it, and nothing else."""
    folder.mkdir()
    for file in EXAMPLES.glob("my_*.py"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def outside(tmp_path):
    return lambda name: laid_out(tmp_path / name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody stops, by number of ranks."""
    found = {}
    for world in ("1", "2"):
        folder = laid_out(tmp_path_factory.mktemp("whole") / world)
        code, log = command.run(folder, *TRAIN, "--cpu-ranks", world, OMP_NUM_THREADS="1")
        assert code == 0, log
        found[world] = folder / "run"
    return found


@pytest.fixture(autouse=True)
def forgotten():
    """As another process would find it: nothing of the user's is loaded, nowhere of theirs is looked into."""
    modules, finders = set(sys.modules), list(sys.meta_path)
    yield
    sys.meta_path[:] = finders
    for name in set(sys.modules) - modules:
        if name.startswith(("my_", "a_package")):
            del sys.modules[name]


def torchrun(*arguments):
    """The line that is printed for several hosts, for two ranks on this one, by whose program this process runs."""
    typed = shlex.join(["fastssl", *arguments, "--gpus", "64"])
    words = shlex.split(lines(Ranks(64, "cuda"), typed)[0].replace("--gpus 64", "--cpu-ranks 2"))
    agent = words[1 : words.index("--no-python")]
    agent[agent.index("--nnodes") + 1], agent[agent.index("--nproc-per-node") + 1] = "1", "2"
    agent[agent.index("--rdzv-endpoint") + 1] = "127.0.0.1:0"
    ours = (sys.executable, "-P", "-m", "fastssl", *words[words.index("--no-python") + 2 :])
    return (sys.executable, "-m", "torch.distributed.run", *agent, "--no-python", *ours)


ALONE = (*command.FASTSSL, *TRAIN)


@pytest.mark.timeout(900)  # many starts of processes, on a machine that may be busy
@pytest.mark.parametrize(("world", "program"), [("1", ALONE), ("2", torchrun(*TRAIN))], ids=["alone", "torchrun"])
def test_they_are_killed_and_continue_bitwise(world, program, whole, outside):
    """Catches a rank that cannot import what the job holds, and weights or optimiser state that come back otherwise."""
    broken = outside("broken")
    with command.running(broken, program=program, OMP_NUM_THREADS="1") as process:
        command.wait_until(lambda: process.poll() is not None or command.steps_logged(broken / "run") >= 5)
        assert process.poll() is None, (broken / "log").read_text()
        command.kill(process.pid, *command.children(process.pid))
        process.wait()
    assert 5 <= command.steps_logged(broken / "run") < LAST_STEP
    with command.running(broken, program=program, OMP_NUM_THREADS="1") as process:
        assert process.wait(timeout=400) == 0, (broken / "log").read_text()
    assert_same_run(whole[world], broken / "run")


@pytest.mark.timeout(900)
def test_srun_starts_them(whole, outside):
    """Each task finds the file by what was typed: no launcher of ours hands it on."""
    if why := slurm.missing():
        pytest.skip(why)
    folder = outside("here")
    with slurm.cluster() as environment:
        environment |= {"PYTHONPATH": str(command.ROOT), "OMP_NUM_THREADS": "1"}
        typed = ("srun", "-n2", *ALONE, "--cpu-ranks", "2")
        done = subprocess.run(typed, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(whole["2"], folder / "run")


@pytest.mark.timeout(900)
def test_they_are_evaluated_from_another_folder_while_their_file_is_there(whole, tmp_path):
    method = whole["1"].parent / "my_method.py"
    evaluate = ("evaluate", str(whole["1"]), "--protocol", "knn")
    code, log = command.run(tmp_path, *evaluate)
    assert code == 0 and '"knn_top1"' in log, log
    method.rename(method.with_name("elsewhere"))
    code, log = command.run(tmp_path, *evaluate)
    method.with_name("elsewhere").rename(method)
    assert code == 1
    (said,) = [line for line in log.splitlines() if line.startswith("Error: ")]
    assert f"{whole['1']} needs the module my_method, which was {method}: it is not there" in said


# -------------------------------------------------------------------------------------------------------- in words


def test_a_file_and_a_module_mean_the_same_recipe(outside, monkeypatch):
    folder = outside("here")
    monkeypatch.chdir(folder)
    (stage,) = resolve("my_recipes.py:wider", ("epochs=3", "out_features=32"))
    assert (stage.config.out_features, stage.length.count) == (32, 3)
    assert canonical("my_recipes.py:wider") == canonical(f"{folder}/my_recipes.py:wider") == "my_recipes:wider"
    (stage,) = resolve("my_recipes:simsiam", ("encoder=three_convs(4)", "optimizer=lion(weight_decay=.1)"))
    assert (stage.config.encoder.width, stage.config.optimizer.weight_decay) == (4, 0.1)
    (folder / "a_package").mkdir()
    (folder / "a_package" / "__init__.py").touch()
    (folder / "a_package" / "recipes.py").write_text("from my_recipes import wider\n")
    assert canonical("a_package.recipes:wider") == "a_package.recipes:wider"
    assert str(folder) not in sys.path


RAISES = "import os\n\nvalue = {}['nothing']\n"
NOT_RECIPES = """
from fastssl.methods.base import Stages
from fastssl.recipes import paws

def plain():
    return paws.digits()

def asks(width) -> Stages:
    return paws.digits()

def mine() -> Stages:
    (stage,) = paws.digits()
    return (stage.with_settings(dataset="my_set"),)

number = 3
"""


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("my_recipe.py:wider", "my_recipe.py: there is no such file"),
        ("my_recipes.py:wder", "my_recipes.py has no recipe 'wder'; did you mean 'wider'?"),
        ("my_recipes.py", "my_recipes.py: say which recipe, as my_recipes.py:NAME; known: simsiam, wider"),
        ("my_recipes.py:", "say which recipe, as my_recipes.py:NAME"),
        ("my_raising.py:mine", "my_raising.py cannot be imported: {folder}/my_raising.py, line 3: KeyError: 'nothing'"),
        ("my_unparsed.py:mine", "my_unparsed.py cannot be imported: {folder}/my_unparsed.py, line 2: "),
        ("my_exit.py:mine", "my_exit.py cannot be imported: {folder}/my_exit.py, line 1: SystemExit: 3"),
        ("my_others.py:plain", "my_others.py: plain is no recipe: write it as `def plain() -> Stages:`"),
        ("my_others.py:asks", "my_others.py: asks is no recipe: write it as `def asks() -> Stages:`"),
        ("my_others.py:number", "my_others.py: number is no recipe"),
        ("my_others.py:mine", "dataset is 'my_set', but must be one of digits, cifar10, imagenet"),
        ("json.py:mine", "is called json, too: give the file another name"),
        ("loaders.py:mine", "is called loaders, too: give the file another name"),
        ("click.py:mine", "is called click, too: give the file another name"),
        ("my_package.recipes:mine", "there is no module 'my_package.recipes', neither installed nor in this folder"),
        ("my_raising:mine", "my_raising cannot be imported: {folder}/my_raising.py, line 3: KeyError: 'nothing'"),
    ],
)
def test_mistakes_are_one_line(name, says, outside, monkeypatch):
    folder = outside("here")
    monkeypatch.chdir(folder)
    (folder / "my_raising.py").write_text(RAISES)
    (folder / "my_unparsed.py").write_text("\ndef mine(:\n")
    (folder / "my_exit.py").write_text("raise SystemExit(3)\n")
    (folder / "my_others.py").write_text(NOT_RECIPES)
    for taken in ("json", "loaders", "click"):
        (folder / f"{taken}.py").touch()
    with pytest.raises(ConfigError) as error:
        resolve(name)
    assert says.format(folder=folder) in str(error.value)
    assert "\n" not in str(error.value)
