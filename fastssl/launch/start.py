"""The way in: a piece of work on all its ranks, started here or by whoever has started this process."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

import torch

from fastssl.errors import FastsslError
from fastssl.launch.here import started_here
from fastssl.launch.lines import lines, show_how
from fastssl.launch.ranks import Ranks, Work, launcher
from fastssl.launch.started_by_others import check_world, end_with_agent, one_of_many


def start(ranks: Ranks, work: Work, command: str, door: Callable[[], None]) -> Any:
    """Do `work` on all ranks and return the first rank's result. `command` is what the user typed. `door` raises
    FastsslError where the work cannot be done at all; it is asked once the number of ranks is known to be right, and
    one rank speaks for all. Raises FastsslError where the ranks cannot be had or end, of which Stopped means that they
    saved and left on request."""
    if (started := launcher()) is not None:
        check_world(ranks, *started)
        _ask(lambda: _check_gpus(ranks))
        _ask(door)
        end_with_agent()
        return one_of_many(ranks, work)
    door()
    if ranks.device == "cuda" and ranks.world > (here := torch.cuda.device_count()):
        show_how(lines(ranks, command))
        raise FastsslError(f"--gpus {ranks.world}: this host has {here}{'' if here else _why_none()}")
    _check_gpus(ranks)
    return work() if ranks.world == 1 else started_here(ranks, work)


def _ask(door: Callable[[], None]) -> None:
    """Of several ranks, the first says what is wrong."""
    try:
        door()
    except FastsslError:
        if os.environ["RANK"] == "0":
            raise
        raise SystemExit(1) from None


def _check_gpus(ranks: Ranks) -> None:
    """Raise FastsslError where there are GPUs that torch cannot use; the driver counts them all the same."""
    if ranks.device == "cuda" and not torch.cuda.is_available():
        raise FastsslError(f"torch cannot use this host's GPUs{(why := _why_none())}; {_what_to_install(why)}")


def _what_to_install(why: str) -> str:
    """Torch names the newest CUDA that the driver knows, as 12080, and not what to do about it."""
    known = re.search(r"found version (\d+)", why)
    if known is None or torch.version.cuda is None:
        return "`fastssl doctor` says what to install"
    major, minor = divmod(int(known[1]) // 10, 100)
    return (
        f"this torch is built for CUDA {torch.version.cuda}, the driver is for {major}.{minor} at most: update the "
        f"driver, or install torch's build for CUDA {major} (pytorch.org)"
    )


def _why_none() -> str:
    """Why torch sees no GPU, in its own words: a driver that is missing or too old, a build for CPUs."""
    if torch.cuda.is_available():
        return ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f" ({str(error).partition('. ')[0].strip().rstrip('.')})"
    return ""
