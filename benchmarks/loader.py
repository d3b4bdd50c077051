"""How fast PAWS's unlabelled images come in on this machine's CPUs, beside what people use today.

    python -m benchmarks.loader --data DIR [--quick] [--json FILE]      (default: $FASTSSL_TEST_DATA/imagenet-sample)
                                [--peers PYTHON] [--against PATH]

Every contender turns JPEG files into the eight views of PAWS on ImageNet (two of 224 pixels, six of 96: crop, flip,
colour, grey, blur, normalise, float32), on all CPUs, in turns: each round gives each of them one window, alone; it is
started before and ended after it. Reported are medians over windows of images per second of wall time and per second
of CPU time (worker processes included).

The files lie in the page cache; ours reads them from a `.beton` written for the run, the others from their folder.
Contenders that need another environment, or a process of their own, are described in `benchmarks.loader_peers`; without
the options that name an environment they are left out.

pil_dataloader  torch's DataLoader, a worker a CPU; PIL and NumPy transforms as torchvision's, written out below
eight_decodes   a stream for each view: every view decodes its images for itself; ours in everything else
dali_own_ops    NVIDIA DALI on the CPU: one decode, its own random crops, colour twist and blur
fastssl_*       `loaders.Loader` with each renderer, finished by numba
fastssl_raw     ... `turbo`, from a `.beton` whose images are stored decoded
fastssl_shards  ... `turbo`, in place from WebDataset shards of the same bytes
fastssl_half_raw, fastssl_all_jpeg  ... `turbo`, from files of FFCV's DatasetWriter: of the same images, no side longer
                than 500, half of them raw, and none
decode_only     the floor: FFCV's libturbojpeg decodes each image, nothing else
decode_and_crops  ... and cuts and resizes its eight crops, uint8
ffcv_loader_raw FFCV's own Loader, from the file of fastssl_raw; it leaves hue, grey and blur out
torchvision_v2, spdl  with the PYTHON of `--peers`, which has torchvision and SPDL and whichever torch suits them
build_COMMIT_ffcv  fastssl_ffcv of the checkout PATH of `--against`, with the environment PATH/.venv
"""

from __future__ import annotations

import argparse
import gc
import io
import itertools
import json
import math
import os
import platform
import random
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from benchmarks.loader_peers import BATCH, Batches, all_served, in_workers, laws, window
from benchmarks.machine import commit, cpu_model
from fastssl.methods.paws import GLOBAL_VIEW, SMALL_VIEW
from loaders.convert.conversion import Options, convert, prepare
from loaders.loader import Loader, bind
from loaders.plan.ops import ColourJitter, GaussianBlur, Grayscale
from loaders.plan.plan import Plan, Rows, ViewRows
from loaders.plan.views import IMAGENET, Rrc, Shuffled, Stream, View
from loaders.renderers.ffcv import FfcvRenderer
from loaders.renderers.turbo import TurboRenderer
from loaders.store.beton import BetonSource, BetonWriter
from loaders.store.data import DataSets
from loaders.store.folder import FolderSource
from loaders.store.openers import open_path
from loaders.store.source import Source

VIEWS = (GLOBAL_VIEW, SMALL_VIEW)
TARGETS = {  # ours : the peer -> (must, moonshot)
    ("fastssl_ffcv", "pil_dataloader"): (4.5, 6.0),
    ("fastssl_ffcv", "eight_decodes"): (3.0, None),
    ("fastssl_ffcv", "dali_own_ops"): (2.0, None),
    ("fastssl_shards", "fastssl_turbo"): (0.9, None),
    ("fastssl_half_raw", "fastssl_all_jpeg"): (1.3, None),
    ("fastssl_turbo", "fastssl_ffcv"): (0.95, None),
    ("fastssl_turbo", "fastssl_pil"): (1.7, None),
    ("fastssl_turbo", "build_41f6bfd_ffcv"): (1.08, 1.15),
    ("fastssl_raw", "build_41f6bfd_ffcv"): (2.2, 3.0),
    ("fastssl_raw", "pil_dataloader"): (14, None),
    ("fastssl_raw", "torchvision_v2"): (4, None),
}
CROPS_PER_CPU_S = (550, 750)  # decode_and_crops, images a second and core: must, moonshot
NAMED = (  # those whose rates the report gives first
    "pil_dataloader", "eight_decodes", "dali_own_ops", "fastssl_ffcv", "fastssl_dali", "decode_only", "fastssl_turbo",
    "fastssl_raw", "build_41f6bfd_ffcv", "torchvision_v2", "spdl", "ffcv_loader_raw",
)  # fmt: skip

