"""Trains for a while on several ranks and watches what must not grow: memory, threads, open files.

    python -m tools.soak --data IMAGENET [--minutes 30] [--cpu-ranks 2] [--loader turbo] [--json FILE]

The job is `paws.rn50_100ep` with a small network and small views, checkpoints and logging included; IMAGENET is what
`--data` takes. Every few seconds each process of the job is looked up in /proc. The verdict is over the samples after
the first fifth, in which buffers fill and code is compiled: a straight line through resident memory, and the range of
threads and of open files, for each rank and for the launcher.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.machine import commit, cpu_model

CHANGES = (
    "encoder.depth=10", "encoder.base_width=16", "out_features=32", "global_view.size=64", "small_view.size=32",
    "batch_global=16", "classes_global=8", "images_per_class=1", "precision=fp32", "epochs=1000000",
    "checkpoint_every=50steps", "log_every=5steps",
)  # fmt: skip
SAMPLE_S = 5.0


def processes(root: int) -> dict[int, str]:
    """The process `root` and all that descend from it, with a name for each."""
    found, todo = {}, [(root, "launcher")]
    while todo:
        pid, name = todo.pop()
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        except OSError:
            continue
        if name == "helper" and "multiprocessing.forkserver" in command:
            name = "server"
        found[pid] = f"{name} {pid}" if name == "rank" else name
        todo += [(int(child), "rank" if name == "server" else "helper") for child in children]
    return found


def sample(pid: int) -> dict[str, float]:
    """Resident MiB, threads and open files of a process."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return {
        "rss_mib": int(status["VmRSS"].split()[0]) / 1024,
        "threads": int(status["Threads"]),
        "files": len(os.listdir(f"/proc/{pid}/fd")),
    }


def verdict(samples: list[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """Slope of memory in MiB an hour, and the least and most of everything, after the first fifth."""
    settled = samples[len(samples) // 5 :]
    hours = [t / 3600 for t, _ in settled]
    slope = statistics.linear_regression(hours, [s["rss_mib"] for _, s in settled]).slope
    ranges = {
        f"{name}_{which}": pick(s[name] for _, s in settled)
        for name in ("rss_mib", "threads", "files")
        for which, pick in (("least", min), ("most", max))
    }
    return {"rss_mib_per_hour": slope, **ranges}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--cpu-ranks", default="2")
    parser.add_argument("--loader", default="turbo")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    changes = [word for change in CHANGES for word in ("--set", change)]
    train = ["train", "paws.rn50_100ep", "--data", arguments.data, "--labels", "all", "--loader", arguments.loader]
    seen: dict[str, list[tuple[float, dict[str, float]]]] = defaultdict(list)
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fastssl", *train, *changes, "--cpu-ranks", arguments.cpu_ranks]
        job = subprocess.Popen([*command, "--out", f"{folder}/run"], stdout=subprocess.DEVNULL)
        start = time.monotonic()
        while time.monotonic() - start < 60 * arguments.minutes and job.poll() is None:
            time.sleep(SAMPLE_S)
            for pid, name in processes(job.pid).items():
                try:
                    seen[name].append((time.monotonic() - start, sample(pid)))
                except OSError:
                    continue  # it has ended meanwhile
        ended_early = job.poll() is not None
        job.send_signal(signal.SIGTERM)
        code = job.wait(120)
        logged = [json.loads(line) for line in Path(f"{folder}/run/metrics.jsonl").read_text().splitlines()]
    result = {
        "minutes": arguments.minutes,
        "ended_early": ended_early,
        "exit_code": code,
        "steps": logged[-1]["step"],
        "processes": {name: verdict(samples) for name, samples in seen.items() if len(samples) > 10},
        "command": " ".join(["fastssl", *train, *changes, "--cpu-ranks", arguments.cpu_ranks]),
        "machine": cpu_model(),
        "commit": commit(),
    }
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
