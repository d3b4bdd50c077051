"""A training loop of one's own over `loaders`: a classifier in plain torch, from a folder with a folder for each class.

    python examples/own_loop.py /data/sorted --epochs 5

The loader decodes, crops, flips and colours; order and every draw follow from the seed and the step alone, so that
`loader.batches(step, ...)` continues anywhere.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn
from torch.nn import functional as F

from loaders.loader import Loader, bind
from loaders.plan.ops import ColourJitter, Flip
from loaders.plan.plan import Plan
from loaders.plan.views import IMAGENET, Rrc, Shuffled, Stream, View
from loaders.store.data import open_data


def network(num_classes: int) -> nn.Module:
    """Four strided convolutions and a classifier."""
    layers: list[nn.Module] = []
    for channels, width in ((3, 32), (32, 64), (64, 128), (128, 256)):
        layers += [nn.Conv2d(channels, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, num_classes))


def train(folder: str, epochs: int, size: int = 64, batch: int = 32, seed: int = 0) -> list[float]:
    """Train on `folder`; the mean loss of each epoch."""
    view = View("crop", size, Rrc((0.2, 1.0)), (Flip(), ColourJitter(0.8, 0.2, 0.2, 0.2, 0.05)), IMAGENET)
    plan = Plan((Stream("images", "train", (view,), Shuffled(), batch),), epoch_of="images", seed=seed)
    data = open_data((folder,), validation=False)
    bound = bind(plan, data)
    torch.manual_seed(seed)
    net = network(data.get("train").num_classes)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3)
    an_epoch, losses = bound.plan.steps_per_epoch, []
    with Loader(bound) as loader:
        for number, batch_ in enumerate(loader.batches(0, epochs * an_epoch)):
            images = batch_.parts["images"]
            loss = F.cross_entropy(net(images.x["crop"]), images.labels)
            batch_.release()  # the loader writes the next batch there
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if (number + 1) % an_epoch == 0:
                print(f"epoch {(number + 1) // an_epoch}: loss {sum(losses[-an_epoch:]) / an_epoch:.3f}")
    return [sum(losses[i : i + an_epoch]) / an_epoch for i in range(0, len(losses), an_epoch)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--epochs", type=int, default=5)
    given = parser.parse_args()
    train(given.folder, given.epochs)