Contender = Callable[[float], tuple[float, float]]  # seconds of a window -> images a wall second and a CPU second


# ---------------------------------------------------------------------------------------------- PIL and a DataLoader


def pil_crop(image: Image.Image, view: View) -> Image.Image:
    """torchvision's RandomResizedCrop."""
    law = view.crop
    assert isinstance(law, Rrc)
    width, height = image.size
    low, high = map(math.log, law.ratio)
    for _ in range(10):
        area = width * height * random.uniform(*law.area)
        aspect = math.exp(random.uniform(low, high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w, h = min(width, round(height * law.ratio[1])), min(height, round(width / law.ratio[0]))
    x, y = random.randint(0, width - w), random.randint(0, height - h)
    return image.crop((x, y, x + w, y + h)).resize((view.size, view.size), Image.Resampling.BILINEAR)


def pil_hue(image: Image.Image, turns: float) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    turned = np.array(hue) + np.array(turns * 255).astype(np.int32).astype(np.uint8)  # wraps around
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def pil_jitter(image: Image.Image, op: ColourJitter) -> Image.Image:
    def factor(strength: float) -> float:
        return random.uniform(max(0.0, 1 - strength), 1 + strength)

    steps: list[Callable[[Image.Image], Image.Image]] = [
        lambda im: ImageEnhance.Brightness(im).enhance(factor(op.brightness)),
        lambda im: ImageEnhance.Contrast(im).enhance(factor(op.contrast)),
        lambda im: ImageEnhance.Color(im).enhance(factor(op.saturation)),
        lambda im: pil_hue(im, random.uniform(-op.hue, op.hue)),
    ]
    random.shuffle(steps)
    for step in steps:
        image = step(image)
    return image


def pil_view(image: Image.Image, view: View) -> torch.Tensor:
    """A view as PAWS's authors make it: crop, flip, jitter, grey, blur, to a tensor, normalise."""
    _, jitter, grey, blur = view.ops
    assert isinstance(jitter, ColourJitter) and isinstance(grey, Grayscale) and isinstance(blur, GaussianBlur)
    image = pil_crop(image, view)
    if random.random() < 0.5:
        image = ImageOps.mirror(image)
    if random.random() < jitter.p:
        image = pil_jitter(image, jitter)
    if random.random() < grey.p:
        image = image.convert("L").convert("RGB")
    if random.random() < blur.p:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(*blur.sigma)))
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
    mean, std = (torch.tensor(values)[:, None, None] for values in (view.pixels.mean, view.pixels.std))
    return x.sub_(mean).div_(std)


class PilImages(torch.utils.data.Dataset):
    """An item is the eight views of a file."""

    def __init__(self, paths: list[Path]):
        self.paths = paths

    def __getitem__(self, i: int) -> list[torch.Tensor]:
        with open(self.paths[i], "rb") as file:
            image = Image.open(file).convert("RGB")
        return [pil_view(image, view) for view in VIEWS for _ in range(view.copies)]


def pil_dataloader(paths: list[Path], threads: int) -> Batches:
    return in_workers(PilImages(paths), len(paths), threads)


# ------------------------------------------------------------------------------------------------------------- DALI


