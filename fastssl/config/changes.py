"""Strict `key=value` changes of frozen dataclasses.

Every error is a `ConfigError` with one line that says what to do.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from typing import Any, TypeVar

from fastssl.config.calls import is_call, is_structure, parse_call, split
from fastssl.config.names import suggest
from fastssl.errors import ConfigError

T = TypeVar("T")

Parsers = Mapping[Any, Callable[[str], Any]]  # for types with a notation of their own


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
    structures = [each for each in (arguments if origin in (typing.Union, types.UnionType) else (kind,))
                  if is_structure(each)]  # fmt: skip
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and text.lower() == "none":
            return None
        if type(None) in arguments and len(structures) == 1 and text.lower() == "default":
            return structures[0]()
        plain = [a for a in arguments if a is not type(None) and a not in structures]
        if len(plain) == 1 and not (structures and is_call(text)):
            return _parse(text, plain[0], path, parsers)
    if structures:
        return parse_call(text, structures, path, lambda text, kind, path: _parse(text, kind, path, parsers))
    if origin is typing.Literal:
        return _chosen(text, {str(a): a for a in arguments}, path)
    if origin is tuple:
        inside = text.strip()
        inside = inside[1:-1] if inside.startswith("(") and inside.endswith(")") else inside
        parts = [part for part in split(inside) if part]
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
