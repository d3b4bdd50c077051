"""Labels that a run made of its own images, for another to learn: S4L's pseudo-labels, by whom and of what they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastssl.errors import ConfigError
from fastssl.methods.base import Artefact, Facts


class PseudoLabels(nn.Module):
    """A label for every image of the training set, -1 where it is not believed; none before they are loaded."""

    label_I: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.partial = False  # whether images are without a label
        self.register_buffer("label_I", torch.zeros(0, dtype=torch.int64))

    def load(self, label_I: Tensor) -> None:
        """Take these."""
        self.label_I, self.partial = label_I, bool((label_I < 0).any())

    def forward(self, id_B: Tensor) -> Tensor:
        """The labels of images by their index, int64 [B]."""
        return self.label_I[id_B]


def pseudo_labels(facts: Facts, inputs: Mapping[str, Artefact]) -> Tensor:
    """The input "labels": of every training image by its index, int64 [N]. Raises ConfigError where it was not made of
    our images, of all of them, labels none, or not by the networks that the inputs "init" or "teacher" name."""
    labels = inputs["labels"]
    made = labels.made_of()
    if not made:
        raise ConfigError(f"{labels.path}: nothing beside it says of which images it was made, and by which networks")
    if facts.train_fingerprint not in made["data"].values():
        raise ConfigError(f"{labels.path} was made of other images than these: make it anew")
    by = inputs.get("init") or inputs.get("teacher")
    if by is not None and by.sha256 not in made["inputs"].values():
        raise ConfigError(f"{labels.path} was made by other networks than those in {by.path}: make it anew")
    found = labels.load()
    if not torch.equal(found["ids"], torch.arange(made["num_images"])):
        raise ConfigError(
            f"{labels.path} does not hold the labels of images 0 to {made['num_images'] - 1} in this order, which are "
            "all training images: make it anew"
        )
    labels_N: Tensor = found["pseudo_label"]
    if not (labels_N >= 0).any():
        raise ConfigError(f"{labels.path} labels no image: lower label.least_confidence, and make it anew")
    return labels_N