def dali_own_ops(paths: list[Path], threads: int) -> Batches:
    """One decode for all crops; probabilities by DALI's conditional execution, so that what is not drawn costs
    nothing."""
    from nvidia.dali import fn, pipeline_def, types

    mean, std = ([255 * value for value in values] for values in (IMAGENET.mean, IMAGENET.std))

    def view_of(image: Any, view: View) -> Any:
        _, jitter, grey, blur = view.ops
        assert isinstance(view.crop, Rrc) and isinstance(jitter, ColourJitter) and isinstance(blur, GaussianBlur)
        x = fn.random_resized_crop(
            image, size=view.size, random_area=view.crop.area, random_aspect_ratio=view.crop.ratio, antialias=True
        )

        def factor(strength: float) -> Any:
            return fn.random.uniform(range=(max(0.0, 1 - strength), 1 + strength))

        if fn.random.coin_flip(probability=jitter.p, dtype=types.BOOL):
            x = fn.color_twist(
                x,
                brightness=factor(jitter.brightness),
                contrast=factor(jitter.contrast),
                saturation=factor(jitter.saturation),
                hue=fn.random.uniform(range=(-360 * jitter.hue, 360 * jitter.hue)),
            )
        if fn.random.coin_flip(probability=grey.p, dtype=types.BOOL):
            x = fn.saturation(x, saturation=0.0)
        if fn.random.coin_flip(probability=blur.p, dtype=types.BOOL):
            x = fn.gaussian_blur(x, sigma=fn.random.uniform(range=blur.sigma))
        flip = fn.random.coin_flip(probability=0.5)
        return fn.crop_mirror_normalize(x, mirror=flip, mean=mean, std=std, dtype=types.FLOAT, output_layout="HWC")

    @pipeline_def(batch_size=BATCH, num_threads=threads, device_id=None, enable_conditionals=True)
    def pipeline() -> Any:
        files, _ = fn.readers.file(files=[str(path) for path in paths], random_shuffle=True, name="files")
        image = fn.decoders.image(files, device="cpu", output_type=types.RGB, adjust_orientation=False)
        return tuple(view_of(image, view) for view in VIEWS for _ in range(view.copies))

    built = pipeline()
    built.build()
    while True:
        views = [output.as_array() for output in built.run()]
        yield len(views[0])


# ------------------------------------------------------------------------------------------------------------- ours


def fastssl(source: Source, threads: int, renderer: str, streams: tuple[Stream, ...]) -> Batches:
    bound = bind(Plan(streams, streams[0].name, seed=0), DataSets({"train": source}))
    with Loader(bound, renderer=renderer, threads=threads) as loader, closing(loader.batches(0, 1 << 40)) as batches:
        for batch in batches:
            yield BATCH
            batch.release()


def beton_of(folder: Path, path: Path) -> BetonSource:
    """The folder's files in one `.beton`."""
    files = FolderSource(folder)
    with BetonWriter(path, len(files), files.class_names) as writer:
        for i, label in enumerate(files.labels.tolist()):
            writer.add(files.jpeg(i), label, files.name_of(i))
    return BetonSource(path)


def raw_beton_of(folder: Path, out: Path) -> BetonSource:
    """The folder's images in one `.beton`, stored decoded."""
    convert(prepare(folder, Options(raw=True)), out)
    return BetonSource(out / "train.beton")


