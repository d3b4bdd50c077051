"""From accuracies to what a paper's table says: intervals, mean and spread over seeds, Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def wilson(correct: int, total: int) -> list[float]:
    """95 % interval [low, high] of an accuracy measured on `total` images (Wilson 1927): the chance in drawing the
    test images, not the spread over training seeds."""
    z = 1.959964  # 97.5 % quantile of the normal law
    share, weight = correct / total, z * z / total
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / total + weight / (4 * total)) / (1 + weight)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def top5_correct(scores_NK: Tensor, labels_N: Tensor) -> int:
    """How many rows have their label among the five largest scores; of equal ones the later class is the larger, as in
    scikit-learn's `top_k_accuracy_score`."""
    own_N1 = scores_NK.gather(1, labels_N[:, None])
    not_later_NK = torch.arange(scores_NK.shape[1], device=scores_NK.device) <= labels_N[:, None]
    smaller_NK = (scores_NK < own_N1) | (scores_NK == own_N1) & not_later_NK  # so that not-a-numbers count against
    return int(((~smaller_NK).sum(dim=1) < 5).sum())


def top5(protocol: str, correct: int, total: int, num_classes: int) -> dict[str, float]:
    """`PROTOCOL_top5`; nothing of five classes or fewer, of which it says nothing."""
    return {f"{protocol}_top5": correct / total} if num_classes > 5 else {}


def mean_and_spread(values: Sequence[float]) -> dict[str, Any]:
    """`mean`, `std` (of a sample, n - 1; None for a single seed) and the `values`, one a seed."""
    values = [float(v) for v in values]
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
    }


def spread_over_seeds(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """`mean_and_spread` of every accuracy (`..._top1...`, `..._top5`) that all `results` hold, one result a seed."""
    shared = set.intersection(*(set(result) for result in results))
    return {
        name: mean_and_spread([result[name] for result in results])
        for name in results[0]
        if name in shared and ("_top1" in name or name.endswith("_top5"))
    }


def accuracy_cell(spread: Mapping[str, Any], ci95: Sequence[float] | None = None) -> str:
    """`97.1 ± 0.3 (3 seeds)`, or `97.1 [96.0, 97.9] (single seed)` where an interval is known; in percent."""
    mean, std, num_seeds = spread["mean"], spread["std"], len(spread["values"])
    if std is not None:
        return f"{100 * mean:.1f} ± {100 * std:.1f} ({num_seeds} seeds)"
    interval = f" [{100 * ci95[0]:.1f}, {100 * ci95[1]:.1f}]" if ci95 else ""
    return f"{100 * mean:.1f}{interval} (single seed)"
