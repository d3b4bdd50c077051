"""The kinds of fault: each starts the job of a `Scene` or continues it, does one fault to it and checks how it ends;
what happened, in words, comes back. To run the job to its end, unless it got there by itself, is left to the caller.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastssl.errors import EXIT_HUNG, EXIT_STOPPED
from tests.end_to_end import command, slurm, two_hosts
from tools.faults.scene import LATEST, RANKS, STEPS, TRAIN, WATCHDOG_S, WATCHED, Scene, TooLate, cpus, threads

SLACK_S = 30.0  # beyond the watchdog's limit: its own beats, and a busy machine's
CHECKPOINT, NOT_METRICS = 200_000, 50_000  # bytes: less than a checkpoint of this job, more than its metrics
SAVED = "as SIGTERM asked; the same command continues"
HOST = re.escape(socket.gethostname())


# ------------------------------------------------------------------------------------------------- processes


def kill_rank(scene: Scene) -> str:
    """SIGKILL to one rank, as the kernel does where memory is short."""
    with scene.training() as (process, ranks):
        rank = scene.random.randrange(len(ranks))
        command.kill(ranks[rank])
    scene.expect(process, 1, f"rank {rank} on {socket.gethostname()} died: SIGKILL (out of memory?); the same command")
    return f"rank {rank}"


def kill_all_ranks(scene: Scene) -> str:
    """SIGKILL to all ranks."""
    with scene.training() as (process, ranks):
        command.kill(*ranks)
    scene.expect(process, 1, "died: SIGKILL (out of memory?); the same command")
    return "all ranks"


def kill_launcher(scene: Scene) -> str:
    """SIGKILL to the launcher, which can tell nobody: its ranks must go by themselves."""
    with scene.training() as (process, _):
        command.kill(process.pid)
        killed_s = time.monotonic()
    gone_s = time.monotonic() - killed_s
    assert process.returncode == -signal.SIGKILL, scene.log()
    return f"the launcher, whose ranks were gone after {gone_s:.1f} s"


def kill_in_write(scene: Scene) -> str:
    """SIGKILL to all in the middle of a checkpoint's write."""
    begun_ns = time.time_ns()
    with scene.training() as (process, ranks):
        partial = _stopped_in_write(scene, process, ranks, begun_ns)
        num_bytes = _unfinished(scene, begun_ns)[partial]
        command.kill(process.pid, *ranks)
    assert partial.exists() and not (partial.parent / partial.name[1:].removesuffix(".partial")).exists()
    return f"{partial.name}, {num_bytes:,} bytes of it there"


def _stopped_in_write(scene: Scene, process: subprocess.Popen, ranks: list[int], begun_ns: int) -> Path:
    """Stop the ranks such that an unfinished checkpoint lies there; its folder."""
    least_bytes = scene.random.choice((0, 1))  # before anything is written, or after
    while process.poll() is None:
        if max(_unfinished(scene, begun_ns).values(), default=-1) < least_bytes:
            time.sleep(0.0002)  # a write takes milliseconds
            continue
        _signal(signal.SIGSTOP, ranks)
        command.wait_until(lambda: all(set(threads(pid)) <= {"T", "Z"} for pid in ranks), timeout_s=20)
        if found := _unfinished(scene, begun_ns):
            return next(iter(found))
        _signal(signal.SIGCONT, ranks)
    raise TooLate


def _unfinished(scene: Scene, begun_ns: int) -> dict[Path, int]:
    """The folders of checkpoints that have been begun since `begun_ns` and not finished, with the bytes in them."""
    found = {}
    for path in scene.run_dir.glob("checkpoints/.step-*.partial"):
        with suppress(FileNotFoundError):  # it has just been finished
            if path.stat().st_mtime_ns > begun_ns:
                found[path] = sum(file.stat().st_size for file in path.iterdir())
    return found


def terminate(scene: Scene) -> str:
    """SIGTERM to the launcher: all ranks save at one step, and nothing is done again."""
    with scene.training(first=1) as (process, _):
        process.send_signal(signal.SIGTERM)
    scene.expect(process, EXIT_STOPPED, SAVED)
    assert scene.checkpoints()[-1].name == f"step-{command.steps_logged(scene.run_dir):08d}"
    return "the launcher, and all saved"


