"""What SemPPL's neighbours and votes cost beside the networks: a 64th of the ImageNet job, on the CPU.

    python -m benchmarks.semppl [--json FILE] [--images N] [--rounds N]

votes      64 images x 4 views ask 4 queues of 81,920 x 256 (`fastssl.methods.semppl.vote`): float32, as in training
queues     new entries written, positives drawn
networks   ResNet-50's loss and backward of ReLICv2, its target's forward: N images (default 4) of 4 + 2 views in the
           recipe's precision or float32, times 64 / N, for which a machine without a GPU would take minutes

They go in turns, on one thread; reported are medians of CPU seconds, the share of votes and queues in the whole, the
arithmetic of each, and the most memory that votes need beyond the queues.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine import commit, cpu_model
from fastssl.losses.keyed_draws import random_bits
from fastssl.losses.queues import LabelledQueues
from fastssl.methods.base import Facts
from fastssl.methods.semppl import Semppl, SempplConfig, vote
from fastssl.recipes.resolve import resolve
from loaders.batch import Batch, Part

SHARD = 64  # images of a rank where 64 share the batch
IMAGENET = Facts(num_classes=1000, channels=3, seed=0)
PAPER = 0.045  # of the step, on TPUs: appendix F


class Networks:
    """The step without semantic positives, on few images."""

    def __init__(self, config: SempplConfig, precision: str, images: int):
        torch.manual_seed(0)
        base = replace(config.base, num_negatives=min(10, images - 1))  # type: ignore[call-arg]
        settings: dict[str, Any] = {"alpha": 0.0, "base": base, "precision": precision}
        self.method = Semppl(replace(config, **settings), IMAGENET, {})
        self.nets = self.method.nets()
        for module in self.nets.modules().values():
            module.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        x = {v.name: torch.rand(v.copies * images, 3, v.size, v.size) for v in config.views}
        x = {name: pixels.to(memory_format=torch.channels_last) for name, pixels in x.items()}
        ids = torch.arange(images)
        self.batch = Batch({"images": Part(x, ids, ids * 0 - 1, None, ids, ids)}, torch.tensor(0))

    def __call__(self) -> None:
        self.nets.online.zero_grad()
        self.method.loss(self.nets, self.batch)["total"].backward()


class Shard:
    """A rank's embeddings beside full queues; a tenth of the batch is labelled."""

    def __init__(self, config: SempplConfig):
        torch.manual_seed(0)
        self.config = config
        settings = config.num_large, config.capacity, config.out_features, IMAGENET.num_classes
        self.queues = LabelledQueues(*settings, random_start=True)
        self.z_LBD = torch.nn.functional.normalize(torch.randn(config.num_large, SHARD, config.out_features), dim=2)
        self.target_GLD = torch.randn(config.batch_global, config.num_large, config.out_features)
        label_G = torch.randint(IMAGENET.num_classes, (config.batch_global,))
        self.label_G = torch.where(torch.rand(config.batch_global) < 0.1, label_G, -1)

    def votes(self) -> None:
        self.voted = vote(self.z_LBD, self.queues)

    def writes_and_draws(self) -> None:
        self.queues.put(self.target_GLD, self.label_G)
        bits = random_bits(torch.arange(SHARD), 1, self.config.num_large * self.config.positives)
        slot, _ = self.queues.draw(self.voted.label_N, bits)
        self.queues.z_LCD[:, slot]


def seconds(work: Callable[[], None]) -> float:
    start_s = time.process_time()  # others may use the cores, too
    work()
    return time.process_time() - start_s


def arithmetic(work: Callable[[], None]) -> int:
    """Floating-point operations of products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def peak_bytes(work: Callable[[], None]) -> int:
    """Most bytes that it held at once, by the allocator's events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore
    return int(max(np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    (stage,) = resolve("semppl.rn50_300ep")
    config = stage.config
    assert isinstance(config, SempplConfig)
    networks, shard = Networks(config, arguments.precision, arguments.images), Shard(config)
    parts: dict[str, Callable[[], None]] = {
        "votes": shard.votes, "queues": shard.writes_and_draws, "networks": networks,
    }  # fmt: skip
    scale = {"votes": 1.0, "queues": 1.0, "networks": SHARD / arguments.images}

    measured: dict[str, list[float]] = {name: [] for name in parts}
    for round_ in range(arguments.rounds + 1):
        for name, work in parts.items():
            took_s = seconds(work) * scale[name]
            if round_:  # the first one is not counted
                measured[name].append(took_s)
    flop = {name: arithmetic(work) * scale[name] for name, work in parts.items()}
    middle = {name: statistics.median(values) for name, values in measured.items()}
    result = {
        "cpu_s": middle,
        "least_to_most_cpu_s": {name: [min(values), max(values)] for name, values in measured.items()},
        "share_of_votes_and_queues": (middle["votes"] + middle["queues"]) / sum(middle.values()),
        "paper_share_of_votes": PAPER,
        "tflop": {name: value / 1e12 for name, value in flop.items()},
        "share_of_arithmetic": flop["votes"] / sum(flop.values()),
        "votes_peak_mb": peak_bytes(shard.votes) / 1e6,
        "settings": {
            "images": arguments.images,
            "rounds": arguments.rounds,
            "precision": arguments.precision,
            "load": os.getloadavg()[0],
            "cpu": cpu_model(),
            "torch": torch.__version__,
            "commit": commit(),
            "command": " ".join(["python -m benchmarks.semppl", *sys.argv[1:]]),
        },
    }
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
