"""What it takes to open a folder of many images, against a bare walk over it that reads every header.

    python -m benchmarks.opening [--images 100000] [--classes 100] [--trials 3] [--folder DIR]

Small JPEGs are written once into DIR, which stays. Both sides run in turns, after one turn that warms the page cache.
The walk is `os.walk`, then, in one thread, the size, time and header of each file; opening is what every command does
before it looks at a pixel: classes, labels, what is held out, sizes and the fingerprint; and beside it, images of two
roles that are the same.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from loaders.store.apart import check_apart
from loaders.store.data import open_data
from loaders.store.images import header_of


def written(folder: Path, num_images: int, num_classes: int) -> None:
    """Fill `folder`, unless it is full already, with JPEGs of noise of a few sizes."""
    rng, files = np.random.default_rng(0), []
    for k in range(50):
        buffer = io.BytesIO()
        pixels = rng.integers(0, 256, (24 + k % 7, 32 + k % 5, 3), np.uint8)
        Image.fromarray(pixels).save(buffer, "JPEG", quality=60)
        files.append(buffer.getvalue())
    for c in range(num_classes):
        place = folder / f"class{c:05}"
        place.mkdir(parents=True, exist_ok=True)
        for k in range(c, num_images, num_classes):
            path = place / f"{k:07}.jpg"
            if not path.exists():  # as many lengths as photographs have, and an end of its own: none is another's twin
                path.write_bytes(files[k % len(files)] + bytes((k * 2654435761 >> 7) % 3000) + k.to_bytes(8, "little"))


def walked(folder: Path) -> int:
    """Images found by a bare walk."""
    count = 0
    for place, _, names in os.walk(folder):
        for name in names:
            path = Path(place) / name
            os.stat(path)
            count += header_of(path).height > 0
    return count


def opened(folder: Path) -> int:
    data = open_data((str(folder),))
    data.fingerprints()
    return sum(map(len, data.sources.values()))


def apart(folder: Path) -> int:
    data = open_data((str(folder),))
    check_apart(data)
    return sum(map(len, data.sources.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "fastssl-opening")
    arguments = parser.parse_args()
    folder = arguments.folder / f"{arguments.images}-{arguments.classes}"
    written(folder, arguments.images, arguments.classes)
    sides = {"walk": walked, "open": opened, "open and compare roles": apart}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for trial in range(arguments.trials + 1):
        for name, side in sides.items():
            begin = time.perf_counter()
            assert side(folder) == arguments.images
            if trial:
                seconds[name].append(time.perf_counter() - begin)
    best = {name: min(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        shown = ", ".join(f"{each:.2f}" for each in times)
        print(f"{name:24} {best[name]:6.2f} s, {best[name] / best['walk']:.2f} x the walk   ({shown})")


if __name__ == "__main__":
    main()
