"""The code of another commit, run with this environment: for tools and tests that hold today's code to an earlier one.

Its processes import that commit's `fastssl`, `loaders` and `tests`, and nothing of this checkout.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


class NoSuchCommit(Exception):
    """The history at hand lacks the commit, or there is none."""


def git(*arguments: str) -> bytes:
    """What git says of this checkout. Raises NoSuchCommit where git refuses."""
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode().strip()
        raise NoSuchCommit(f"git {' '.join(arguments)}: {said or error}") from None


def extract(commit: str, folder: Path) -> str:
    """Lay the files of `commit` out in `folder`; its full hash. Raises NoSuchCommit, where the clone is shallow too."""
    found = git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}").decode().strip()
    with tarfile.open(fileobj=io.BytesIO(git("archive", found))) as archive:
        archive.extractall(folder, filter="data")
    return found


def start(tree: Path, *arguments: str, cpu: int, log: Path, cwd: Path | None = None) -> subprocess.Popen[bytes]:
    """`python ARGUMENTS` with the code in `tree`, on one CPU and so with one thread; its output goes to `log`."""
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-P", *arguments],
            cwd=cwd or tree,
            env=os.environ | {"PYTHONPATH": str(tree), "CUDA_VISIBLE_DEVICES": ""},
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, {cpu}),
        )
