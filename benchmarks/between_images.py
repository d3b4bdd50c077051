"""How long the default renderer holds Python's lock between images: what many threads wait for each other for.

    python -m benchmarks.between_images [--data DIR] [--rounds 200]     (default: $FASTSSL_TEST_DATA/imagenet-sample)

One thread renders the eight crops of PAWS on ImageNet, and whatever works without the lock does nothing: reads of the
file and libjpeg-turbo's decoder return what they returned before, and the crops' compiled kernel, which still takes its
arguments, leaves at once. Printed are microseconds of CPU time an image, of `turbo` from JPEGs and from decoded images
(`raw`): the median over rounds and the least. A process renders at most as many images a second as go into one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numba import njit

from benchmarks.loader import beton_of, raw_beton_of, together
from benchmarks.machine import commit, cpu_model
from loaders.loader import bind
from loaders.plan.plan import Plan
from loaders.renderers import turbo
from loaders.store.beton import BetonSource
from loaders.store.data import DataSets

MUST_US = 60
LARGEST = 1 << 24  # bytes of a decoded image


@njit(nogil=True)  # type: ignore[untyped-decorator]
def cut_nothing(image, mask, boxes, greys, cut_first, filter, first, step, out):  # type: ignore[no-untyped-def]
    """As `resize_copies` is called."""


class AtOnce(Executor):
    """A pool that is the calling thread."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def us_per_image(source: BetonSource, rounds: int) -> list[float]:
    """A round is a step's images."""
    plan = bind(Plan(together(), "unlabelled", seed=0), DataSets({"train": source})).plan
    rows = plan.rows("unlabelled", 0)
    out = {
        v.view.name: np.empty((v.view.copies * len(rows.ids), v.view.size, v.view.size, 3), np.uint8)
        for v in rows.views
    }
    room = np.empty(LARGEST, np.uint8)
    sizes = {source.jpeg(i): source.sizes[i] for i in rows.ids.tolist()}
    decoded = {file: room[: height * width * 3].reshape(height, width, 3) for file, (height, width) in sizes.items()}
    read = {int(source._jpeg_ptr[i]): source.jpeg(i) for i in rows.ids.tolist()}
    found = []
    with (
        mock.patch.object(turbo, "resize_copies", cut_nothing),
        mock.patch.object(turbo, "decode_jpeg", lambda file, colours, buffer: decoded[file]),
        mock.patch.object(source, "_pread", lambda start, size, what: read[start]),
        mock.patch.object(source, "_read_into", lambda start, pixels: len(pixels)),
    ):
        renderer = turbo.TurboRenderer(source, AtOnce())  # type: ignore[arg-type]
        for _ in range(rounds + 2):  # the first ones compile
            start = time.thread_time_ns()
            renderer.render(rows, out)
            found.append((time.thread_time_ns() - start) / 1000 / len(rows.ids))
    return found[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of class folders of JPEGs")
    parser.add_argument("--rounds", type=int, default=200)
    args = parser.parse_args()
    folder = args.data or Path(os.environ["FASTSSL_TEST_DATA"]) / "imagenet-sample"
    with tempfile.TemporaryDirectory() as made:
        sources = {
            "turbo": beton_of(folder, Path(made) / "train.beton"),
            "raw": raw_beton_of(folder, Path(made) / "raw"),
        }
        rates = {name: us_per_image(source, args.rounds) for name, source in sources.items()}
    us = {name: {"median": round(statistics.median(r), 1), "least": round(min(r), 1)} for name, r in rates.items()}
    print(json.dumps({"us_per_image": us, "must": MUST_US, "cpu": cpu_model(), "commit": commit()}, indent=2))


if __name__ == "__main__":
    main()
