"""Accuracy of a method's own classifier: the largest of its logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastssl.errors import ConfigError
from fastssl.evaluation.accuracies import top5, top5_correct, wilson
from fastssl.evaluation.shards import totals
from fastssl.evaluation.subject import Roles, Subject
from loaders.store.data import VALIDATION


def check(roles: Roles) -> None:
    """Raises ConfigError where the method has no classifier, or does not know a class of the data."""
    check_tap(roles, "logits")


def evaluate(subject: Subject) -> dict[str, Any]:
    """`classifier_top1` and `_top5` on the validation images. Raises ConfigError as `check` does."""
    return scores(subject, "classifier", "logits")


def check_tap(roles: Roles, tap: str) -> None:
    """Raises ConfigError where the method has no such `tap`, or no column there for a class of the validation images,
    and where these lack labels. Nothing is learnt, so no other images are asked for."""
    if tap not in roles.method.taps:
        raise ConfigError(f"{type(roles.method).__name__} has no {tap} to classify by: choose another protocol")
    classes_of_run(roles)
    roles.check_validation()


def scores(subject: Subject, protocol: str, tap: str) -> dict[str, Any]:
    """`PROTOCOL_top1` and `_top5` of the largest values at `tap`, on the validation images. Raises as `check_tap`."""
    check_tap(subject, tap)
    numbers_K = classes_of_run(subject)
    features = subject.features(VALIDATION, tap)
    number_N = numbers_K[features.labels]
    correct, among_five, total = totals(
        int((features.values.argmax(dim=1) == number_N).sum()),
        top5_correct(features.values, number_N),
        len(number_N),
    )
    return {
        f"{protocol}_top1": correct / total,
        **top5(protocol, among_five, total, features.values.shape[1]),
        protocol: {"images": total, "top1_ci95": wilson(correct, total)},
    }


def classes_of_run(roles: Roles) -> Tensor:
    """int64 [K]: of each class of the validation images' set, which of the run's classifier it is, by name: the set may
    have fewer. As they stand where the run did not say its names, and so as many. Raises ConfigError where the
    classifier does not know one of them."""
    facts, names = roles.method.facts, roles.source_of(VALIDATION).class_names
    instead = "--protocol linear trains one on the frozen features"
    if not facts.class_names:
        if facts.num_classes != len(names):
            raise ConfigError(
                f"the run's classifier knows {facts.num_classes} classes, this data has {len(names)}: {instead}"
            )
        return torch.arange(len(names))
    column = {name: c for c, name in enumerate(facts.class_names)}
    if strange := [name for name in names if name not in column]:
        raise ConfigError(f"the run's classifier knows no class {strange[0]!r}, which this data has: {instead}")
    return torch.tensor([column[name] for name in names])
