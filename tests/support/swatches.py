"""Images of one colour, whose red says which class they are of, and a method that sees nothing else."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from fastssl.evaluation.subject import Subject
from fastssl.methods.base import Config, Facts, Method, Nets
from loaders.plan.views import UNIT, Centre, View
from loaders.store.data import open_data

STEP = 20  # red of class k is 20 k; JPEG moves it by 2 at most


def encoded(k: float, green: int = 0, blue: int = 0, form: str = "JPEG", size: int = 8, border: int = 0) -> bytes:
    """A swatch of class `k`, inside a red border of some pixels."""
    pixels = np.full((size, size, 3), (round(STEP * k), green, blue), np.uint8)
    if border:
        inner, pixels = pixels, np.full((size + 2 * border, size + 2 * border, 3), (255, 0, 0), np.uint8)
        pixels[border:-border, border:-border] = inner
    file = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} if form == "JPEG" else {}
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def swatch(path: Path, k: float, **kwargs) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(k, **kwargs))
    return path


@dataclass(frozen=True)
class SwatchConfig(Config):
    def build(self, facts, inputs):
        return SwatchMethod(self, facts, inputs)


class SwatchMethod(Method):
    """Takes an image's mean red for its class: logits are least wrong, features a smooth code of it."""

    taps = ("backbone", "logits")
    plan = optimizer = rates = loss = None

    def nets(self):
        return Nets(nn.Flatten())

    def embed(self, nets, x, tap):
        red_N1 = 255 * x[:, :1].mean(dim=(2, 3)) / STEP
        distance_NK = (red_N1 - torch.arange(13 if tap == "backbone" else self.facts.num_classes)).square()
        return (-distance_NK).exp() if tap == "backbone" else -distance_NK


class FeaturesOnly(SwatchMethod):
    """The same without a classifier of its own."""

    taps = ("backbone",)


def subject_of(labelled: Path, sets: dict[str, Path], kind: type[SwatchMethod] = SwatchMethod) -> Subject:
    """`kind` beside a folder of labelled images; images are seen as ImageNet's are, scaled up and then cut."""
    data = open_data((f"labelled={labelled}", "validation=none"))
    config = SwatchConfig("imagenet", View("eval", 8, Centre(10), pixels=UNIT), precision="fp32")
    method = kind(config, Facts(data.get("labelled").num_classes, 3, 0), {})
    return Subject(method, method.nets(), data, threads=1, sets=sets)
