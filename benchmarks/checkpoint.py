"""What a checkpoint costs training, in seconds and in steps.

    python -m benchmarks.checkpoint [--recipe paws.cifar10] [--images 4] [--size 32] [--steps 6] [--pairs 5]

Two kinds of window run the recipe's own step on random images, in turns: without a checkpoint, and with one that is
taken and begun to be written after the first step, and not waited for before the window's end. Reported are medians
over windows of

held_s       wall time in which training stands still: the copy is taken
extra_cpu_s  CPU time of the whole process that a window with a checkpoint takes more than the one before it without:
             copying, hashing, writing. Where no core is free that is taken from training; on a host of a GPU it is not.

In steps: each over what a step takes, wall or CPU. CPU time, unlike wall time, is not disturbed by what else runs. One
thread; the shard of images is small for time's sake, so that a step is short, and a checkpoint that many steps more.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import commit, cpu_model
from fastssl.engine.join import facts_of
from fastssl.engine.train import Trainer
from fastssl.machine import keep_freed_memory
from fastssl.methods.base import Steps
from fastssl.recipes.resolve import resolve
from fastssl.run_dir.checkpoint import STATE, Checkpoints
from loaders.batch import Batch
from loaders.loader import Loader, bind
from loaders.store.data import DataSets
from loaders.store.source import ArraySource

NUM_CLASSES = 4


def trainer_of(recipe: str, num_images: int, size: int, folder: Path) -> tuple[Trainer, Loader]:
    """The recipe's first stage on random images: `num_images` unlabelled and as many labelled ones a step."""
    per_class = num_images // NUM_CLASSES
    shard = (f"batch_global={num_images}", f"classes_global={NUM_CLASSES}", f"images_per_class={per_class}")
    (stage,) = resolve(recipe, (*shard, "labels=all", "precision=fp32", f"global_view.size={size}"))
    stage = replace(stage, config=replace(stage.config, small_view=None), length=Steps(10**6))  # type: ignore[call-arg]
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (16 * num_images, size, size, 3), dtype=np.uint8)
    labels = np.arange(len(images)) % NUM_CLASSES
    data = DataSets({"train": ArraySource("random", images, labels, tuple(map(str, range(NUM_CLASSES))))})
    method = stage.config.build(facts_of(data, 0), {})
    loader = Loader(bind(method.plan(), data), threads=1)
    return Trainer(stage, method, loader, Checkpoints(folder), torch.device("cpu")), loader


def window(trainer: Trainer, batches: Iterator[Batch], num_steps: int, saves: bool) -> dict[str, float]:
    """Seconds of `num_steps` steps, with a checkpoint begun after the first where it `saves`."""
    start_s, start_cpu_s, held_s = time.perf_counter(), time.process_time(), 0.0
    for number in range(num_steps):
        batch = next(batches)
        trainer.training_step(trainer.step, trainer.horizon, batch)
        trainer.step += 1
        batch.release()
        if saves and number == 0:
            begin_s = time.perf_counter()
            trainer.saver.save(trainer.step, trainer.state())
            held_s = time.perf_counter() - begin_s
    trainer.saver.finish()
    return {"wall": time.perf_counter() - start_s, "cpu": time.process_time() - start_cpu_s, "held": held_s}


def measured(recipe: str, num_images: int, size: int, num_steps: int, pairs: int) -> dict:
    with tempfile.TemporaryDirectory() as name:
        trainer, loader = trainer_of(recipe, num_images, size, Path(name))
        with loader, closing(trainer.saver), closing(loader.batches(0, 10**6)) as batches:
            for saves in (False, True, True):  # buffers are made, files and memory have been touched
                window(trainer, batches, 2, saves)
            windows = [[window(trainer, batches, num_steps, saves) for saves in (False, True)] for _ in range(pairs)]
            num_bytes = (trainer.checkpoints.newest() / STATE).stat().st_size
    streams = trainer.loader.bound.plan.asked.streams
    num_crops = sum(stream.batch_global * view.copies for stream in streams for view in stream.views)
    step_s = statistics.median(without["wall"] for without, _ in windows) / num_steps
    step_cpu_s = statistics.median(without["cpu"] for without, _ in windows) / num_steps
    held_s = statistics.median(with_one["held"] for _, with_one in windows)
    extra_cpu_s = sorted(with_one["cpu"] - without["cpu"] for without, with_one in windows)
    return {
        "recipe": recipe,
        "crops_a_step": f"{num_crops} of {size} pixels",
        "parameters": sum(p.numel() for p in trainer.nets.online.parameters()),
        "checkpoint_mb": num_bytes / 1e6,
        "step_s": step_s,
        "step_cpu_s": step_cpu_s,
        "held_s": held_s,
        "held_steps": held_s / step_s,
        "extra_cpu_s": statistics.median(extra_cpu_s),
        "extra_cpu_steps": statistics.median(extra_cpu_s) / step_cpu_s,
        "extra_cpu_s_all": " ".join(f"{extra_s:.3f}" for extra_s in extra_cpu_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--recipe", default="paws.cifar10")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--pairs", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    found = measured(chosen.recipe, chosen.images, chosen.size, chosen.steps, chosen.pairs)
    found |= {"torch": torch.__version__, "python": platform.python_version(), "cpu": cpu_model(), "commit": commit()}
    for name, value in found.items():
        print(f"{name:16} {value:.4g}" if isinstance(value, float) else f"{name:16} {value}")


if __name__ == "__main__":
    main()
