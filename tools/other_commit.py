"""The code of another commit, run with this environment: for tools and tests that hold today's code to an earlier one.

Its processes import that commit's `fastssl`, `loaders` and `tests`, and nothing of this checkout.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path

from loaders.labels.published import cache_folder

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


def full_hash(commit: str) -> str:
    """The commit's. Raises NoSuchCommit, where the clone is too shallow to hold it too."""
    try:
        return git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}").decode().strip()
    except NoSuchCommit:
        raise NoSuchCommit(f"this repository's history has no commit {commit}; a shallow clone may lack it") from None


def tree_of(commit: str) -> Path:
    """A folder with the files of `commit`, kept in the cache because what it compiles is kept beside them. Raises
    NoSuchCommit."""
    place = cache_folder().parent / "commits" / full_hash(commit)
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as name:
            partial = Path(name) / "tree"
            with tarfile.open(fileobj=io.BytesIO(git("archive", place.name))) as archive:
                archive.extractall(partial, filter="data")
            with suppress(OSError):  # another process was faster
                partial.rename(place)
    return place


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
