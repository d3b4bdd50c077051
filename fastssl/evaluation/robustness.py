"""Robustness: how well a classifier of ImageNet's classes knows them in other images, zero-shot: ImageNetV2, -C, -R, -A
and ObjectNet.

The classifier is the run's own where it has one, else a linear one that is trained on the frozen backbone features of
the labelled images. Sets with some of the classes are scored twice: unmasked, where the classifier chooses among all
it knows, and masked, where only among those.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from fastssl.errors import ConfigError
from fastssl.evaluation.accuracies import wilson
from fastssl.evaluation.linear import choose_head, own_held_out
from fastssl.evaluation.progress import tell
from fastssl.evaluation.shards import totals
from fastssl.evaluation.subject import Roles, Subject
from loaders.plan.views import Whole
from loaders.published.robustness import ALEXNET_ERROR, SEVERITIES, SHIFTS, V2_FOLDERS, Shift, ShiftedSet

SETS = tuple(SHIFTS)
_WNID = re.compile(r"n\d{8}")


def check(roles: Roles) -> None:
    """Raises ConfigError where no set is given."""
    roles.given(SETS)


def evaluate(subject: Subject) -> dict[str, Any]:
    """Accuracies on each set that is given, `imagenet_v2_matched_frequency_top1`, `imagenet_r_top1_masked`, ..., of
    ImageNet-C also `imagenet_c_mce`, told as soon as they are measured; details under `robustness`. Raises ConfigError
    where none is given, or the classes are not ImageNet's."""
    paths = subject.given(SETS)
    class_names = (subject.method.facts.class_names if _has_classifier(subject) else ()) or subject.class_names
    if strange := [name for name in class_names if not _WNID.fullmatch(name)]:
        raise ConfigError(f"robustness is measured on ImageNet's classes, called n01440764, ...; not on {strange[0]!r}")
    parts = {key: SHIFTS[key].parts(path, class_names) for key, path in paths.items()}
    tap, logits_of, about = _classifier(subject)

    def measured(shift: Shift, shifted: ShiftedSet) -> dict[str, Any]:
        features = subject.features_of(shifted.source, tap, Whole() if shift.cropped else None)
        scores = score(logits_of(features.values), features.labels, groups(shifted, class_names))
        return scores | _size(shifted, shift.num_images)

    not_given = [key for key in SETS if key not in paths]
    if "imagenet_v2" in parts:  # three sets that are published apart
        not_given += [f"imagenet_v2_{part}" for part in V2_FOLDERS if part not in parts["imagenet_v2"]]
    headlines: dict[str, Any] = {}
    details: dict[str, Any] = {"classifier": about, "not_given": not_given}
    for key, its_parts in parts.items():
        scores: dict[str, dict[str, Any]] = {}
        numbers: dict[str, Any] = {}
        for part, open_part in its_parts.items():
            scores[part] = measured(SHIFTS[key], open_part())
            of_part = _headlines(f"{key}_{part}" if part else key, scores[part])
            tell(of_part)
            numbers |= of_part
        details[key] = scores.get("", scores)
        if key == "imagenet_c":
            details[key] = corruptions(scores)
            numbers = {"imagenet_c_top1": details[key]["top1"], "imagenet_c_mce": details[key]["mce"]}
            tell(numbers)
        headlines |= numbers
    return headlines | {"robustness": details}


def groups(shifted: ShiftedSet, class_names: tuple[str, ...]) -> Tensor:
    """int64 [K]: for each class that the classifier knows, the class of the set that it counts as; -1 for none."""
    group = {wnid: c for c, members in enumerate(shifted.wnids) for wnid in members}
    return torch.tensor([group.get(name, -1) for name in class_names])


def score(logits_NK: Tensor, labels_N: Tensor, group_K: Tensor) -> dict[str, Any]:
    """Top-1 and top-5 accuracy on all ranks' rows, where any class of the label's group is right, top-1 with its
    interval; `_unmasked` and `_masked`, where some classes are in no group."""
    strangers_K = group_K < 0
    rows = {"": logits_NK}
    if strangers_K.any():
        rows = {"_unmasked": logits_NK, "_masked": logits_NK.masked_fill(strangers_K, -torch.inf)}
    scores: dict[str, Any] = {}
    for suffix, logits in rows.items():
        best = logits.topk(min(5, len(group_K)), dim=1)
        right_N5 = (group_K[best.indices] == labels_N[:, None]) & best.values.isfinite()  # -inf is no answer
        correct, among_five, total = totals(int(right_N5[:, 0].sum()), int(right_N5.any(dim=1).sum()), len(labels_N))
        scores[f"top1{suffix}"] = correct / total
        scores[f"top5{suffix}"] = among_five / total
        scores[f"top1{suffix}_ci95"] = wilson(correct, total)
    return scores


def corruptions(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """ImageNet-C from its 75 parts, `CORRUPTION/SEVERITY`: accuracy by corruption and over all, and errors relative to
    AlexNet's (`ce`, their mean `mce`; 1 is AlexNet: Hendrycks and Dietterich, arXiv 1903.12261)."""
    by_corruption: dict[str, dict[str, Any]] = {}
    for corruption, alexnet in ALEXNET_ERROR.items():
        severities = {str(s): dict(parts[f"{corruption}/{s}"]) for s in SEVERITIES}
        top1 = fmean(scores["top1"] for scores in severities.values())
        by_corruption[corruption] = {"top1": top1, "ce": (1 - top1) / alexnet, "severities": severities}
    return {
        "top1": fmean(c["top1"] for c in by_corruption.values()),
        "mce": fmean(c["ce"] for c in by_corruption.values()),
        "corruptions": by_corruption,
    }


def _headlines(name: str, scores: Mapping[str, Any]) -> dict[str, float]:
    """The top-1 accuracies among `scores`, as those of `name`."""
    return {f"{name}_{k}": scores[k] for k in ("top1", "top1_unmasked", "top1_masked") if k in scores}


def _size(shifted: ShiftedSet, published: int) -> dict[str, Any]:
    """Which images there were; `partial` says of how many, where the set is not whole."""
    source, images = shifted.source, len(shifted.source)
    size = {"data": source.name, "fingerprint": source.fingerprint(), "images": images, "classes": len(shifted.wnids)}
    return size | ({"partial": f"{images} of {published} images"} if images != published else {})


def _has_classifier(subject: Subject) -> bool:
    """Whether the run classifies, and by the data's classes, in whichever order."""
    facts = subject.method.facts
    if "logits" not in subject.method.taps or facts.num_classes != subject.num_classes:
        return False
    return not facts.class_names or set(facts.class_names) == set(subject.class_names)


def _classifier(subject: Subject) -> tuple[str, Callable[[Tensor], Tensor], dict[str, Any]]:
    """The tap whose features it takes, what makes logits of them, and what it is."""
    if _has_classifier(subject):
        return "logits", lambda values: values, {"kind": "the run's own", "tap": "logits"}
    tap = subject.method.taps[0]
    labelled = subject.labelled(tap)
    head, about = choose_head(
        labelled.values, labelled.labels, own_held_out(labelled), subject.num_classes, device=subject.device
    )
    return tap, lambda values: head.logits(values)[0], {"kind": "linear, on frozen features", "tap": tap, **about}
