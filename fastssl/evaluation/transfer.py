"""Transfer: what the frozen backbone features are worth to other classes, on the eleven small sets of SemPPL (arXiv
2301.05158), BYOL and SimCLR.

Images are seen in the run's evaluation view; one that scales them and cuts the centre scales the shorter side to the
crop's own size, so that no more is cut off than a square needs (SimCLR, arXiv 2002.05709, B.8; BYOL, arXiv 2006.07733,
D.2). A linear classifier is trained for each set that is given: its one setting is chosen on the validation split, with
it it is trained again on training and validation split, and scored once on the test split. How it is trained is said in
`linear`: not by the paper's sweep over SGD's settings, which stands in every result beside what was done instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastssl.evaluation.accuracies import wilson
from fastssl.evaluation.linear import choose_head, top1
from fastssl.evaluation.progress import tell
from fastssl.evaluation.shards import whole
from fastssl.evaluation.subject import Roles, Subject
from loaders.plan.views import Centre, Crop, View
from loaders.published.transfer import TRANSFERS, Metric, TransferSet

SETS = tuple(TRANSFERS)
DECAYS = (0.0, 1e-5, 1e-4, 1e-3)  # beside every rate of SGD: three of the paper's six, and none
PAPER_SWEEP = {  # SemPPL's, 12,000 trainings a set
    "lr": (0.001, 0.01, 0.1, 0.2, 0.25, 0.3, 0.35, 0.4, 1.0, 2.0),
    "batch": (128, 256, 512, 1024, 2048),
    "weight_decay": (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
    "warmup_epochs": (0, 10),
    "momentum": (0.9, 0.99),
    "nesterov": (True, False),
    "epochs": (20, 30, 60, 80, 100),
}


def check(roles: Roles) -> None:
    """Raises ConfigError where no set is given."""
    roles.given(SETS)


def evaluate(subject: Subject) -> dict[str, Any]:
    """`food101_top1`, `pets_mean_per_class`, ... on the test split of each set that is given, told as soon as it is
    measured; details under `transfer`. Raises ConfigError where none is given."""
    paths = subject.given(SETS)
    opened = {key: TRANSFERS[key].open(path) for key, path in paths.items()}
    tap = subject.method.taps[0]
    scores: dict[str, Any] = {}
    details: dict[str, Any] = {}
    for key, data in opened.items():
        metric = TRANSFERS[key].metric
        details[key] = _measured(subject, tap, data, metric) | _size(key, data)
        scores[f"{key}_{metric}"] = details[key][metric]
        tell({f"{key}_{metric}": details[key][metric]})
    about = {"tap": tap, "not_given": [key for key in SETS if key not in paths], "paper_sweep_not_done": PAPER_SWEEP}
    return scores | {"transfer": about | details}


def crop_of(eval_view: View) -> Crop:
    """How images are cut that the run sees in `eval_view`: where that cuts the centre, to the largest square."""
    return Centre(resize=eval_view.size) if isinstance(eval_view.crop, Centre) else eval_view.crop


def mean_per_class(classes_N: Tensor, labels_N: Tensor) -> float:
    """Mean over the classes that `labels_N` has of the share that is right."""
    right_N = (classes_N == labels_N).double()
    counts_K = labels_N.bincount()
    return float((labels_N.bincount(right_N) / counts_K)[counts_K > 0].mean())


METRICS: dict[Metric, Callable[[Tensor, Tensor], float]] = {"top1": top1, "mean_per_class": mean_per_class}


def _measured(subject: Subject, tap: str, data: TransferSet, metric: Metric) -> dict[str, Any]:
    crop = crop_of(subject.method.config.eval_view)
    learn, test = (subject.features_of(source, tap, crop) for source in (data.learn, data.test))
    head, about = choose_head(
        learn.values,
        learn.labels,
        torch.from_numpy(data.is_val_N)[learn.ids],
        data.learn.num_classes,
        score=METRICS[metric],
        decays=DECAYS,
        device=subject.device,
    )
    (own_classes_q,) = head.classes(test.values)
    classes_Q, labels_Q = whole(own_classes_q), whole(test.labels)
    correct = int((classes_Q == labels_Q).sum())
    return {
        metric: METRICS[metric](classes_Q, labels_Q),
        "top1": correct / len(labels_Q),
        "top1_ci95": wilson(correct, len(labels_Q)),
        "validation": "published" if data.published else "a tenth of the training images of each class, keyed",
        "classes": data.learn.num_classes,
        **about,
    }


def _size(key: str, data: TransferSet) -> dict[str, Any]:
    """Which images there were; `partial` says of how many, where the set is not whole."""
    whole, learn, test = TRANSFERS[key], len(data.learn), len(data.test)
    size: dict[str, Any] = {
        "learnt_from": {"data": data.learn.name, "fingerprint": data.learn.fingerprint(), "images": learn},
        "tested_on": {"data": data.test.name, "fingerprint": data.test.fingerprint(), "images": test},
    }
    if (learn, test) != (whole.num_learn, whole.num_test):
        size["partial"] = f"{learn} of {whole.num_learn} and {test} of {whole.num_test} images"
    return size
