"""What the names of files and folders say of the split that they hold."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "test", "testing")
TEST_NAMES = ("test", "testing")  # validation images only where there are none of the other names
_WORD = re.compile(rf"(?:^|[^a-z])({'|'.join(TRAIN_NAMES + VAL_NAMES)})(?=[^a-z]|$)")


def split_of(name: str) -> str:
    """`train`, `val` or `test`, by the first word of `name` that means one, in either case; "" where none does."""
    match = _WORD.search(name.lower())
    if match is None:
        return ""
    return "train" if match[1] in TRAIN_NAMES else "test" if match[1] in TEST_NAMES else "val"


def by_split(folder: Path, paths: Iterable[Path]) -> dict[str, list[Path]]:
    """The files `paths` in `folder` or below by split, each as its path says it; those of which no word means a split
    are for training."""
    found: dict[str, list[Path]] = {}
    for path in paths:
        found.setdefault(split_of(str(path.relative_to(folder))) or "train", []).append(path)
    return found


def train_and_val(splits: Iterable[str]) -> tuple[str | None, str | None]:
    """Which of `splits` are trained on and validated with. A test set is for validation where there is none but for
    training, and serves as either where it is alone."""
    there = set(splits)
    if there == {"test"}:
        return "test", None
    val = "val" if "val" in there else "test" if "test" in there and "train" in there else None
    return "train" if "train" in there else None, val