def stop_rank(scene: Scene) -> str:
    """SIGSTOP to one rank, which keeps its connections and says nothing: the watchdog names it."""
    with scene.training(first=1, train=WATCHED) as (process, ranks):
        rank = scene.random.randrange(len(ranks))
        _signal(signal.SIGSTOP, ranks[rank : rank + 1])
        start_s = time.monotonic()
        command.wait_until(lambda: process.poll() is not None or "watchdog: " in scene.log())
        named_s = time.monotonic() - start_s
    scene.expect(process, EXIT_HUNG, "a rank hung, as the watchdog said above; the same command continues")
    log = scene.log()
    assert re.search(rf"^watchdog: rank {rank} on {HOST} has not answered for \d+ s", log, re.MULTILINE), log
    assert "File " in log.partition(f"rank-{1 - rank:05d}:")[2], log  # the stacks of the one that waits
    assert named_s < WATCHDOG_S + SLACK_S
    return f"rank {rank}, named after {named_s:.1f} s"


def _signal(signum: signal.Signals, pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):  # its run has just finished
            os.kill(pid, signum)


# ------------------------------------------------------------------------------------------------- the disk


def fill_disk(scene: Scene) -> str:
    """No space left in the middle of a checkpoint, on a file system of its own; then there is space again."""
    with _small_disk(scene):
        with scene.training() as (process, _):
            command.wait_until(lambda: scene.checkpoints() or process.poll() is not None)
            ballast = scene.run_dir / "ballast"
            # Metrics still fit, a checkpoint does not. An old one may be just about to be dropped: fill its place too.
            while process.poll() is None:
                too_much = _free_bytes(scene.run_dir) - scene.random.randrange(NOT_METRICS, CHECKPOINT)
                if too_much > 0:
                    with ballast.open("ab") as file:
                        file.write(bytes(too_much))
                time.sleep(0.005)
        scene.expect(process, 1, "No space left on device")
        num_bytes = ballast.stat().st_size
        assert "cannot write checkpoint" in scene.log() and not _unfinished(scene, 0)
        ballast.unlink()
        return f"{num_bytes:,} bytes of ballast; {scene.finish()}"


@contextmanager
def _small_disk(scene: Scene) -> Iterator[None]:
    """A small tmpfs as the run directory."""
    scene.run_dir.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "fastssl", str(scene.run_dir)], check=True)
    kept = scene.folder / "kept"
    try:
        yield
        shutil.copytree(scene.run_dir, kept)
    finally:
        subprocess.run(["umount", str(scene.run_dir)], check=True)
    scene.run_dir.rmdir()
    kept.rename(scene.run_dir)


def truncate_newest(scene: Scene) -> str:
    """The newest checkpoint lost its end."""

    def damage(state: Path) -> str:
        length = scene.random.randrange(state.stat().st_size)
        os.truncate(state, length)
        return f"cut to {length:,} bytes"

    return _damaged(scene, damage)


def flip_bit_of_newest(scene: Scene) -> str:
    """One bit of the newest checkpoint is another."""

    def damage(state: Path) -> str:
        content = bytearray(state.read_bytes())
        bit = scene.random.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        state.write_bytes(content)
        return f"bit {bit:,} flipped"

    return _damaged(scene, damage)


def _damaged(scene: Scene, damage: Callable[[Path], str]) -> str:
    """Kill a run that has two checkpoints, damage the newest and continue: it must go back to the one before, and say
    so."""
    with scene.training() as (process, _):
        command.wait_until(lambda: len(scene.checkpoints()) >= 2 or process.poll() is not None)
        command.kill(process.pid)
    before, newest = scene.checkpoints()[-2:]
    what = damage(newest / "state.pt")
    went_on = scene.finish()
    says = f"is damaged (its digest differs); going back to step {int(before.name[5:])}"
    assert f"{newest.name} {says}" in scene.log(), scene.log()
    return f"{newest.name} {what}; {went_on}"


def _free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


# ------------------------------------------------------------------------------------------------- schedulers, hosts


