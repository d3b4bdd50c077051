"""What `benchmarks.loader` measures fastssl against in processes of their own: other people's loaders, older builds.

    PYTHON benchmarks/loader_peers.py NAME PATH THREADS VIEWS

PYTHON is the contender's, in which nothing of this repository need be installed. PATH is the folder of class folders of
JPEGs, or FFCV's file; VIEWS is what `laws` writes. The process first says in a line of JSON which versions it runs;
then it answers every line that it gets, the seconds of a window, with a line of JSON, the images per second of wall
time and of CPU time over such a window. In between it waits, with no worker and no batch under way.

torchvision_v2  decode_jpeg once an image, then transforms v2, in a DataLoader with a worker a CPU
spdl            SPDL's pipeline of threads: its own decoder once an image, then the same transforms in the same threads
                (crops by FFmpeg's filters, through its FilterGraph, take 1.4 times as long). It needs FFmpeg's own
                libraries, libavdevice59 among Debian 12's packages
ffcv_loader_raw FFCV's Loader from a file of decoded images, a pipeline a view. It does less than the others: no hue,
                grey or blur, for which FFCV has no operation
build           the checkout that the process runs in: its renderer `ffcv`, from a `.beton` that it writes itself
"""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

BATCH, WORKER_BATCH = 32, 16
WARM_UP = 6  # batches: more than any of them makes ahead, and every buffer has been touched
LIBRARIES = ("torch", "torchvision", "numpy", "numba", "spdl-core", "spdl-io", "ffcv")

Batches = Iterator[int]  # endless; each item is the number of images just received
View = dict[str, Any]  # the fields of `loaders.plan.views.View`, of dicts, lists and numbers


def laws(views: Any) -> str:
    """Views of `loaders`, as JSON: the one place that says how large they are and what is drawn for them is theirs."""
    return json.dumps([asdict(view) for view in views], default=str)


# -------------------------------------------------------------------------------------------------------- measuring


def cpu_s() -> float:
    """CPU seconds of this process and of those it started."""
    total, tick = time.process_time(), os.sysconf("SC_CLK_TCK")
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        total += (int(fields[11]) + int(fields[12])) / tick  # utime, stime
    return total


def window(start: Callable[[], Batches], seconds: float) -> tuple[float, float]:
    """Images per wall second and per CPU second over about `seconds` of a contender in full flight."""
    with closing(start()) as batches:  # type: ignore[type-var]
        for _ in range(WARM_UP):
            next(batches)
        wall, cpu, images = time.perf_counter(), cpu_s(), 0
        while time.perf_counter() - wall < seconds:
            images += next(batches)
        wall, cpu = time.perf_counter() - wall, cpu_s() - cpu
    return images / wall, images / cpu


class Served:
    """A contender in a process of its own; called with the seconds of a window, it gives the window's rates."""

    def __init__(self, python: Path, name: str, path: Path, threads: int, views: str, cwd: Path | None = None):
        """Raises RuntimeError where it cannot begin; its reason is on standard error."""
        self.name = name
        self.process = subprocess.Popen(
            [str(python.absolute()), str(Path(__file__).resolve()), name, str(path.resolve()), str(threads), views],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},  # ours
        )
        self.versions = self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with exit status {self.process.wait()}; its last words are above")
        return json.loads(line)

    def __call__(self, seconds: float) -> tuple[float, float]:
        assert self.process.stdin
        print(seconds, file=self.process.stdin, flush=True)
        per_s, per_cpu_s = self._answer()
        return per_s, per_cpu_s

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *failure: Any) -> None:
        self.process.__exit__(*failure)  # closes its input, at which it ends


