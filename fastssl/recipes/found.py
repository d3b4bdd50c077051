"""Which functions of a module are recipes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType

from fastssl.methods.base import Stages

Recipe = Callable[[], Stages]


def recipes_in(module: ModuleType) -> dict[str, Recipe]:
    """The public functions that need no argument and that `module` itself defines and annotates `-> Stages`."""
    members = {name: each for name, each in vars(module).items() if inspect.isfunction(each)}
    return {
        name: each
        for name, each in members.items()
        if each.__module__ == module.__name__ and name[0] != "_" and is_recipe(each)
    }


def is_recipe(function: Callable[..., object]) -> bool:
    """Whether it is annotated `-> Stages`, under whatever name that is imported, and needs no argument; it may take
    `images`, what is known of the data."""
    signature = inspect.signature(function)
    said = signature.return_annotation
    annotated = said.rpartition(".")[2] == "Stages" if isinstance(said, str) else said == Stages
    return annotated and all(each.default is not each.empty for each in signature.parameters.values())
