"""What a benchmark says about where it ran."""

from __future__ import annotations

import platform
from pathlib import Path

from fastssl import machine as ours


def commit() -> str:
    """Short, and `-dirty` where files differ from it."""
    return ours.commit("describe", "--always", "--dirty", "--abbrev=12")


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
