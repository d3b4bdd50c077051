"""What `fastssl profile` runs: the recipe at a size that this machine can do, on the images given or on stand-ins.

Labels do not matter for time, so images are given labels in turn: any folder will do, with however few images.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastssl.config.changes import has_path
from fastssl.costs.cost import ours
from fastssl.costs.memory_model import memory_of
from fastssl.costs.trace import Trace, trace_step
from fastssl.engine.settings import How
from fastssl.errors import ConfigError
from fastssl.methods.base import Config, Facts, Stage
from fastssl.recipes.datasets import KNOWN_SETS
from loaders.plan.plan import Plan
from loaders.plan.views import Balanced, Whole
from loaders.store.data import LABELLED, DataSets
from loaders.store.source import ArraySource, EncodedSource, Source, digest, holds_pixels, is_encoded

CPU_STEP_FLOP = 0.25e12  # of one rank's step on a CPU: about a second on two cores
CARD_SHARE = 0.6  # of a GPU's memory that the chosen shard may need
LEAST = 2  # images of the epoch's stream a step and rank: batch norm needs several
LOADER_IMAGES = 32  # of the epoch's stream in a batch when the loader is measured by itself
SIZED = ("batch_global", "classes_global", "images_per_class")  # fields of a method's config, in global units

STAND_INS = 24  # different JPEGs
STAND_IN_SIZE = 406, 467  # mean height and width of ImageNet's
_QUALITY = 92  # and grain that make files of about ImageNet's mean, 110 KB
_GRAIN = 16.0


def sized(stage: Stage, most: int | None, world: int, fixed: bool) -> Stage:
    """The stage with `most` images of the epoch's stream a step and rank (None: its own), or as few more as the method
    takes, class-balanced ones in proportion: fewer classes, and images of a class only where two whole classes are too
    many. As it stands where `fixed`, or where its sizes are not ours to set. All labels are in use; all ranks do the
    same work."""
    config: Any = replace(stage.config, labels="all")
    if fixed or most is None or not has_path(config, "batch_global"):
        return replace(stage, config=config)
    whole = config.batch_global // world
    on_each = min(most, whole)
    while on_each < whole:
        try:
            return replace(stage, config=_with_batch(config, on_each, world))
        except ConfigError:  # too few for what it compares within a batch
            on_each = min(2 * on_each, whole)
    return replace(stage, config=_with_batch(config, whole, world))


def _with_batch(config: Any, on_each: int, world: int) -> Any:
    batch, sizes = config.batch_global, {"batch_global": on_each * world}
    if has_path(config, "classes_global") and has_path(config, "images_per_class"):
        supports = round(config.classes_global * config.images_per_class * on_each / batch)
        per_class = config.images_per_class if supports >= 2 * config.images_per_class else 1
        classes = max(2, supports // per_class)
        sizes |= {"classes_global": classes * world, "images_per_class": per_class}
    return replace(config, **sizes)


def fitting(stage: Stage, facts: Facts, world: int, device: str, how: How, fixed: bool) -> tuple[Stage, Trace]:
    """`sized` as large as each of `world` ranks can do, and its trace. Takes seconds; to be called before the ranks are
    joined. Raises Untraceable."""

    def traced(on_each: int | None) -> tuple[Stage, Trace]:
        chosen = sized(stage, on_each, world, fixed)
        return chosen, trace_step(chosen, facts, world)

    plan = stage.config.build(facts, {}).plan()
    whole = plan.stream(plan.epoch_of).batch_global // world
    if fixed or not has_path(stage.config, "batch_global"):
        return traced(None)
    if device == "cuda":
        limit_bytes = CARD_SHARE * torch.cuda.get_device_properties(0).total_memory
        on_each = whole
        chosen, trace = traced(on_each)
        while memory_of(trace).needed(how) > limit_bytes and on_each > LEAST:
            on_each //= 2
            chosen, trace = traced(on_each)
        return chosen, trace
    chosen, trace = traced(LEAST)
    times = int(CPU_STEP_FLOP * world / sum(ours(trace).flops.values()))
    return (chosen, trace) if times < 2 else traced(min(LEAST * 2 ** (times.bit_length() - 1), whole))


class Cycled:
    """`length` images of an encoded source, over and over, labelled 0, 1, ... in turn."""

    def __init__(self, source: EncodedSource, length: int, num_classes: int):
        self.source, self.name, self.channels = source, source.name, source.channels
        self._of = np.arange(length) % len(source)
        self.labels = np.arange(length) % num_classes
        self.sizes = source.sizes[self._of]
        self.class_names = tuple(str(c) for c in range(num_classes))
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.labels)

    def name_of(self, i: int) -> str:
        return self.source.name_of(int(self._of[i]))

    def path_of(self, i: int) -> str:
        return self.source.path_of(int(self._of[i]))

    def files(self) -> list[Path]:
        return self.source.files()

    def jpeg(self, i: int) -> bytes:
        return self.source.jpeg(int(self._of[i]))

    def read_pixels(self, i: int, buffer: np.ndarray) -> np.ndarray | None:
        return self.source.read_pixels(int(self._of[i]), buffer) if holds_pixels(self.source) else None

    @property
    def num_bytes(self) -> np.ndarray:
        return self.source.num_bytes[self._of]

    def tail(self, i: int, size: int) -> bytes:
        return self.source.tail(int(self._of[i]), size)

    @property
    def unreadable(self) -> dict[int, str]:
        there = self.source.unreadable
        return {i: there[int(j)] for i, j in enumerate(self._of) if int(j) in there} if there else {}

    def fingerprint(self) -> str:
        return digest([self.source.fingerprint(), len(self), self.num_classes])


class Ovals:
    """Stand-in masks: an oval over half of every image."""

    name, about = "stand-ins", "an oval over half of every image"

    def __init__(self, source: Source):
        self._sizes = source.sizes
        self.foreground = np.full(len(source), 0.5)

    def mask(self, i: int) -> np.ndarray:
        y, x = (np.linspace(-1, 1, side) for side in self._sizes[i].tolist())
        return x**2 + y[:, None] ** 2 < 2 / np.pi

    def fingerprint(self) -> str:
        return digest([self.name])


def usable(data: Mapping[str, Source], plans: Sequence[Plan]) -> DataSets:
    """The sources with labels in turn, long enough for every plan, and masks for the views that want them."""
    found = DataSets(data)
    streams = [stream for plan in plans for stream in plan.streams]
    orders = [stream.order for stream in streams if isinstance(stream.order, Balanced)]
    classes = max([1, found.get(LABELLED).num_classes, *(order.classes_global for order in orders)])
    least = max([s.batch_global for s in streams] + [classes * order.per_class for order in orders])
    keys = {stream.source for stream in streams} | {LABELLED}
    sources = {key: _relabelled(found.get(key), least, classes) for key in keys}
    return DataSets(sources, masks={key: Ovals(source) for key, source in sources.items()})


def _relabelled(source: Source, least: int, num_classes: int) -> Source:
    length = max(len(source), least)
    if is_encoded(source):
        return Cycled(source, length, num_classes)
    assert isinstance(source, ArraySource)
    images = source.images if length == len(source) else source.images[np.arange(length) % len(source)]
    names = tuple(str(c) for c in range(num_classes))
    return ArraySource(source.name, images, np.arange(length) % num_classes, names)


class Drawn:
    """Stand-ins for photographs, in memory: JPEGs of ImageNet's mean size in pixels and about that in bytes."""

    name, channels = "stand-ins", 3
    class_names, num_classes = ("drawn",), 1
    unreadable: Mapping[int, str] = {}  # noqa: RUF012 - none, and never written to

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._files = [_photograph(rng) for _ in range(STAND_INS)]
        self.labels = np.zeros(STAND_INS, np.int64)
        self.sizes = np.tile(np.array(STAND_IN_SIZE, np.int32), (STAND_INS, 1))

    def __len__(self) -> int:
        return STAND_INS

    def name_of(self, i: int) -> str:
        return str(i)

    def jpeg(self, i: int) -> bytes:
        return self._files[i]

    def path_of(self, i: int) -> str:
        return str(i)

    def files(self) -> list[Path]:
        return []

    @property
    def num_bytes(self) -> np.ndarray:
        return np.array([len(file) for file in self._files])

    def tail(self, i: int, size: int) -> bytes:
        return self._files[i][-size:]

    def fingerprint(self) -> str:
        return digest(self._files)


def _photograph(rng: np.random.Generator) -> bytes:
    """Large shapes and fine grain, as JPEG."""
    height, width = STAND_IN_SIZE
    shapes = Image.fromarray(rng.integers(0, 256, (12, 14, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    grain = rng.normal(0.0, _GRAIN, (height, width, 3))
    pixels = np.clip(np.asarray(shapes) + grain, 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def stand_ins(config: Config) -> Source:
    """Images like those of the recipe's data set: small whole ones as arrays, others as JPEGs."""
    known, view = KNOWN_SETS[config.dataset], config.eval_view
    if not isinstance(view.crop, Whole):
        return Drawn()
    images = np.random.default_rng(0).integers(0, 256, (2048, view.size, view.size, known.channels), np.uint8)
    return ArraySource(
        "stand-ins", images, np.arange(2048) % known.num_classes, tuple(map(str, range(known.num_classes)))
    )
