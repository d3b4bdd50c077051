"""Accuracy of a method's own classifier: the largest of its logits."""

from __future__ import annotations

from typing import Any

from fastssl.config import ConfigError
from fastssl.evaluation.subject import Subject
from fastssl.evaluation.summary import wilson
from loaders.store.data import VALIDATION


def evaluate(subject: Subject) -> dict[str, Any]:
    """`classifier_top1` on the validation images. Raises ConfigError where the method has no classifier."""
    if "logits" not in subject.method.taps:
        raise ConfigError(f"{type(subject.method).__name__} has no classifier: choose another protocol")
    subject.check()
    features = subject.features(VALIDATION, "logits")
    correct = int((features.values.argmax(dim=1) == features.labels).sum())
    total = len(features.labels)
    return {
        "classifier_top1": correct / total,
        "classifier": {"images": total, "top1_ci95": wilson(correct, total)},
    }