def shards_of(folder: Path, out: Path) -> Source:
    """The folder's files in WebDataset shards, `jpg` beside `cls`."""
    files, members = FolderSource(folder), 200
    out.mkdir()
    for first in range(0, len(files), members):
        with tarfile.open(out / f"train-{first // members:06}.tar", "w") as tar:
            for i in range(first, min(first + members, len(files))):
                for field, data in (("jpg", files.jpeg(i)), ("cls", b"%d" % files.labels[i])):
                    member = tarfile.TarInfo(f"{i:06}.{field}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    source = open_path(str(out)).train
    assert source is not None
    return source


class _Decoded:
    """What FFCV's writer indexes."""

    def __init__(self, files: FolderSource):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return np.array(Image.open(io.BytesIO(self.files.jpeg(i))).convert("RGB")), int(self.files.labels[i])


def ffcvs_beton_of(folder: Path, path: Path, share_of_jpeg: float) -> BetonSource:
    """The folder's images as FFCV's own script for ImageNet writes them, `500 SHARE 90`."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    np.random.seed(0)  # which images are raw; the one worker is forked from here
    image = RGBImageField(
        write_mode="proportion", max_resolution=500, compress_probability=share_of_jpeg, jpeg_quality=90
    )
    writer = DatasetWriter(str(path), {"image": image, "label": IntField()}, num_workers=1)
    writer.from_indexed_dataset(_Decoded(FolderSource(folder)))
    return BetonSource(path)


def together() -> tuple[Stream, ...]:
    """One stream: an image's eight views come from one decode."""
    return (Stream("unlabelled", "train", VIEWS, Shuffled(), BATCH),)


def apart() -> tuple[Stream, ...]:
    """A stream a view."""
    return tuple(
        Stream(f"{view.name}{copy}", "train", (replace(view, copies=1),), Shuffled(), BATCH)
        for view in VIEWS
        for copy in range(view.copies)
    )


def rendered(source: BetonSource, threads: int, cut: bool) -> Batches:
    """The ffcv renderer alone: decode, and the crops or (not `cut`) a single pixel of each image."""
    plan = bind(Plan(together(), "unlabelled", seed=0), DataSets({"train": source})).plan
    pixel = View("pixel", 1, Rrc((0.1, 1.0)))
    corner = np.tile(np.array([0.0, 0.0, 1.0, 1.0]), (BATCH, 1))
    views = VIEWS if cut else (pixel,)
    out = {v.name: np.empty((v.copies * BATCH, v.size, v.size, 3), np.uint8) for v in views}
    with ThreadPoolExecutor(threads) as pool:
        renderer = FfcvRenderer(source, pool)
        for step in itertools.count():
            rows = plan.rows("unlabelled", step)
            renderer.render(rows if cut else replace(rows, views=(ViewRows(pixel, corner, ()),)), out)
            yield BATCH


# -------------------------------------------------------------------------------------------------------- measuring


def here(start: Callable[..., Batches], *given: Any, **named: Any) -> Contender:
    """A contender in this process."""
    return partial(window, partial(start, *given, **named))


def measure(contenders: dict[str, Contender], rounds: int, seconds: float) -> dict[str, np.ndarray]:
    """Rates [rounds, 2], wall and CPU, of each. Every round starts with another one; an uncounted one compiles."""
    for contender in contenders.values():
        contender(0.0)
    names = list(contenders)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            rates[name].append(contenders[name](seconds))
            gc.collect()
    return {name: np.array(values) for name, values in rates.items()}


def same_crops(jpegs: BetonSource, raw: BetonSource) -> dict[str, bool]:
    """Whether the crops are bitwise those of fastssl_ffcv, in as many steps as it takes until every image has come."""
    plan = bind(Plan(together(), "unlabelled", seed=0), DataSets({"train": jpegs})).plan
    unseen, same = set(range(len(jpegs))), {"fastssl_turbo": True, "fastssl_raw": True}

    def crops(renderer: FfcvRenderer | TurboRenderer, rows: Rows) -> list[np.ndarray]:
        out = {v.name: np.empty((v.copies * BATCH, v.size, v.size, 3), np.uint8) for v in VIEWS}
        renderer.render(rows, out)
        return list(out.values())

    with ThreadPoolExecutor(1) as pool:
        reference = FfcvRenderer(jpegs, pool)
        ours = {"fastssl_turbo": TurboRenderer(jpegs, pool), "fastssl_raw": TurboRenderer(raw, pool)}
        for step in itertools.count():
            rows = plan.rows("unlabelled", step)
            expected = crops(reference, rows)
            for name, renderer in ours.items():
                same[name] &= all(map(np.array_equal, crops(renderer, rows), expected))
            unseen -= set(rows.ids.tolist())
            if not unseen:
                return same


def summary(rates: dict[str, np.ndarray], same: dict[str, bool], settings: dict[str, Any]) -> dict[str, Any]:
    wall = {name: statistics.median(values[:, 0]) for name, values in rates.items()}
    cpu = {name: statistics.median(values[:, 1]) for name, values in rates.items()}
    named = [name for name in NAMED if name in rates]
    ratios = {}
    for (ours, peer), (must, moonshot) in TARGETS.items():
        if peer not in rates:
            continue
        per_round = rates[ours] / rates[peer]
        ratios[f"{ours} / {peer}"] = {
            "wall": statistics.median(per_round[:, 0]),
            "wall_least": per_round[:, 0].min(),
            "cpu": statistics.median(per_round[:, 1]),
            "must": must,
            "moonshot": moonshot,
        }
    return {
        "unlabelled_images_per_s": {name: wall[name] for name in named},
        "unlabelled_images_per_cpu_s": {name: cpu[name] for name in named},
        "others": {name: {"per_s": wall[name], "per_cpu_s": cpu[name]} for name in rates if name not in named},
        "left_out": [name for name in NAMED if name not in rates],
        "ratios": ratios,
        "same_crops_as_fastssl_ffcv": same,
        "decode_and_crops_per_cpu_s": {
            "measured": cpu["decode_and_crops"],
            "must": CROPS_PER_CPU_S[0],
            "moonshot": CROPS_PER_CPU_S[1],
        },
        "windows": {name: values.round(2).tolist() for name, values in rates.items()},
        "settings": settings,
    }


def show(result: dict[str, Any]) -> None:
    rows = [(n, v, result["unlabelled_images_per_cpu_s"][n]) for n, v in result["unlabelled_images_per_s"].items()]
    rows += [(name, v["per_s"], v["per_cpu_s"]) for name, v in result["others"].items()]
    print(f"{'':20}{'images/s':>10}{'images/CPU-s':>14}{'CPU ms/image':>14}")
    for name, per_s, per_cpu_s in sorted(rows, key=lambda row: row[1]):
        print(f"{name:20}{per_s:10.1f}{per_cpu_s:14.1f}{1000 / per_cpu_s:14.2f}")
    for name, r in result["ratios"].items():
        moonshot = f", moonshot {r['moonshot']}" if r["moonshot"] else ""
        least = f"least window {r['wall_least']:.2f}"
        print(f"{name}: {r['wall']:.2f} x ({least}; CPU {r['cpu']:.2f}); must {r['must']}{moonshot}")
    if result["left_out"]:
        print(f"left out, with their ratios, for want of --peers or --against: {', '.join(result['left_out'])}")
    for name, same in result["same_crops_as_fastssl_ffcv"].items():
        print(f"{name}: crops {'bitwise' if same else 'NOT bitwise'} those of fastssl_ffcv; must be")
    crops = result["decode_and_crops_per_cpu_s"]
    print(
        f"decode and eight uint8 crops: {crops['measured']:.0f} images/s/core; must {crops['must']}, "
        f"moonshot {crops['moonshot']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of class folders of JPEGs")
    parser.add_argument("--quick", action="store_true", help="short windows: four minutes in all, without the peers")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--peers", type=Path, metavar="PYTHON", help="of an environment with torchvision and SPDL")
    parser.add_argument("--against", type=Path, metavar="PATH", help="a checkout of another commit, with PATH/.venv")
    arguments = parser.parse_args()
    if arguments.data is None and "FASTSSL_TEST_DATA" not in os.environ:
        parser.error("give --data DIR, or set FASTSSL_TEST_DATA")
    folder = arguments.data or Path(os.environ["FASTSSL_TEST_DATA"]) / "imagenet-sample"
    for python in (arguments.peers, arguments.against and arguments.against / ".venv/bin/python"):
        if python and not python.is_file():
            parser.error(f"there is no {python}")
    rounds, seconds = (5, 1.0) if arguments.quick else (7, 6.0)

    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(1)
    paths = sorted(folder.glob("*/*.JPEG"))
    stack = ExitStack()
    made = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    source, raw = beton_of(folder, made / "train.beton"), raw_beton_of(folder, made / "raw")
    shards = shards_of(folder, made / "shards")
    half_raw, all_jpeg = (ffcvs_beton_of(folder, made / f"{share}.beton", share) for share in (0.5, 1.0))
    contenders: dict[str, Contender] = {
        "pil_dataloader": here(pil_dataloader, paths, threads),
        "eight_decodes": here(fastssl, source, threads, "ffcv", apart()),
        "dali_own_ops": here(dali_own_ops, paths, threads),
        "fastssl_turbo": here(fastssl, source, threads, "turbo", together()),
        "fastssl_raw": here(fastssl, raw, threads, "turbo", together()),
        "fastssl_shards": here(fastssl, shards, threads, "turbo", together()),
        "fastssl_half_raw": here(fastssl, half_raw, threads, "turbo", together()),
        "fastssl_all_jpeg": here(fastssl, all_jpeg, threads, "turbo", together()),
        "fastssl_ffcv": here(fastssl, source, threads, "ffcv", together()),
        "fastssl_dali": here(fastssl, source, threads, "dali", together()),
        "fastssl_pil": here(fastssl, source, threads, "pil", together()),
        "decode_only": here(rendered, source, threads, cut=False),
        "decode_and_crops": here(rendered, source, threads, cut=True),
    }
    raw_file = made / "raw/train.beton"
    served = all_served(folder, raw_file, threads, laws(VIEWS), arguments.peers, arguments.against)
    contenders |= {name: stack.enter_context(peer) for name, peer in served.items()}
    start = time.perf_counter()
    with stack:
        same = same_crops(source, raw)
        rates = measure(contenders, rounds, seconds)
    libraries = ("torch", "numpy", "numba", "pillow", "ffcv", "nvidia-dali-cuda130")
    settings = {
        "images": len(paths),
        "batch": BATCH,
        "cpus": threads,
        "cpu": cpu_model(),
        "windows": rounds,
        "window_s": seconds,
        "took_s": round(time.perf_counter() - start, 1),
        "commit": commit(),
        "command": " ".join(["python -m benchmarks.loader", *sys.argv[1:]]),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in libraries},
        "versions_of_peers": {name: peer.versions for name, peer in served.items()},
    }
    result = summary(rates, same, settings)
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
