"""What a run says of images that it may never have seen: their classes, and how sure it is of them.

By the run's own classifier where it has one, else by soft nearest neighbours among its labelled images: the numbers
that the protocols `classifier` and `soft-nn` count as right or wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from fastssl.evaluation.soft_nn import soft_nn
from fastssl.evaluation.subject import Subject
from loaders.errors import StoreError
from loaders.store.data import LABELLED, TRAIN
from loaders.store.folder import images_below
from loaders.store.openers import open_path
from loaders.store.source import Source, concatenate

CLASSIFIER = "logits"  # the tap of a method's own classifier


@dataclass(frozen=True, eq=False)
class Predictions:
    """Of N images among K classes.

    files          each image's path below the folder it was found in, or its index
    class_names    as the columns are numbered
    probabilities  float32 [N, K], rows that sum to one
    """

    files: tuple[str, ...]
    class_names: tuple[str, ...]
    probabilities: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    @property
    def classes(self) -> list[str]:
        """The most likely class of each image."""
        return [self.class_names[k] for k in self._ranked[:, 0]]

    @property
    def runners_up(self) -> list[str]:
        """The second most likely class of each image; empty where there is one class alone."""
        if len(self.class_names) < 2:
            return [""] * len(self)
        return [self.class_names[k] for k in self._ranked[:, 1]]

    @property
    def probability(self) -> np.ndarray:
        """float32 [N], of the most likely class."""
        return np.take_along_axis(self.probabilities, self._ranked[:, :1], 1)[:, 0]

    @property
    def margin(self) -> np.ndarray:
        """float32 [N], by how much the most likely class is ahead of the second: 0 is full doubt."""
        best = np.take_along_axis(self.probabilities, self._ranked[:, :2], 1)
        return best[:, 0] - best[:, 1] if best.shape[1] == 2 else best[:, 0]

    @cached_property
    def _ranked(self) -> np.ndarray:
        """int64 [N, K]: columns by falling probability; of equal ones the first, as an argmax has it."""
        return np.argsort(-self.probabilities, axis=1, kind="stable")


def predict(subject: Subject, source: Source) -> Predictions:
    """What `subject` says of every image of `source`. Raises ConfigError where the network takes images of other
    channels, or where it has no classifier and its data no labelled image to look for neighbours among."""
    files = tuple(source.path_of(i) for i in range(len(source)))
    if CLASSIFIER in subject.method.taps:
        logits_NK = subject.features_of(source, CLASSIFIER).values
        return Predictions(files, _classes_of(subject), torch.softmax(logits_NK, dim=1).numpy())
    tap = subject.method.taps[-1]
    queries = subject.features_of(source, tap)
    among = subject.labelled(tap)
    p_NK = soft_nn(queries.values, among.values, among.labels, subject.num_classes, device=subject.device)
    return Predictions(files, subject.class_names, p_NK.cpu().numpy())


def _classes_of(subject: Subject) -> tuple[str, ...]:
    """What the classifier's columns are called: as the run said, else as its data does, else their numbers."""
    facts, there = subject.method.facts, {LABELLED, TRAIN} & subject.data.sources.keys()
    names = facts.class_names or (subject.class_names if there else ())
    return names if len(names) == facts.num_classes else tuple(map(str, range(facts.num_classes)))


def images_at(path: str) -> Source:
    """Every image at `path`, as one set whose labels nobody looks at: image files in a folder and however deep below,
    or else whatever `--data` takes, all its splits. Raises StoreError where there is none."""
    if Path(path).is_dir() and (below := images_below(Path(path))) is not None:
        return below
    splits = open_path(path)
    found = [source for source in (splits.train, splits.validation) if source is not None]
    if not sum(map(len, found)):
        raise StoreError(f"{path}: no images")
    return found[0] if len(found) == 1 else concatenate(found)