def all_served(
    folder: Path, raw: Path, threads: int, views: str, python: Path | None, checkout: Path | None
) -> dict[str, Served]:
    """FFCV's Loader over the file `raw`, in this environment; with `python`, torchvision's and SPDL's over the JPEGs of
    `folder`; with `checkout`, its build under the name of its commit."""
    found = {"ffcv_loader_raw": Served(Path(sys.executable), "ffcv_loader_raw", raw, threads, views)}
    if python:
        for name in ("torchvision_v2", "spdl"):
            found[name] = Served(python, name, folder, threads, views)
    if checkout:
        describe = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
        commit = subprocess.run(describe, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
        its_python = checkout / ".venv/bin/python"
        found[f"build_{commit}_ffcv"] = Served(its_python, "build", folder, threads, views, cwd=checkout)
    return found


# ----------------------------------------------------------------------------------------------------- torchvision


def in_workers(dataset: Any, num_images: int, threads: int) -> Batches:
    """torch's DataLoader, a worker a CPU, over a map-style dataset whose items are lists of views."""
    import numpy as np
    from torch.utils.data import DataLoader

    order = (i for k in itertools.count() for i in np.random.default_rng(k).permutation(num_images).tolist())
    batches = iter(DataLoader(dataset, WORKER_BATCH, sampler=order, num_workers=threads))
    while True:  # a batch of every worker: they work in step, so a window ends with no worker's work uncounted
        yield sum(len(next(batches)[0]) for _ in range(threads))


def transforms_v2(views: list[View]) -> list[Callable[[Any], Any]]:
    """One for each copy of each view: uint8 [3, H, W] -> float32 [3, S, S].

    Crops are fastest of uint8, colours of float32. The blur convolves with a square kernel, at a cost that grows with
    its area: nine pixels wide, SimCLR's for a view of 96.
    """
    import torch
    from torchvision.transforms import v2

    def transform(view: View) -> Callable[[Any], Any]:
        flip, jitter, grey, blur = view["ops"]
        strengths = [jitter[name] for name in ("brightness", "contrast", "saturation", "hue")]
        return v2.Compose(
            [
                v2.RandomResizedCrop(view["size"], view["crop"]["area"], view["crop"]["ratio"], antialias=True),
                v2.RandomHorizontalFlip(flip["p"]),
                v2.ToDtype(torch.float32, scale=True),
                v2.RandomApply([v2.ColorJitter(*strengths)], jitter["p"]),
                v2.RandomGrayscale(grey["p"]),
                v2.RandomApply([v2.GaussianBlur(9, blur["sigma"])], blur["p"]),
                v2.Normalize(view["pixels"]["mean"], view["pixels"]["std"]),
            ]
        )

    return [transform(view) for view in views for _ in range(view["copies"])]


def jpegs(folder: str) -> list[str]:
    return sorted(map(str, Path(folder).glob("*/*.JPEG")))


class TorchvisionImages:
    """An item is the views of a file, from one decode."""

    def __init__(self, paths: list[str], views: list[View]):
        self.paths, self.transforms = paths, transforms_v2(views)

    def __getitem__(self, i: int) -> list[Any]:
        import torch
        from torchvision.io import ImageReadMode, decode_jpeg, read_file

        image = decode_jpeg(read_file(self.paths[i]), ImageReadMode.RGB)
        with torch.inference_mode():  # a tenth less for its many small operations
            return [transform(image) for transform in self.transforms]


def torchvision_v2(folder: str, threads: int, views: list[View]) -> Callable[[], Batches]:
    paths = jpegs(folder)
    return lambda: in_workers(TorchvisionImages(paths, views), len(paths), threads)


# ------------------------------------------------------------------------------------------------------------- SPDL


def spdl(folder: str, threads: int, views: list[View]) -> Callable[[], Batches]:
    import numpy as np
    import spdl.io
    import torch
    from spdl.pipeline import PipelineBuilder

    paths, transforms = jpegs(folder), transforms_v2(views)

    def files() -> Iterator[str]:
        for k in itertools.count():
            yield from (paths[i] for i in np.random.default_rng(k).permutation(len(paths)).tolist())

    def views_of(path: str) -> list[Any]:
        image = spdl.io.to_torch(spdl.io.load_image(path)).permute(2, 0, 1)
        with torch.inference_mode():
            return [transform(image) for transform in transforms]

    def stacked(items: list[list[Any]]) -> list[Any]:
        return [torch.stack(copies) for copies in zip(*items, strict=True)]

    def start() -> Batches:
        pipeline = (
            PipelineBuilder()
            .add_source(files())
            .pipe(views_of, concurrency=threads)
            .aggregate(BATCH)
            .pipe(stacked)
            .add_sink(2)
            .build(num_threads=threads)
        )
        with pipeline.auto_stop():
            for batch in pipeline:
                yield len(batch[0])

    return start


# ------------------------------------------------------------------------------------------------------------- FFCV


def ffcv_loader_raw(beton: str, threads: int, views: list[View]) -> Callable[[], Batches]:
    """Crop, flip, brightness, contrast and saturation (each drawn by itself, in this order), normalise, float32."""
    import numpy as np
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.pipeline import Compiler, PipelineSpec
    from ffcv.reader import Reader
    from ffcv.transforms import (
        NormalizeImage,
        RandomBrightness,
        RandomContrast,
        RandomHorizontalFlip,
        RandomSaturation,
        ToTensor,
        ToTorchImage,
    )

    compile_anew, compiled = Compiler.compile, {}

    def compile_once(code: Callable[..., Any], signature: Any = None) -> Any:
        """An operation of equal parameters is not compiled for every pipeline, which takes minutes."""
        key = code.__code__, tuple(repr(cell.cell_contents) for cell in code.__closure__ or ())
        if key not in compiled:
            compiled[key] = compile_anew(code, signature)
        return compiled[key]

    Compiler.compile = compile_once

    def pipeline(view: View) -> Any:
        flip, jitter, _, _ = view["ops"]
        mean, std = (255 * np.array(view["pixels"][name]) for name in ("mean", "std"))
        crop, size = view["crop"], view["size"]
        decoder = RandomResizedCropRGBImageDecoder((size, size), tuple(crop["area"]), tuple(crop["ratio"]))
        operations = [
            RandomHorizontalFlip(flip["p"]),
            RandomBrightness(jitter["brightness"], jitter["p"]),
            RandomContrast(jitter["contrast"], jitter["p"]),
            RandomSaturation(jitter["saturation"], jitter["p"]),
            NormalizeImage(mean, std, np.float32),
            ToTensor(),
            ToTorchImage(),
        ]
        return PipelineSpec("image", decoder, operations)

    copies = [view for view in views for _ in range(view["copies"])]
    reader = Reader(beton)
    loader = Loader(
        beton,
        BATCH,
        num_workers=threads,
        order=OrderOption.RANDOM,
        seed=0,
        indices=np.tile(np.arange(reader.num_samples, dtype=np.uint64), 1 << 10),  # an epoch longer than any window
        pipelines=dict.fromkeys(reader.field_names) | {f"view{i}": pipeline(view) for i, view in enumerate(copies)},
    )

    def start() -> Batches:
        epoch = iter(loader)
        try:
            for batch in epoch:
                yield len(batch[0])
        finally:  # its thread would go on
            epoch.terminate_event.set()
            epoch.join()

    return start


# ---------------------------------------------------------------------------------------------------- another build


def build(folder: str, threads: int, views: list[View]) -> Callable[[], Batches]:
    """Its views are its own."""
    from benchmarks import loader

    here = Path(loader.__file__).resolve()
    assert here.is_relative_to(Path.cwd()), f"{here} is not of the checkout in {Path.cwd()}"
    made = tempfile.TemporaryDirectory()
    source = loader.beton_of(Path(folder), Path(made.name) / "train.beton")

    def start() -> Batches:
        assert made  # until the end
        return loader.fastssl(source, threads, "ffcv", loader.together())

    return start


# ------------------------------------------------------------------------------------------------------ the process


PEERS = {peer.__name__: peer for peer in (torchvision_v2, spdl, ffcv_loader_raw, build)}


def installed() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    name, path, threads, views = sys.argv[1:]
    sys.path[0] = os.getcwd()  # was this folder
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print, too
    import torch

    torch.set_num_threads(1)  # as many threads as CPUs are at work already
    start = PEERS[name](path, int(threads), json.loads(views))
    print(json.dumps(installed()), file=answers, flush=True)
    for seconds in sys.stdin:
        print(json.dumps(window(start, float(seconds))), file=answers, flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
