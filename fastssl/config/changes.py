"""Strict `key=value` changes of frozen dataclasses.

Every error is a `ConfigError` with one line that says what to do.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from typing import Any, TypeVar

from fastssl.errors import ConfigError

T = TypeVar("T")

Parsers = Mapping[Any, Callable[[str], Any]]  # for types with a notation of their own


def suggest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x', 'y' or 'z'?` for the nearest three known names, or a list, five at most, where none is
    near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3)
    if near:
        *others, last = map(repr, near)
        return f"; did you mean {', '.join(others) + ' or ' if others else ''}{last}?"
    listed = known if len(known) <= 5 else difflib.get_close_matches(name, known, n=5, cutoff=0.0)
    more = f" and {len(known) - len(listed)} more" if len(known) > len(listed) else ""
    return f"; known: {', '.join(listed)}{more}"


def with_value(config: T, path: str, text: str, parsers: Parsers | None = None) -> T:
    """`config` with the field at dotted `path` set to the value written in `text`; strict about names and types."""
    assert is_dataclass(config)
    head, _, rest = path.partition(".")
    names = [f.name for f in fields(config)]
    if head not in names:
        raise ConfigError(f"unknown key {head!r} in {type(config).__name__}{suggest(head, names)}")
    old = getattr(config, head)
    if rest:
        if not is_dataclass(old):
            raise ConfigError(f"{head!r} has no parts, so {path!r} cannot be set")
        new = with_value(old, rest, text, parsers)
    else:
        new = _parse(text, typing.get_type_hints(type(config))[head], path, parsers or {})
    try:
        return replace(config, **{head: new})  # type: ignore[type-var]
    except ConfigError:
        raise
    except ValueError as error:  # what a description says of values that it cannot hold
        raise ConfigError(f"{path}: {error}") from None


def has_path(config: object, path: str) -> bool:
    """Whether `with_value` would find a field at `path`."""
    for name in path.split("."):
        if not is_dataclass(config) or name not in (f.name for f in fields(config)):
            return False
        config = getattr(config, name)
    return True


def _parse(text: str, kind: Any, path: str, parsers: Parsers) -> Any:
    if kind in parsers:
        return parsers[kind](text)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and text.lower() == "none":
            return None
        structures = [a for a in arguments if isinstance(a, type) and is_dataclass(a)]
        if type(None) in arguments and len(structures) == 1 and text.lower() == "default":
            return structures[0]()
        plain = [a for a in arguments if a is not type(None) and not is_dataclass(a)]
        if len(plain) == 1:
            return _parse(text, plain[0], path, parsers)
        raise ConfigError(f"{path!r} holds a structure; set one of its parts ({path}.name=value)")
    if origin is typing.Literal:
        return _chosen(text, {str(a): a for a in arguments}, path)
    if origin is tuple:
        parts = [p for p in text.split(",") if p]
        element = [arguments[0]] * len(parts) if arguments[-1:] == (Ellipsis,) else list(arguments)
        if len(parts) != len(element):
            raise ConfigError(f"{path}={text}: {len(element)} values separated by commas are needed")
        return tuple(_parse(p, e, path, parsers) for p, e in zip(parts, element, strict=True))
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{path}={text}: write true or false")
        return text.lower() == "true"
    if kind in (int, float, str):
        try:
            return kind(text)
        except ValueError:
            noun = "a whole number" if kind is int else "a number"
            raise ConfigError(f"{path}={text}: {noun} is needed") from None
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _chosen(text, {str(member.value): member for member in kind}, path)
    raise ConfigError(f"{path!r} cannot be written on the command line; set one of its parts or write a recipe")


def _chosen(text: str, choices: Mapping[str, Any], path: str) -> Any:
    if text not in choices:
        raise ConfigError(f"{path}={text}: choose one of {', '.join(choices)}")
    return choices[text]
