"""The data sets that recipes are written for: what a dry run assumes where no data is at hand, and what to ask for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KnownSet:
    """Facts of a public training set; `how` completes "give --data ..."."""

    num_images: int
    num_classes: int
    channels: int
    how: str
    embedded: bool = False


KNOWN_SETS = {
    "digits": KnownSet(1442, 10, 1, "digits (embedded)", embedded=True),
    "cifar10": KnownSet(50_000, 10, 3, "PATH of the official binary CIFAR-10 (data_batch_1.bin ... test_batch.bin)"),
    "imagenet": KnownSet(1_281_167, 1_000, 3, "PATH of ImageNet: a folder with train/ and val/, or .beton files"),
    "mine": KnownSet(10_000, 10, 3, "PATH of your images: a folder a class, or labelled=PATH and unlabelled=PATH"),
}
