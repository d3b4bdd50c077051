"""`--step compiled` where nothing can be compiled, with torch's own compiler: the run is eager and says so."""

import os
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.end_to_end import command

TRAIN = ("train", "--out", "run", "--step", "compiled", *command.CHANGES, "--set", "length=2steps")
EAGER = "warning: --step compiled is not used, the step is eager and takes more time or memory: "


def programs_without_compilers(folder: Path) -> Path:
    """A folder of links to every program of the PATH that compiles nothing."""
    folder.mkdir()
    for place in map(Path, os.environ["PATH"].split(os.pathsep)):
        for program in place.glob("*"):
            if not any(name in program.name for name in ("gcc", "g++", "clang", "c++", "cc1")) and program.name != "cc":
                (folder / program.name).unlink(missing_ok=True)
                (folder / program.name).symlink_to(program)
    return folder


def why_eager(folder: Path, *arguments: str, **environment: str) -> str:
    """Train, which must succeed, and say in one line why it did so eagerly."""
    code, log = command.run(folder, *TRAIN, *arguments, **environment)
    assert code == 0 and "Traceback" not in log, log
    (line,) = [line for line in log.splitlines() if line.startswith("warning: ")]
    assert line.startswith(EAGER)
    return line.removeprefix(EAGER)


def test_a_machine_without_a_compiler_trains_eagerly_and_says_so(tmp_path):
    """Catches a traceback of the compiler's after the data was opened, and a slow run without a word."""
    without = programs_without_compilers(tmp_path / "bin")
    why = why_eager(tmp_path, PATH=str(without), CXX="g++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert "No working C++ compiler found" in why


@contextmanager
def full_disk(folder: Path):
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_no_room_for_compiled_code_is_known_before_ranks_wait_for_each_other(tmp_path):
    """Catches a rank that finds the disk full in the middle of compiling, while the other waits for its statistics."""
    with full_disk(tmp_path / "disk") as disk:
        why = why_eager(tmp_path, "--cpu-ranks", "2", TORCHINDUCTOR_CACHE_DIR=str(disk))
    assert why == f"{disk}, which keeps compiled code, has 0 MiB left: free some, or set TORCHINDUCTOR_CACHE_DIR"
