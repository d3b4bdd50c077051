"""Compares a profile with a saved one: what became slower beyond the noise that both measured.

Compared are CPU seconds an image of each stage of the loader, over the speed of fixed work beside each window, so that
a busy machine is not taken for a slow program; counts of a step; and wall times where both machines were quiet. Load
can only add to CPU time, so a profile's value is the mean of its lower half of windows, and its noise their scatter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any

from fastssl.config.plain import differences
from fastssl.errors import FastsslError
from fastssl.profiling.summary import FORMAT

LEAST_SHARE = 0.10  # a change below it is never called a regression: pages and frequencies differ from start to start
SIGMAS = 3.0
OF_ALL = 0.10  # stages below this share of the loader's CPU count with the others only: they are mostly noise


class Regression(FastsslError):
    """Something became slower."""


@dataclass(frozen=True)
class Change:
    """`after` / `before` - 1, and the share beyond which that is more than noise."""

    name: str
    share: float
    allowed: float

    @property
    def is_regression(self) -> bool:
        return self.share > self.allowed

    def __str__(self) -> str:
        return f"{self.name}: {self.share:+.1%} (noise allows {self.allowed:.1%})"


def check_comparable(before: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raises FastsslError, with the difference, where a profile of `identity` cannot be compared with `before`."""
    if before.get("format") != FORMAT:
        raise FastsslError(f"the baseline has format {before.get('format')}, this version writes {FORMAT}")
    if not before["complete"]:
        raise FastsslError("the baseline is that of an interrupted profile")
    if different := differences(before["identity"], dict(identity)):
        raise FastsslError(f"the baseline cannot be compared (baseline -> now): {'; '.join(different)}")


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Every value that both have."""
    old, new = before["noise"], after["noise"]
    found = []
    if old["cpu"] and new["cpu"]:
        parts = {name: (old["cpu"][name], new["cpu"][name]) for name in _stages(old, new)}
        parts["the loader"] = _together(old["cpu"]), _together(new["cpu"])
        for name, (earlier, later) in parts.items():
            found.append(_change(f"CPU of {name}", [earlier, old["speed"]], [later, new["speed"]]))
    if before["machine"]["quiet"] and after["machine"]["quiet"]:
        names = [name for name in old["wall"] if old["wall"][name] and new["wall"].get(name)]
        found += [_change(f"wall time of {name}", [old["wall"][name]], [new["wall"][name]]) for name in names]
    for name in [name for name in old["counts"] if name in new["counts"]]:
        found.append(Change(name.replace("_", " "), _over(new["counts"][name], old["counts"][name]), 0.01))
    return found


def check(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """What changed, in words. Raises Regression."""
    changes = compare(before, after)
    worse = [change for change in changes if change.is_regression]
    if worse:
        raise Regression(f"slower than the baseline: {'; '.join(map(str, worse))}")
    return f"no regression in {len(changes)} values; largest: {max(changes, key=lambda c: c.share - c.allowed)}"


def _stages(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    values = {name: _typical(windows) for name, windows in old["cpu"].items()}
    total = sum(values.values())
    return [name for name, value in values.items() if name in new["cpu"] and value > OF_ALL * total]


def _together(stages: Mapping[str, Sequence[float]]) -> list[float]:
    """Of all stages, window by window."""
    return [sum(values) for values in zip(*stages.values(), strict=True)]


def _change(name: str, old: Sequence[Sequence[float]], new: Sequence[Sequence[float]]) -> Change:
    """Of a value's windows, or of the ratio of a value and another, each with windows of its own."""
    noise = math.hypot(*(_noise(windows) for windows in (*old, *new)))
    before, after = (_typical(value) / (_typical(unit[0]) if unit else 1.0) for value, *unit in (old, new))
    return Change(name, _over(after, before), max(LEAST_SHARE, SIGMAS * noise))


def _over(new: float, old: float) -> float:
    return new / old - 1 if old else (math.inf if new else 0.0)


def _lower(windows: Sequence[float]) -> list[float]:
    return sorted(windows)[: (len(windows) + 1) // 2]


def _typical(windows: Sequence[float]) -> float:
    lower = _lower(windows)
    return sum(lower) / len(lower)


def _noise(windows: Sequence[float]) -> float:
    """Of the typical value, as a share of it."""
    lower = _lower(windows)
    return stdev(lower) / math.sqrt(len(lower)) / _typical(windows) if len(lower) > 1 else 0.0
