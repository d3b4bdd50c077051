"""A run with faults in it, from its first start to the comparison with a whole one."""

from __future__ import annotations

import random
import shutil
import tempfile
from pathlib import Path
from subprocess import SubprocessError

from tests.end_to_end import command
from tools.faults.kinds import KINDS
from tools.faults.scene import TRAIN, Scene, TooLate

TRIES = 5  # a busy machine may let a run finish before anything is done to it


def whole_run(folder: Path) -> Path:
    """The run directory of the job to which nothing is done."""
    code, log = command.run(folder, *TRAIN)
    assert code == 0, log
    return folder / "run"


def repetition(kind: str, whole: Path, seed: str, num_faults: int = 1) -> list[str]:
    """What happened, in words, in a run with `num_faults` of `kind`, or with one where the run then goes on to its end.

    Raises AssertionError where the job ends otherwise than it should, or differs; its folder is kept, and named in the
    error.
    """
    moments = random.Random(seed)
    for _ in range(TRIES):
        scene = Scene(Path(tempfile.mkdtemp(prefix=f"fastssl-{kind}-")), whole, moments, num_faults)
        try:
            happened: list[str] = []
            while len(happened) < num_faults and not scene.finished():
                happened.append(KINDS[kind](scene))
                if not scene.finished():
                    happened[-1] += f", after step {command.steps_logged(scene.run_dir)}"
            if not scene.finished():
                happened[-1] += f"; {scene.finish()}"
            scene.compare()
        except TooLate:
            shutil.rmtree(scene.folder)
            continue
        except (AssertionError, SubprocessError) as error:
            raise AssertionError(f"{error}\n{scene.folder} is kept") from error
        shutil.rmtree(scene.folder)
        return happened
    raise AssertionError(f"{kind}: the run always finished before it came about")
