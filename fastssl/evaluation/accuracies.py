"""From accuracies to what a paper's table says: intervals, mean and spread over seeds, Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def wilson(correct: int, total: int) -> list[float]:
    """95 % interval [low, high] of an accuracy measured on `total` images (Wilson 1927): the chance in drawing the
    test images, not the spread over training seeds."""
    z = 1.959964  # 97.5 % quantile of the normal law
    share, weight = correct / total, z * z / total
    centre = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / total + weight / (4 * total)) / (1 + weight)
    return [max(0.0, centre - half), min(1.0, centre + half)]


def mean_and_spread(values: Sequence[float]) -> dict[str, Any]:
    """`mean`, `std` (of a sample, n - 1; None for a single seed) and the `values`, one a seed."""
    values = [float(v) for v in values]
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "values": values,
    }


def spread_over_seeds(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """`mean_and_spread` of every accuracy (`..._top1...`) that all `results` hold, one result a seed."""
    shared = set.intersection(*(set(result) for result in results))
    return {
        name: mean_and_spread([result[name] for result in results])
        for name in results[0]
        if name in shared and "_top1" in name
    }


def accuracy_cell(spread: Mapping[str, Any], ci95: Sequence[float] | None = None) -> str:
    """`97.1 ± 0.3 (3 seeds)`, or `97.1 [96.0, 97.9] (single seed)` where an interval is known; in percent."""
    mean, std, num_seeds = spread["mean"], spread["std"], len(spread["values"])
    if std is not None:
        return f"{100 * mean:.1f} ± {100 * std:.1f} ({num_seeds} seeds)"
    interval = f" [{100 * ci95[0]:.1f}, {100 * ci95[1]:.1f}]" if ci95 else ""
    return f"{100 * mean:.1f}{interval} (single seed)"
