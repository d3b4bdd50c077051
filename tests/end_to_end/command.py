"""The real command line in processes of its own, cut down so that a run takes seconds."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import chdir, contextmanager, suppress
from pathlib import Path

from click.testing import CliRunner

from fastssl.commands.main import main

ROOT = Path(__file__).parents[2]
FASTSSL = (sys.executable, "-m", "fastssl")

# paws.digits with the smallest network and batch that still use every part
TINY = (
    "encoder.base_width=4", "out_features=8", "batch_global=32", "images_per_class=4", "length=12steps",
    "checkpoint_every=3steps", "log_every=1steps", "evaluate_every=4steps", "rate.warmup=4steps", "rate.peak=0.8",
)  # fmt: skip
CHANGES = [part for change in TINY for part in ("--set", change)]


@contextmanager
def running(
    folder: Path, *arguments: str, program: tuple[str, ...] = FASTSSL, **environment: str
) -> Iterator[subprocess.Popen]:
    """`PROGRAM ARGUMENTS` in `folder`, its output in `folder/log`, in a process group of its own; no process of it
    outlives the context."""
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*program, *arguments],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            kill(*children(process.pid), process.pid)
            process.wait()


def run(folder: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """Exit code and output of `fastssl ARGUMENTS` in `folder`."""
    with running(folder, *arguments, **environment) as process:
        return process.wait(timeout=250), (folder / "log").read_text()


def run_here(folder: Path, *arguments: str) -> None:
    """`fastssl ARGUMENTS` in `folder` by this process, which has imported everything; it must succeed."""
    with chdir(folder):
        result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output


def children(pid: int) -> list[int]:
    """The processes below `pid` that are alive, at any depth."""
    below = [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]
    return [each for child in below for each in (child, *children(child))]


def alive(pid: int) -> bool:
    """Whether the process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def kill(*pids: int) -> None:
    """SIGKILL to each that is still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def interrupt(pid: int) -> None:
    """What a terminal does at Ctrl-C: SIGINT to every process of the group."""
    os.killpg(pid, signal.SIGINT)


def wait_until(condition, timeout_s: float = 250.0) -> None:
    """Look every few milliseconds; AssertionError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.002)


def steps_logged(run_dir: Path) -> int:
    """Training steps in metrics.jsonl so far."""
    path = run_dir / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def metrics(run_dir: Path) -> list[dict]:
    """Every line of metrics.jsonl without what a clock decides."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "time"} for record in records]
