"""`name(value, name=value)`: how encoders, optimisers and rates are written on the command line, whole.

Known are the dataclasses that may stand in the field: the class that the field names, or where that is abstract, all
that its room defines (a file a kind, found by being there), and what else has been imported.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from fastssl.config.names import suggest
from fastssl.errors import ConfigError

Parse = Callable[[str, Any, str], Any]  # (text, type, path) -> value


def is_structure(kind: Any) -> bool:
    """Whether values of `kind` are written as calls."""
    return isinstance(kind, type) and (is_dataclass(kind) or inspect.isabstract(kind))


def is_call(text: str) -> bool:
    return re.fullmatch(r"\s*\w+\s*\(.*\)\s*", _whole(text)) is not None


def _whole(text: str) -> str:
    """`timm:resnet50` is short for `timm(resnet50)`."""
    return re.sub(r"^\s*(\w+):([^()]+)$", r"\1(\2)", text)


def parse_call(text: str, kinds: Sequence[type], path: str, parse: Parse) -> Any:
    """The value of one of `kinds` that `text` describes; `parse` reads each argument. Raises ConfigError for names that
    there are not, with the nearest, and for arguments that are too many, missing or wrong."""
    there, text = known(kinds), _whole(text)
    if not is_call(text):
        whole = " or ".join(f"{name}(...)" for name in sorted(there)[:5])
        raise ConfigError(f"{path}={text}: write it whole, as {whole}, or set one of its parts ({path}.name=value)")
    name, _, rest = text.strip().partition("(")
    kind = {_plain(each): found for each, found in there.items()}.get(_plain(name))
    if kind is None:
        raise ConfigError(f"{path}: there is no {name.strip()!r}{suggest(name.strip(), there)}")
    hints = typing.get_type_hints(kind)
    given = _arguments(kind, split(rest.rstrip()[:-1]), path)
    values = {key: parse(value, hints[key], f"{path}.{key}") for key, value in given.items()}
    try:
        return kind(**values)
    except ConfigError:
        raise
    except ValueError as error:  # what a description says of values that it cannot hold
        raise ConfigError(f"{path}: {error}") from None


def known(kinds: Sequence[type]) -> dict[str, type]:
    """The dataclasses by name that are of one of `kinds`."""
    found: dict[str, type] = {}
    for kind in kinds:
        if inspect.isabstract(kind):
            _import_room(kind)
        found |= {each.__name__: each for each in _with_subclasses(kind) if is_dataclass(each)}
    return {name: each for name, each in found.items() if not inspect.isabstract(each)}


def _with_subclasses(kind: type) -> Iterator[type]:
    yield kind
    each: type
    for each in kind.__subclasses__():
        yield from _with_subclasses(each)


def _import_room(kind: type) -> None:
    """The modules beside that of `kind`, for what they define; those that end in `_triton` hold kernels."""
    room = sys.modules[kind.__module__].__package__
    assert room is not None
    for module in pkgutil.iter_modules(sys.modules[room].__path__):
        if not module.name.endswith("_triton"):
            importlib.import_module(f"{room}.{module.name}")


def _plain(name: str) -> str:
    """`wide_resnet` and `WideResNet` are one name."""
    return name.strip().replace("_", "").lower()


def split(text: str) -> list[str]:
    """At the commas that stand in no parentheses."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts] if text.strip() else []


def _arguments(kind: type, parts: Sequence[str], path: str) -> dict[str, str]:
    """Field -> what is written for it."""
    takes: dict[str, Field[Any]] = {field.name: field for field in fields(kind) if field.init}
    given: dict[str, str] = {}
    for number, part in enumerate(parts):
        named = re.fullmatch(r"(\w+)\s*=\s*(.*)", part, re.DOTALL)
        if named is None and (number >= len(takes) or len(given) < number or not part):
            raise ConfigError(f"{path}: {kind.__name__} takes {_listed(takes)}, not {part!r}")
        name, value = (named[1], named[2]) if named else (list(takes)[number], part)
        if name not in takes:
            raise ConfigError(f"{path}: {kind.__name__} has no {name!r}{suggest(name, takes)}")
        if name in given:
            raise ConfigError(f"{path}: {kind.__name__} is given {name!r} twice")
        given[name] = value
    for name, field in takes.items():
        if name not in given and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{path}: {kind.__name__} needs {name!r}: it takes {_listed(takes)}")
    return given


def _listed(takes: dict[str, Field[Any]]) -> str:
    return ", ".join(takes) or "nothing"