def requeue(scene: Scene) -> str:
    """`scontrol requeue` of a job under a real SLURM: SIGTERM, then the same job again, which continues."""
    at = scene.random.randint(1, STEPS // 2)
    log = scene.folder / "log"
    with slurm.cluster() as environment:

        def answer(*words: str) -> str:
            return subprocess.check_output(words, cwd=scene.folder, env=environment, text=True).strip()

        environment = environment | {"PYTHONPATH": str(command.ROOT)}
        options = ("--parsable", f"--ntasks={RANKS}", "--requeue", "--open-mode=append", f"--output={log}")
        number = answer("sbatch", *options, "--wrap", shlex.join(["srun", *command.FASTSSL, *TRAIN]))
        command.wait_until(lambda: command.steps_logged(scene.run_dir) >= at)
        scene.struck_s, before = time.monotonic(), len(scene.log())
        answer("scontrol", "requeue", number)
        command.wait_until(lambda: SAVED in scene.log() or scene.finished())
        if scene.finished():
            raise TooLate
        done = command.steps_logged(scene.run_dir)
        lost = scene.goes_on(done, lambda: scene.log()[before:], scene.finished)
        command.wait_until(lambda: (scene.run_dir / "result.json").exists())
        command.wait_until(lambda: answer("squeue", "--noheader", "--format=%T") == "")
    assert scene.log().count(SAVED) == 1, scene.log()
    return f"after step {at}; {lost}"


def cut_link(scene: Scene) -> str:
    """The link between two hosts is cut for good: the ranks of both end, and each says whom it lost."""
    with two_hosts.two_hosts() as hosts:
        ranks = _one_on_each(hosts, scene)
        _wait_for_step(scene, ranks)
        hosts.cut()
        scene.struck_s = time.monotonic()
        codes = [rank.wait(timeout=WATCHDOG_S + SLACK_S) for rank in ranks]
        took_s = time.monotonic() - scene.struck_s
        if scene.finished():
            raise TooLate
        logs = [_log_of(scene, host) for host in range(2)]
        assert codes == [EXIT_HUNG, EXIT_HUNG], logs
        assert re.search(rf"watchdog: rank 1 on {HOST} has not answered for \d+ s", logs[0]), logs[0]
        assert re.search(r"watchdog: the first rank's host has not answered for \d+ s", logs[1]), logs[1]
        hosts.restore()
        done, again = command.steps_logged(scene.run_dir), _one_on_each(hosts, scene)
        lost = scene.goes_on(done, lambda: _log_of(scene, 0), lambda: again[0].poll() is not None)
        codes = [rank.wait(timeout=200) for rank in again]
        assert codes == [0, 0], _log_of(scene, 0)
    return f"both ranks had ended {took_s:.1f} s later; {lost}"


def cut_link_for_a_moment(scene: Scene) -> str:
    """The link is cut for less than the watchdog's limit: training goes on."""
    with two_hosts.two_hosts() as hosts:
        ranks = _one_on_each(hosts, scene)
        _wait_for_step(scene, ranks)
        hosts.cut()
        cut_s = scene.random.uniform(0.3, 2.0)
        time.sleep(cut_s)
        before = command.steps_logged(scene.run_dir)
        hosts.restore()
        codes = [rank.wait(timeout=200) for rank in ranks]
    if before == STEPS:
        raise TooLate
    assert codes == [0, 0], _log_of(scene, 0) + _log_of(scene, 1)
    return f"for {cut_s:.1f} s after step {before}"


def _one_on_each(hosts: two_hosts.TwoHosts, scene: Scene) -> list[subprocess.Popen]:
    """A rank on each host, started as any launcher would; each has a CPU of its own, so that it has as many threads as
    in a run on one host."""
    group = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    master = {"MASTER_ADDR": two_hosts.ADDRESSES[0], "MASTER_PORT": "29400"}
    return [
        hosts.start(
            host,
            ["taskset", "--cpu-list", str(cpu), *command.FASTSSL, *WATCHED],
            scene.folder / f"log{host}",
            RANK=str(host),
            **group,
            **master,
        )
        for host, cpu in enumerate(cpus()[:2])
    ]


def _wait_for_step(scene: Scene, ranks: list[subprocess.Popen]) -> None:
    at = scene.random.randint(1, LATEST)
    command.wait_until(
        lambda: any(rank.poll() is not None for rank in ranks) or command.steps_logged(scene.run_dir) >= at
    )


def _log_of(scene: Scene, host: int) -> str:
    return (scene.folder / f"log{host}").read_text()


# ------------------------------------------------------------------------------------------------- by name


KINDS: dict[str, Callable[[Scene], str]] = {
    "kill-rank": kill_rank,
    "kill-all-ranks": kill_all_ranks,
    "kill-launcher": kill_launcher,
    "kill-in-write": kill_in_write,
    "disk-full": fill_disk,
    "truncated": truncate_newest,
    "bit-flipped": flip_bit_of_newest,
    "terminate": terminate,
    "requeue": requeue,
    "link-cut": cut_link,
    "link-interrupted": cut_link_for_a_moment,
    "rank-stopped": stop_rank,
}


def missing(kind: str) -> str:
    """What this machine lacks for `kind`; empty where nothing."""
    match kind:
        case "requeue":
            return slurm.missing()
        case "link-cut" | "link-interrupted":
            return two_hosts.missing() or ("two hosts need two CPUs" if len(cpus()) < 2 else "")
        case "disk-full":
            return "" if os.geteuid() == 0 else "not root, who alone mounts file systems"
    return ""
