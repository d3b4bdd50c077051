"""fastssl from a notebook or a script: what the commands do, as functions.

    import fastssl

    run = fastssl.train("paws.digits", out="runs/first", progress=True)
    run.evaluate("knn")
    fastssl.open_run("runs/first").embed("photos/")

Nothing heavy is imported until it is used.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastssl.api.run import Run as Run
    from fastssl.api.run import open_run as open_run
    from fastssl.api.training import list_recipes as list_recipes
    from fastssl.api.training import train as train

_HOME = {"train": "training", "list_recipes": "training", "open_run": "run", "Run": "run"}
__all__ = ["Run", "list_recipes", "open_run", "train"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastssl' has no attribute {name!r}")
    from importlib import import_module

    before_torch()
    return getattr(import_module(f"fastssl.api.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def before_torch() -> None:
    """Set what torch reads as it loads, unless the user has."""
    # OpenMP's threads spin between parallel regions by default and so take the cores from the loader's threads, from
    # other ranks and from each other: a step took up to ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # torch's networking warns of host names it cannot look up and of peers that leave; what matters comes as an error.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
