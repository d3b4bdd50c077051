"""Recipes of the user's: `my_recipes.py:mine`, a function in a file, and `package.module:mine`, one in a module.

Both are loaded under a name that is the same in every process, a file under its own name without the ending, so that
what the recipe holds of theirs (a method's config, an encoder, an optimiser) travels to all ranks by reference, and is
found again by whoever opens the run (`fastssl.config.modules`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from fastssl.config.modules import OURS, import_failure, load_file, reach_last
from fastssl.config.names import suggest
from fastssl.errors import ConfigError
from fastssl.methods.base import Stages
from fastssl.recipes.datasets import KNOWN_SETS
from fastssl.recipes.found import is_recipe, recipes_in


def of_a_user(name: str) -> bool:
    """Whether a recipe's name says that it is none of ours."""
    return ":" in name or name.endswith(".py")


def load(name: str) -> tuple[str, Callable[[], Stages]]:
    """The recipe that `name` means, and `module:function`, by which all processes that have its module know it. Raises
    ConfigError where there is no such file, module or function, or what is there cannot be imported or is no recipe."""
    where, colon, function = name.rpartition(":") if ":" in name else (name, "", "")
    module = _from_file(Path(where)) if where.endswith(".py") else _from_module(where)
    recipes = recipes_in(module)
    if not colon or not function:
        raise ConfigError(f"{name}: say which recipe, as {where}:NAME{suggest(function, recipes)}")
    found = getattr(module, function, None)
    if found is None:
        raise ConfigError(f"{where} has no recipe {function!r}{suggest(function, recipes)}")
    if not callable(found) or not is_recipe(found):
        raise ConfigError(f"{where}: {function} is no recipe: write it as `def {function}() -> Stages:`")
    return f"{module.__name__}:{function}", _checked(name, found)


def _checked(name: str, recipe: Callable[[], Stages]) -> Callable[[], Stages]:
    """The recipe, whose data sets must be known ones."""

    def checked() -> Stages:
        stages = recipe()
        for stage in stages:
            if (dataset := stage.config.dataset) not in KNOWN_SETS:
                raise ConfigError(f"{name}: dataset is {dataset!r}, but must be one of {', '.join(KNOWN_SETS)}")
        return stages

    return checked


def _from_file(path: Path) -> ModuleType:
    name, file = path.stem, path.absolute()
    if not file.is_file():
        raise ConfigError(f"{path}: there is no such file")
    there = getattr(sys.modules.get(name), "__file__", None) or _installed(name)
    if there is not None and Path(there) != file:
        raise ConfigError(f"{path}: {there} is called {name}, too: give the file another name")
    if name not in sys.modules:
        try:
            load_file(name, file)
        except (Exception, SystemExit) as error:
            raise ConfigError(f"{path} cannot be imported: {import_failure(error, file)}") from error
    return sys.modules[name]


def _installed(name: str) -> str | None:
    """Where a module of that name is that `import` would find without us."""
    if name in sys.stdlib_module_names or name in OURS:
        return f"a module of {'Python' if name in sys.stdlib_module_names else 'fastssl'}"
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return None
    return None if spec is None else spec.origin


def _from_module(name: str) -> ModuleType:
    reach_last(Path.cwd())
    try:
        spec = find_spec(name)
        file = Path((spec.origin if spec else None) or name)
    except (ImportError, ValueError):  # of a package that there is not
        spec = None
    except Exception as error:  # which importing its package has raised
        raise ConfigError(f"{name} cannot be imported: {import_failure(error, Path(name))}") from error
    if spec is None:
        raise ConfigError(f"there is no module {name!r}, neither installed nor in this folder; a file is FILE.py:NAME")
    try:
        return import_module(name)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{name} cannot be imported: {import_failure(error, file)}") from error
