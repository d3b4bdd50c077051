"""Accuracy of a method's own classifier where the four quarter turns of an image vote by their mean logits.

For classifiers that were trained on all turns, as S4L-Rotation's, of which the paper reports one to two points more.
"""

from __future__ import annotations

from typing import Any

from fastssl.evaluation.classifier import check_tap, scores
from fastssl.evaluation.subject import Roles, Subject


def check(roles: Roles) -> None:
    """Raises ConfigError where the method has no such classifier, or does not know a class of the data."""
    check_tap(roles, "turned-logits")


def evaluate(subject: Subject) -> dict[str, Any]:
    """`turned_classifier_top1` and `_top5` on the validation images. Raises ConfigError where the method has no such
    classifier."""
    return scores(subject, "turned_classifier", "turned-logits")
