"""Files called `loaders.py` and `fastssl.py` in the current folder, as research repositories have them."""

import os
import re
import shlex
import stat
import subprocess
import sys

import pytest

from fastssl.launch.lines import lines
from fastssl.launch.ranks import Ranks
from tests.end_to_end import command

TRAIN = ("train", "--out", "run", "--cpu-ranks", "2", "--set", "steps=2", "--set", "evaluate=", *command.CHANGES[:-4])


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """`fastssl` as an installation makes it, in a folder of its own."""
    script = tmp_path_factory.mktemp("bin") / "fastssl"
    script.write_text(
        f"#!{sys.executable}\nimport sys\nfrom fastssl.commands.main import main\nif __name__ == '__main__':\n"
        "    sys.exit(main())\n"
    )
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return script


def torchrun_line():
    """The line that is printed for eight hosts, for two ranks on this one."""
    typed = shlex.join(["fastssl", *TRAIN]).replace("--cpu-ranks 2", "--gpus 64")
    line = lines(Ranks(64, "cuda"), typed)[0]
    assert "--nnodes 8 --nproc-per-node 8" in line and "--gpus 64" in line
    line = line.replace("--nnodes 8 --nproc-per-node 8", "--nnodes 1 --nproc-per-node 2")
    line = line.replace("--gpus 64", "--cpu-ranks 2").replace("FIRST_HOST:29400", "127.0.0.1:0")
    return [sys.executable, "-m", "torch.distributed.run", *shlex.split(line)[1:]]


@pytest.mark.parametrize(
    ("names", "how"),
    [
        (("loaders.py", "fastssl.py"), "fastssl"),
        (("loaders.py", "fastssl.py"), "python -P -m fastssl"),
        (("loaders.py",), "python -m fastssl"),
        (("loaders.py", "fastssl.py"), "torchrun"),
    ],
)
def test_ranks_import_none_of_them(names, how, program, tmp_path):
    """Two ranks, so also the processes that are started for them."""
    for name in names:
        (tmp_path / name).write_text("raise SystemExit('a stranger was imported')\n")
    started = {
        "fastssl": [str(program), *TRAIN],
        "python -P -m fastssl": [sys.executable, "-P", "-m", "fastssl", *TRAIN],
        "python -m fastssl": [sys.executable, "-m", "fastssl", *TRAIN],
        "torchrun": torchrun_line(),
    }[how]
    path = os.pathsep.join([str(program.parent), os.environ["PATH"]])
    environment = os.environ | {"PYTHONPATH": str(command.ROOT), "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(started, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert "stranger" not in done.stdout + done.stderr
    assert (tmp_path / "run" / "result.json").exists()


def test_tasks_of_a_submitted_job_do_not_look_into_their_folder(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit", reason="the extra `slurm` is not installed")
    from fastssl.launch.slurm import submit

    asked = {}
    monkeypatch.setattr(submitit.AutoExecutor, "__init__", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(submitit.AutoExecutor, "update_parameters", lambda self, **given: asked.update(given))
    monkeypatch.setattr(submitit.AutoExecutor, "submit", lambda self, work: type("Submitted", (), {"job_id": "7"}))
    said = submit(Ranks(2, "cpu"), print, "name", tmp_path, time_limit="10")
    assert re.match("submitted as SLURM job 7: 1 x 2 ranks", said)
    assert asked["slurm_setup"] == ["export PYTHONSAFEPATH=1"]
