"""What a training step must show on a GPU, in four calls of less than ten minutes: right first, then fast.

    python -m benchmarks.gpu [PART ...] [--json FILE] [--budget-s 570] [--dry-run]

1  kernels   every Triton kernel (finish, batch norm, LARS) against float64 references: the tests that hold them so
   steps     our step eager, compiled, recomputed and replayed from a graph, and the authors': same losses and gradients
   ranks     what several GPUs would do, in a group of one, beside a working loader: NCCL, DDP, graphs, LARS and SGD
   lars      `benchmarks.optimizer`
2  sixteenth a 1/16 shard of `paws.rn50_100ep` (256 + 420 images): the authors', plain, plain compiled, ours
3  graph     a 1/64 shard (64 + 105): ours eager and replayed from a graph; one step that must not wait for the device
   eighth    a 1/8 shard (512 + 840): the memory that a step needs, beside the model's
   kept      the 1/16 shard again: what is saved where nothing is computed a second time
4  loader    images a second from JPEG files and raw pixels to finished batches on the card
   accuracy  what `benchmarks.accuracy` trains and scores there

Without PART: the first call that FILE does not hold whole yet. What is found is written to FILE as it comes; a call
that is cut off, by its budget or otherwise, goes on where it was when it is given again, and the last lines say what to
type next. Nothing is timed before kernels, steps and ranks have passed; what fails there is told with its difference,
and what comes after it still runs. Pixels are noise. Windows last 20 seconds; contenders take turns.

--dry-run goes the same way at toy sizes, without a GPU too: parts that need one say so.
"""

# ruff: noqa: E402
from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as `fastssl` sets it; read when torch is loaded
# Code that one call has compiled the next one finds; the folder stays on a machine that is lent by the call.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parents[2] / "build" / "compiled"))
os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parents[2] / "build" / "triton"))

import argparse
import time

import torch

from benchmarks import step as steps_of
from benchmarks.gpu import fast, images, right
from benchmarks.gpu.calls import Found, Part, Record, Run, do, next_lines
from benchmarks.gpu.ranks import ranks

PARTS = {
    "kernels": Part(right.kernels, 90, must_pass=True),
    "steps": Part(right.steps, 120, must_pass=True),
    "ranks": Part(ranks, 120, must_pass=True),
    "lars": Part(fast.lars, 30),
    "sixteenth": Part(fast.sixteenth, 60),
    "graph": Part(fast.graph, 60),
    "eighth": Part(fast.eighth, 60),
    "kept": Part(fast.kept, 150),
    "loader": Part(images.loader, 60),
    "accuracy": Part(images.accuracy, 120),
}
CALLS = (
    ("kernels", "steps", "ranks", "lars"),
    ("sixteenth",),
    ("graph", "eighth", "kept"),
    ("loader", "accuracy"),
)
HIDDEN = {
    "steps_per_s",
    "image_equivalents_per_s",
    "compile_s",
    "ratios",
    "windows",
    "problem",
    "whole",
    "first_step_s",
}


def show(name: str, found: Found) -> None:
    if "steps_per_s" in found:
        steps_of.show(found)
    for key, value in found.items():
        if key not in HIDDEN:
            print(f"{name}: {key}: {value}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} [the next call's]")
    parser.add_argument("--json", type=Path, metavar="FILE", default=Path("gpu.json"))
    parser.add_argument("--budget-s", type=float, default=570.0)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if not torch.cuda.is_available() and not arguments.dry_run:
        parser.error("no GPU here: --dry-run goes the same way without one")

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    record, ends_s = Record(arguments.json), time.perf_counter() + arguments.budget_s
    run = Run(device, False, record, ends_s)
    if arguments.dry_run:
        run = Run(device, True, record, ends_s, rounds=1, window_s=0.1)
    unfinished = (names for names in CALLS if any(record.state(name) != "done" for name in names))
    names = arguments.parts or next(unfinished, ())
    do(run, PARTS, [name for name in PARTS if name in names], steps_of.settings(device), show)
    command = f"python -m benchmarks.gpu --json {arguments.json}" + (" --dry-run" if arguments.dry_run else "")
    lines = next_lines(PARTS, CALLS, record, command)
    print("\n".join(lines), flush=True)
    if any(record.state(name) == "failed" for name in names):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
