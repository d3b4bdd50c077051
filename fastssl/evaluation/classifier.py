"""Accuracy of a method's own classifier: the largest of its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastssl.errors import ConfigError
from fastssl.evaluation.accuracies import top5, top5_correct, wilson
from fastssl.evaluation.subject import Subject
from loaders.store.data import VALIDATION


def evaluate(subject: Subject) -> dict[str, Any]:
    """`classifier_top1` and `_top5` on the validation images. Raises ConfigError where the method has no classifier."""
    return scores(subject, "classifier", "logits")


def scores(subject: Subject, protocol: str, tap: str) -> dict[str, Any]:
    """`PROTOCOL_top1` and `_top5` of the largest values at `tap`, on the validation images. Raises ConfigError where
    the method has no such tap, or knows another number of classes."""
    if tap not in subject.method.taps:
        raise ConfigError(f"{type(subject.method).__name__} has no {tap} to classify by: choose another protocol")
    if (known := subject.method.facts.num_classes) != subject.num_classes:
        raise ConfigError(
            f"the run's classifier knows {known} classes, this data has {subject.num_classes}: --protocol linear "
            "trains one on the frozen features"
        )
    subject.check()
    numbers_K = classes_of_run(subject)
    features = subject.features(VALIDATION, tap)
    number_N = numbers_K[features.labels]
    correct = int((features.values.argmax(dim=1) == number_N).sum())
    total = len(number_N)
    return {
        f"{protocol}_top1": correct / total,
        **top5(protocol, top5_correct(features.values, number_N), total, known),
        protocol: {"images": total, "top1_ci95": wilson(correct, total)},
    }


def classes_of_run(subject: Subject) -> Tensor:
    """int64 [K]: of each class of the data, which of the run's classifier it is, by name; as they stand where the run
    did not say its names. Raises ConfigError where the classifier does not know one of them."""
    known, names = subject.method.facts.class_names, subject.class_names
    if strange := sorted(set(names) - set(known)) if known else []:
        raise ConfigError(
            f"the run's classifier knows no class {strange[0]!r}, which this data has: --protocol linear trains one on "
            "the frozen features"
        )
    return torch.tensor([known.index(name) for name in names] if known else range(len(names)))
