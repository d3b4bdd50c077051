"""A row of what `fastssl doctor` shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "absent", "look", "broken"]  # absent: an option that nobody needs; broken: nothing will run


@dataclass(frozen=True)
class Row:
    """One thing looked at, what was found, and what to do where the verdict is not ok."""

    name: str
    found: str
    verdict: Verdict
    remedy: str = ""
