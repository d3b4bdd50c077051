"""Says what is foreground in every image of a training set, for views with a `SaliencyMask`: writes a file of masks.

    python -m tools.saliency DATA [--out FILE] [--threads N]
    python -m tools.saliency DATA --from FOLDER --made-by TEXT --saw-labels yes|no [--out FILE]

DATA is what `--data` takes, and training is then given the file as well: `--data DATA --data masks=FILE`. The first
form needs no network: the saliency of a pixel is its minimum barrier distance from the border of the image, and
foreground is what Otsu's threshold leaves of it. That finds what stands apart from its surroundings and does not touch
the border; a network that was trained to find objects does better. The second form takes such a network's masks: for
each image an image of its size and name (FOLDER/**/n01440764_10026.png, or 17.png for image 17 where images have no
names), foreground at half brightness or more; the file says what made them, and whether that had seen labels.

One that was stopped continues. At the end: how much foreground the images have, and what share of them can be masked.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numba import njit
from PIL import Image, ImageFilter

from loaders.errors import LoaderError, StoreError
from loaders.plan.views import SaliencyMask
from loaders.store.data import NOTHING_HELD_OUT, TRAIN, open_data
from loaders.store.images import ImageError, decode, open_image
from loaders.store.masks import MaskFile, MaskWriter, packed
from loaders.store.source import ArraySource, Source, is_encoded

MADE_BY = "minimum barrier distance and Otsu's threshold"
GRID = 96  # pixels of the longer side at which saliency is computed
SMOOTH = 1.5  # standard deviation of the blur that rounds its edges, pixels of the grid
SWEEPS = 3  # Zhang et al.: more change little
BLOCK = 1024  # images between two lines of progress

MaskOf = Callable[[int], np.ndarray]


@njit(nogil=True, cache=True)
def barrier_distance(plane):
    """Of each pixel, the least a path from it to the border must rise and fall: the greatest value on the path less the
    smallest. float32 [h, w] -> float32 [h, w], by sweeps to and fro (Zhang et al., ICCV 2015, algorithm 1)."""
    height, width = plane.shape
    distance = np.zeros((height, width), np.float32)
    distance[1:-1, 1:-1] = np.inf
    high, low = plane.copy(), plane.copy()  # on the best path yet
    for sweep in range(SWEEPS):
        step = 1 if sweep % 2 == 0 else -1
        for k in range(height * width):
            y, x = divmod(k if step == 1 else height * width - 1 - k, width)
            for near_y, near_x in ((y - step, x), (y, x - step)):
                if 0 <= near_y < height and 0 <= near_x < width:
                    top, bottom = max(high[near_y, near_x], plane[y, x]), min(low[near_y, near_x], plane[y, x])
                    if top - bottom < distance[y, x]:
                        distance[y, x], high[y, x], low[y, x] = top - bottom, top, bottom
    return distance


def otsu(levels: np.ndarray) -> int:
    """uint8 -> the level above which foreground begins: that which parts the values into two classes of the greatest
    variance between them (Otsu 1979)."""
    counts = np.bincount(levels.ravel(), minlength=256).astype(np.float64)
    below, mass = np.cumsum(counts), np.cumsum(counts * np.arange(256))
    apart = (mass[-1] * below / below[-1] - mass) ** 2
    both = below * (below[-1] - below)
    return int(np.divide(apart, both, out=np.zeros(256), where=both > 0).argmax())


def foreground(image: Image.Image, height: int, width: int) -> np.ndarray:
    """`image`, grey or RGB and of any resolution -> bool [height, width]."""
    scale = min(1.0, GRID / max(height, width))
    grid = max(1, round(width * scale)), max(1, round(height * scale))
    small = np.asarray(image.resize(grid, Image.Resampling.BILINEAR), np.float32).reshape(grid[1], grid[0], -1)
    distance = sum(barrier_distance(np.ascontiguousarray(small[..., c])) for c in range(small.shape[2]))
    levels = (distance * (255 / max(distance.max(), 1.0))).astype(np.uint8)
    smooth = Image.fromarray(levels).filter(ImageFilter.GaussianBlur(SMOOTH))
    return np.asarray(smooth.resize((width, height), Image.Resampling.BILINEAR)) > otsu(np.asarray(smooth))


def classical(source: Source) -> MaskOf:
    """The masks of `source` by `foreground`."""

    def mask_of(i: int) -> np.ndarray:
        height, width = source.sizes[i].tolist()
        if not is_encoded(source):
            assert isinstance(source, ArraySource)
            pixels = source.images[i]
            return foreground(Image.fromarray(pixels[..., 0] if source.channels == 1 else pixels), height, width)
        try:
            # decodes no finer than is needed
            return foreground(decode(source.jpeg(i), least=(2 * GRID, 2 * GRID)), height, width)
        except (ImageError, StoreError, OSError) as e:
            raise StoreError(f"image {i} ({source.name_of(i)}) of {source.name}: {e}") from e

    return mask_of


def from_folder(folder: Path, source: Source) -> MaskOf:
    """The masks of `source` that lie as images in `folder`. Raises StoreError where any image has none."""
    files: dict[str, Path] = {}
    for file in sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg")):
        if file.stem in files:
            raise StoreError(f"{folder}: both {files[file.stem]} and {file} are masks of {file.stem}")
        files[file.stem] = file
    stems = [Path(source.name_of(i)).stem for i in range(len(source))]
    missing = [stem for stem in stems if stem not in files]
    if missing:
        raise StoreError(f"{folder}: {len(missing)} of the {len(stems)} images have no mask, first {missing[0]}")
    if len(set(stems)) < len(stems):
        raise StoreError(f"{source.name}: several images share a name, so a name does not say whose a mask is")

    def mask_of(i: int) -> np.ndarray:
        try:
            with open_image(files[stems[i]]) as image:
                return np.asarray(image.convert("L")) >= 128
        except (ImageError, OSError, SyntaxError, ValueError) as e:
            raise StoreError(f"{files[stems[i]]}: {e}") from e

    return mask_of


def write(path: Path, source: Source, mask_of: MaskOf, made_by: str, saw_labels: bool, threads: int) -> None:
    """Write the masks of `source`, going on where an earlier call was stopped."""
    with (
        MaskWriter(path, source, made_by=made_by, saw_labels=saw_labels) as writer,
        ThreadPoolExecutor(threads) as pool,
    ):
        while writer.num_done < len(source):
            block = range(writer.num_done, min(writer.num_done + BLOCK, len(source)))
            for mask in pool.map(lambda i: packed(mask_of(i)), block):
                writer.add(mask)
            print(f"{writer.num_done:,} of {len(source):,} images", flush=True)


def summary(masks: MaskFile) -> str:
    """How much foreground the images have, by tenths, and the share that a view would mask."""
    counts, _ = np.histogram(masks.foreground, np.linspace(0, 1, 11))
    shares = 100 * counts / len(masks)
    least = SaliencyMask().least_foreground
    lines = [f"{10 * k:3} to {10 * k + 10:3} %  {share:5.1f} %  {'#' * round(share)}" for k, share in enumerate(shares)]
    enough = 100 * (masks.foreground >= least).mean()
    last = f"{enough:.1f} % of the images have {100 * least:.0f} % or more, and can be masked"
    return "\n".join(line.rstrip() for line in ("images by their share of foreground:", *lines, last))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("--out", type=Path, help="default: DATA.masks, or train.masks in a folder")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--from", type=Path, metavar="FOLDER", dest="folder", help="masks that a network has made")
    parser.add_argument("--made-by", metavar="TEXT", help="which network")
    parser.add_argument("--saw-labels", choices=("yes", "no"), help="whether it was trained with any of DATA's labels")
    arguments = parser.parse_args()
    data = Path(arguments.data)
    out = arguments.out or (data / "train.masks" if data.is_dir() else data.with_suffix(".masks"))
    if out.exists():
        parser.error(f"{out} is there already")
    if arguments.folder is not None and (arguments.made_by is None or arguments.saw_labels is None):
        parser.error("--from needs --made-by and --saw-labels: a run must be able to say what it looked through")
    try:
        source = open_data((arguments.data, NOTHING_HELD_OUT)).get(TRAIN)  # masks of all that may be learnt from
        if arguments.folder is None:
            write(out, source, classical(source), MADE_BY, False, arguments.threads)
        else:
            mask_of, saw_labels = from_folder(arguments.folder, source), arguments.saw_labels == "yes"
            write(out, source, mask_of, arguments.made_by, saw_labels, arguments.threads)
    except LoaderError as error:
        raise SystemExit(str(error)) from None
    print(summary(MaskFile(out)))
    print(f"--data {arguments.data} --data masks={out}")


if __name__ == "__main__":
    main()
