"""Finds recipes by name and applies what the user changes.

A recipe `paws.digits` is the public function `digits`, annotated `-> Stages`, of the module `fastssl/recipes/paws.py`.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import replace

import fastssl.recipes
from fastssl.config.changes import has_path, with_value
from fastssl.config.names import suggest
from fastssl.config.old_names import REPLACED
from fastssl.config.plain import type_name
from fastssl.errors import ConfigError
from fastssl.methods.base import Ref, Stage, Stages
from fastssl.optim.horizon import Span, Warmup, parse_span, parse_warmup
from fastssl.recipes import of_users
from fastssl.recipes.found import recipes_in
from fastssl.recipes.images import Images

PARSERS = {
    Span: parse_span,
    Span | None: lambda text: None if text == "none" else parse_span(text),
    Warmup: parse_warmup,
}
_ALIASES = {"epochs": "length", "steps": "length"}
_FIXED = {"name", "config", "do", "needs", "dataset"}  # what a recipe is


def recipes() -> dict[str, Callable[[], Stages]]:
    """Every recipe by name, in the order of its file."""
    found: dict[str, Callable[[], Stages]] = {}
    for module in pkgutil.iter_modules(fastssl.recipes.__path__):
        ours = recipes_in(importlib.import_module(f"fastssl.recipes.{module.name}"))
        found |= {f"{module.name}.{name}": recipe for name, recipe in ours.items()}
    return found


def canonical(name: str) -> str:
    """What a run is told to have as its recipe: for a user's, the module and function that `name` means. Raises as
    `resolve` does."""
    return of_users.load(name)[0] if of_users.of_a_user(name) else name


def follows_images(name: str) -> bool:
    """Whether the recipe `name` is one of ours that follows from the images it is given."""
    return name in (known := recipes()) and bool(inspect.signature(known[name]).parameters)


def resolve(name: str, changes: tuple[str, ...] = (), images: Images | None = None) -> Stages:
    """The stages of recipe `name`, ours or a user's, with `key=value` changes applied; where it follows from the
    images, for `images`, or typical ones. Raises ConfigError with the nearest name."""
    if of_users.of_a_user(name):
        stages = of_users.load(name)[1]()
    elif images is not None and follows_images(name):
        stages = recipes()[name](images)  # type: ignore[call-arg]  # a recipe needs no argument, and may take this one
    elif name in (known := recipes()):
        stages = known[name]()
    else:
        raise ConfigError(f"unknown recipe {name!r}{suggest(name, known)}")
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ConfigError(f"--set {change!r}: write key=value")
        stages = _changed(stages, key.strip(), text.strip())
    keys = [change.partition("=")[0].strip() for change in changes]
    return tuple(_derived(stage, keys) for stage in stages) if keys else stages


def _derived(stage: Stage, keys: Sequence[str]) -> Stage:
    """The stage with what its method derives from the changes at `keys`."""
    said = {key.removeprefix(f"{stage.name}.") for key in keys}
    return replace(stage, config=stage.config.following(said))


def _changed(stages: Stages, key: str, text: str) -> Stages:
    """`key` is a field of the stage or of its method, or either after `STAGE.`; it must exist in one stage at least."""
    first, _, rest = key.partition(".")
    named = [stage for stage in stages if stage.name == first and rest]
    field, asked = (rest, named) if named else (key, list(stages))
    _refuse_parts_of_some(asked, field, text)
    changed = {stage.name: _stage_with(stage, field, text) for stage in asked}
    if not any(changed.values()):
        for stage in asked:
            if (now := REPLACED.get(type_name(type(stage.config)), {}).get(field)) is not None:
                raise ConfigError(f"{key} is {now} now: --set {f'{first}.' if named else ''}{now}={text}")
        names = {"epochs", "steps"}
        for stage in asked:
            names |= vars(stage).keys() | vars(stage.config).keys()
        raise ConfigError(f"unknown key {key!r}{suggest(field, names - _FIXED)}")
    return tuple(changed.get(stage.name) or stage for stage in stages)


def _refuse_parts_of_some(stages: list[Stage], key: str, text: str) -> None:
    """Raises ConfigError where `key` is a part of what is unset in some of the stages alone."""
    has = [stage.name for stage in stages if has_path(stage.config, key)]
    if has and (lacks := [s.name for s in stages if s.name not in has and has_path(s.config, key.partition(".")[0])]):
        each = " ".join(f"--set {name}.{key}={text}" for name in has)
        raise ConfigError(f"{key}: stage {lacks[0]} has no {key.partition('.')[0]}; set it by stage: {each}")


def _stage_with(stage: Stage, key: str, text: str) -> Stage | None:
    """The stage with the change applied, or None where it has no such key."""
    if key in _ALIASES:
        return with_value(stage, _ALIASES[key], f"{text}{key}", PARSERS)
    first = key.partition(".")[0]
    if key in stage.needs and stage.needs[key].stage is None:
        return replace(stage, needs={**stage.needs, key: Ref(path=text)})
    if first in _FIXED:
        return None
    if has_path(stage.config, first):
        return replace(stage, config=with_value(stage.config, key, text, PARSERS))
    if has_path(stage, first):
        return with_value(stage, key, text, PARSERS)
    return None
