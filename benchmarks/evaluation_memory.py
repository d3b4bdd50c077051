"""What evaluations keep on each rank: resident memory beyond that of a rank that does nothing, against another build's.

    python -m benchmarks.evaluation_memory --against PATH [--images 40000] [--features 2048] [--ranks 4] [--classes 100]

PATH is a checkout with an environment, PATH/.venv. A fifth of the images are validation images, the others labelled;
the network is a fixed random map, so that what is measured is what the protocols `linear` and `knn` keep. Of each rank
VmHWM at the end, less VmRSS once it has joined the others and opened the images; what is printed is of the largest.
The linear classifier learns for two epochs, or ten iterations of L-BFGS, whose memory is that of as many as one likes.
Scores of both builds, and of this one's on one rank, are printed beside each other.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

PROTOCOLS = "linear", "knn"


def kib(field: str) -> int:
    """Of /proc/self/status."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def first_of(*names: str) -> Any:
    """The first module that there is: builds differ in where things are."""
    for name in names[:-1]:
        try:
            return import_module(name)
        except ModuleNotFoundError:
            pass
    return import_module(names[-1])


def images_of(count: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, 8, 8, 1], which overlap from class to class, and labels."""
    centres = np.random.default_rng(0).uniform(60, 190, (classes, 64))
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes, count)
    images = np.empty((count, 64), np.uint8)
    for rows in np.array_split(np.arange(count), 40):
        images[rows] = (centres[labels[rows]] + draw.normal(0, 50, (len(rows), 64))).clip(0, 255)
    return images.reshape(-1, 8, 8, 1), labels.astype(np.int64)


def on_a_rank(images: int, features: int, classes: int, meeting: str) -> dict[str, Any]:
    """The scores and this rank's memory, by whichever build is imported."""
    views = first_of("loaders.plan.views", "loaders.views")
    data, source = import_module("loaders.store.data"), import_module("loaders.store.source")
    base, subject = import_module("fastssl.methods.base"), import_module("fastssl.evaluation.subject")
    dist, evaluation = import_module("fastssl.dist"), import_module("fastssl.evaluation")
    torch.set_num_threads(1)
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init("gloo", init_method=f"file://{meeting}")
    torch.manual_seed(0)
    weight = torch.randn(64, features) / 8

    class Mapped(base.Method):  # type: ignore[misc, name-defined]
        taps = ("backbone",)
        plan = optimizer = rates = loss = None

        def nets(self) -> Any:
            return base.Nets(torch.nn.Flatten())

        def embed(self, nets: Any, x: torch.Tensor, tap: str) -> torch.Tensor:
            return (nets.online(x) @ weight).relu()

    @dataclass(frozen=True)
    class Config(base.Config):  # type: ignore[misc, name-defined]
        def build(self, facts: Any, inputs: Any) -> Any:
            return Mapped(self, facts, inputs)

    names = tuple(map(str, range(classes)))
    sets = {}
    for seed, (key, count) in enumerate({"train": images - images // 5, "validation": images // 5}.items()):
        sets[key] = source.ArraySource(key, *images_of(count, classes, seed), names)
    config = Config("digits", views.View("eval", 8, views.Whole(), pixels=views.UNIT), labels="all")
    method = config.build(None, {})
    looked_at = subject.Subject(method, method.nets(), data.DataSets(sets), threads=1)
    briefly()
    idle = kib("VmRSS")
    scores = {}
    for protocol in PROTOCOLS:
        found = evaluation.load_protocol(protocol).evaluate(looked_at)
        scores |= {name: value for name, value in found.items() if "top" in name}
        scores |= {"solver": found["linear"]["solver"], **found["linear"]["chosen"]} if protocol == "linear" else {}
    return {"beyond_kib": kib("VmHWM") - idle, "idle_kib": idle, "scores": scores}


def briefly() -> None:
    """Let classifiers learn for a moment."""
    linear = import_module("fastssl.evaluation.linear")
    linear.EPOCHS, linear.MAX_ITERATIONS = 2, 10
    linear.linear_heads.__kwdefaults__["epochs"] = 2
    linear.logistic_regression.__kwdefaults__["max_iterations"] = 10


def measured(python: Path, checkout: Path, ranks: int, settings: list[str]) -> list[dict[str, Any]]:
    """What each rank says."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(python), str(Path(__file__).resolve()), "--rank", *settings, "--meeting", f"{folder}/meeting"]
        world = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen(
                command,
                cwd=checkout,
                env=os.environ | world | {"RANK": str(r), "LOCAL_RANK": str(r), "PYTHONPATH": str(checkout)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for r in range(ranks)
        ]
        said = [process.communicate()[0] for process in started]
    assert not any(process.returncode for process in started), "a rank has failed"
    return [json.loads(each.splitlines()[-1]) for each in said]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="PATH", help="a checkout with an environment")
    parser.add_argument("--images", type=int, default=40_000)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--meeting", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        print(json.dumps(on_a_rank(args.images, args.features, args.classes, args.meeting)), flush=True)
        return
    settings = [f"--{name}={getattr(args, name)}" for name in ("images", "features", "classes")]
    here = Path(__file__).resolve().parents[1]
    builds = {"one_rank": (Path(sys.executable), here, 1), "ranks": (Path(sys.executable), here, args.ranks)}
    if args.against is not None:
        other = args.against.resolve()
        builds["against"] = (other / ".venv/bin/python", other, args.ranks)
    result: dict[str, Any] = {}
    for name, build in builds.items():
        of_ranks = measured(*build, settings)
        assert all(each["scores"] == of_ranks[0]["scores"] for each in of_ranks), "ranks disagree"
        most = max(each["beyond_kib"] for each in of_ranks) / 1024
        result[name] = {"beyond_mib": round(most), "scores": of_ranks[0]["scores"]}
    if args.against is not None:
        result["ratio"] = result["ranks"]["beyond_mib"] / result["against"]["beyond_mib"]
    result["equal"] = result["ranks"]["scores"] == result["one_rank"]["scores"]
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
