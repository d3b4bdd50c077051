"""How fast an image folder becomes a `.beton`: our conversion beside FFCV's DatasetWriter, on the same files and cores.

    python -m benchmarks.convert --data DIR [--copies N] [--rounds N] [--json FILE]
                                                    (default: $FASTSSL_TEST_DATA/imagenet-sample)

The folder's images are linked N times over into a folder of their own, and converted in turns: each round, in an order
that moves, each contender writes the whole set once. Pages of the source are in the cache for all of them. Ours syncs
its files to the disk before it says it is done; FFCV does not. Reported are medians over rounds of images per second
of wall time and of CPU milliseconds per image (worker processes included).

ffcv_writer   DatasetWriter, RGBImageField(write_mode="jpg"), a worker process a CPU; decodes and encodes anew
fastssl       every image decoded as a check, its bytes passed through
unchecked     the same with --no-decode-check
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from loaders.convert.conversion import Options, convert, prepare
from loaders.store.folder import FolderSource

TARGETS = {"fastssl": 1.4, "unchecked": 5.0}  # times FFCV's images a second


class Decoded:
    """What users give DatasetWriter: an indexable set of (PIL image, label)."""

    def __init__(self, root: Path):
        source = FolderSource(root)
        classes = source.class_names
        self.rows = [(root / classes[c] / source.name_of(i), int(c)) for i, c in enumerate(source.labels)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        path, label = self.rows[i]
        with Image.open(path) as image:
            return image.convert("RGB"), label


def ffcv_writer(source: Path, out: Path) -> None:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(write_mode="jpg"), "label": IntField()}
    writer = DatasetWriter(str(out / "train.beton"), fields, num_workers=len(os.sched_getaffinity(0)))
    writer.from_indexed_dataset(Decoded(source))


def fastssl(source: Path, out: Path) -> None:
    convert(prepare(source, Options()), out)


def unchecked(source: Path, out: Path) -> None:
    convert(prepare(source, Options(decode_check=False)), out)


CONTENDERS: dict[str, Callable[[Path, Path], None]] = {f.__name__: f for f in (ffcv_writer, fastssl, unchecked)}


def link_tree(data: Path, root: Path, copies: int) -> int:
    """`copies` times the images of `data` in `root`, as links under names of their own; how many."""
    files = sorted(f for f in data.glob("*/*") if f.is_file())
    for k, file in enumerate(files):
        folder = root / file.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        for copy in range(copies):
            os.symlink(file.resolve(), folder / f"{file.stem}_{copy}{file.suffix}")
        if k == 0:
            Image.open(file).load()  # Pillow's plugins are imported before any clock runs
    return len(files) * copies


def cpu_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usages)


def measure(source: Path, scratch: Path, num_images: int, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Contender -> (images per second, CPU ms per image) of each round; a first round warms up and is dropped."""
    names = list(CONTENDERS)
    windows: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for k in range(rounds + 1):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            out = scratch / name
            out.mkdir()
            wall, cpu = time.perf_counter(), cpu_s()
            CONTENDERS[name](source, out)
            wall, cpu = time.perf_counter() - wall, cpu_s() - cpu
            shutil.rmtree(out)
            os.sync()
            if k:
                windows[name].append((num_images / wall, 1e3 * cpu / num_images))
    return windows


def report(windows: dict[str, list[tuple[float, float]]], num_images: int) -> dict[str, Any]:
    rates = {name: [rate for rate, _ in rows] for name, rows in windows.items()}
    middle = {name: statistics.median(found) for name, found in rates.items()}
    return {
        "images_per_s": middle,
        "images_per_s_all_rounds": rates,
        "cpu_ms_per_image": {name: statistics.median(cpu for _, cpu in rows) for name, rows in windows.items()},
        "times_ffcv_writer": {name: middle[name] / middle["ffcv_writer"] for name in TARGETS},
        "targets": TARGETS,
        "num_images": num_images,
        "cpus": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("ffcv", "opencv-python", "pillow", "numpy")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = os.environ.get("FASTSSL_TEST_DATA")
    parser.add_argument("--data", type=Path, default=Path(default) / "imagenet-sample" if default else None)
    parser.add_argument("--copies", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.data is None:
        parser.error("--data DIR: a folder of class folders of JPEGs")
    with tempfile.TemporaryDirectory() as scratch:
        num_images = link_tree(args.data, Path(scratch) / "source", args.copies)
        found = report(measure(Path(scratch) / "source", Path(scratch), num_images, args.rounds), num_images)
    for name, rate in found["images_per_s"].items():
        spread = found["images_per_s_all_rounds"][name]
        times = f", {found['times_ffcv_writer'][name]:.2f} x FFCV (must {TARGETS[name]})" if name in TARGETS else ""
        cpu = found["cpu_ms_per_image"][name]
        print(f"{name:12} {rate:7.0f} images/s ({min(spread):.0f} to {max(spread):.0f}), {cpu:.2f} CPU ms each{times}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
