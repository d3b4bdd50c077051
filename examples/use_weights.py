"""Weights of a run in plain torch and in timm: no fastssl is imported here. First `fastssl export RUN`, then

    python examples/use_weights.py RUN/export photo.jpg

`config.json` says how torchvision's ResNet becomes the trunk, or which model of timm's it is, and how an image becomes
its input.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn


def load(folder: Path) -> nn.Module:
    """The trunk in eval mode: float32 [N, C, S, S] -> features [N, D]. For trunks that are neither torchvision's nor
    timm's, the folder's README says what they are."""
    trunk = json.loads((folder / "config.json").read_text())["architecture"]
    if trunk["torchvision"]:
        model = torchvision_s(trunk["torchvision"])
    elif trunk["timm"]:
        model = timm_s(trunk["timm"], trunk["timm_settings"])
    else:
        raise SystemExit(f"{folder}: its trunk, {trunk['name']}, can be made from neither torchvision's nor timm's")
    model.load_state_dict(load_file(folder / "backbone.safetensors"))
    return model.eval()


def torchvision_s(lines: list[str]) -> nn.Module:
    """Its ResNet, changed by a few lines that you can read in the folder's README."""
    import torchvision

    names = {"torch": torch, "torchvision": torchvision}
    exec("\n".join(lines), names)
    model = names["model"]
    assert isinstance(model, nn.Module)
    return model


def timm_s(name: str, settings: dict[str, Any]) -> nn.Module:
    """Its model without a classifier; a transformer takes images of any size that its patches fill."""
    import timm

    model: nn.Module = timm.create_model(name, **settings)
    return model


def prepared(folder: Path, image: Image.Image) -> Tensor:
    """The image as the network was shown images in evaluation: float32 [1, C, S, S]."""
    given = json.loads((folder / "config.json").read_text())["input"]
    image, size = image.convert("RGB" if given["channels"] == 3 else "L"), given["size"]
    if given["resize"]:  # the shorter side to `resize`, then the central square, as torchvision rounds both
        (width, height), least = image.size, min(image.size)
        wide, high = given["resize"] * width // least, given["resize"] * height // least
        left, top = round((wide - size) / 2), round((high - size) / 2)
        box = (left * width / wide, top * height / high, (left + size) * width / wide, (top + size) * height / high)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    else:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, np.float32).reshape(size, size, -1) / 255
    scaled = (pixels - np.array(given["mean"], np.float32)) / np.array(given["std"], np.float32)
    return torch.from_numpy(scaled.transpose(2, 0, 1)[None].copy())


if __name__ == "__main__":
    where, photo = Path(sys.argv[1]), Image.open(sys.argv[2])
    with torch.no_grad():
        print(load(where)(prepared(where, photo)))
