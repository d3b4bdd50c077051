"""A PAWS step on trunks that others make, and on a vision transformer, in turns with what it is held to.

    python -m benchmarks.trunks timm [--quick] [--threads N] [--json FILE]
    python -m benchmarks.trunks vit [--quick] [--threads N] [--json FILE]

timm   a share of `paws.rn50_100ep`, bfloat16, eager: on `timm:resnet50` (the extra `timm`) and on our own ResNet-50
vit    shares of `paws.cifar10_vit_small` and `paws.vits16_100ep`, bfloat16, eager: ours, and plain PyTorch's of
       `benchmarks.plain`, AdamW with its moving decay included

Batches are noise. Windows, rounds and what is reported are those of `benchmarks.step`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import plain as peers
from benchmarks import step as benchmark
from benchmarks.step import Build, Contender, Problem
from fastssl.machine import keep_freed_memory
from fastssl.methods.base import Facts
from fastssl.methods.paws import PawsConfig
from fastssl.nn.encoders.timm_models import Timm
from fastssl.nn.encoders.vit import ViT
from fastssl.recipes.paws import cifar10_vit_small, vits16_100ep
from loaders.batch import Batch

CPU = torch.device("cpu")


def fastssl_on_timm(problem: Problem, batch: Batch) -> Contender:
    config = replace(problem.config, encoder=Timm("resnet50"))
    return benchmark.fastssl_eager(replace(problem, config=config), batch)


VIT: dict[str, Build] = {"plain_vit": benchmark.plain, "fastssl_vit": benchmark.fastssl_eager}
TIMM: dict[str, Build] = {"own_resnet50": benchmark.fastssl_eager, "fastssl_on_timm": fastssl_on_timm}


def cifar10_vit_problem(images: int) -> Problem:
    """`paws.cifar10_vit_small` with `images` of its 256 images and as large a share of its supports."""
    (stage,) = cifar10_vit_small()
    config = stage.config
    assert isinstance(config, PawsConfig)
    share = benchmark.share_of(config, images, config.classes_global, config.images_per_class * images // 256)
    return _vit_problem("vit_cifar10", share, Facts(10, 3, 0))


def vits16_problem(images: int, classes: int, per_class: int) -> Problem:
    """`paws.vits16_100ep` with `images` of its 1,024 images and `classes` x `per_class` supports for 6,720."""
    (stage,) = vits16_100ep()
    assert isinstance(stage.config, PawsConfig)
    share = benchmark.share_of(stage.config, images, classes, per_class)
    return _vit_problem("vits16_imagenet", share, Facts(1_000, 3, 0))


def _vit_problem(name: str, config: PawsConfig, facts: Facts) -> Problem:
    vit = config.encoder
    assert isinstance(vit, ViT)
    return Problem(name, config, facts, lambda: peers.ViT(vit.size, vit.patch, vit.width, vit.depth, vit.heads), CPU)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["timm", "vit"])
    parser.add_argument("--quick", action="store_true", help="short windows, and CIFAR-10's transformer alone")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    rounds, seconds = (5, 1.0) if arguments.quick else (11, 6.0)

    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    start = time.perf_counter()
    if arguments.what == "timm":
        problems, builds = [benchmark.rn50_problem(4, 6, 1, CPU)], TIMM
    else:
        problems, builds = [cifar10_vit_problem(64)], VIT
        problems += [] if arguments.quick else [vits16_problem(4, 6, 1)]
    results: dict[str, Any] = {}
    for problem in problems:
        batch = benchmark.noise_batch(problem)
        measured = benchmark.measure(problem, batch, builds, rounds, seconds)
        results[problem.name] = benchmark.summary(problem, measured)
        benchmark.show(results[problem.name])
    results["settings"] = {
        **benchmark.settings(CPU), "windows": rounds, "window_s": seconds, "load": os.getloadavg(),
        "took_s": round(time.perf_counter() - start, 1),
    }  # fmt: skip
    print(f"load at the end: {os.getloadavg()[0]:.1f}", file=sys.stderr)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
