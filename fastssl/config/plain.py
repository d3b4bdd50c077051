"""Values as plain ones, ready for JSON, and strictly back again: what a run wrote is read here, also by later code.

Dataclasses carry their type's full name, `module:Qualname`, so that a reader needs no list of what there may be.
"""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any

from fastssl.config.modules import OURS
from fastssl.config.names import suggest
from fastssl.config.old_names import todays, type_today
from fastssl.errors import ConfigError


def to_plain(value: Any) -> Any:
    """Dataclasses, tuples, enums and paths as JSON-ready dicts, lists and strings; dataclasses carry their type."""
    if is_dataclass(value) and not isinstance(value, type):
        return {"type": type_name(type(value)), **{f.name: to_plain(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [to_plain(v) for v in value]
    if isinstance(value, Enum):
        return to_plain(value.value)
    if isinstance(value, Path):
        return str(value)
    return value


def type_name(kind: type) -> str:
    """`fastssl.nn.encoders.resnet:ResNet`."""
    return f"{kind.__module__}:{kind.__qualname__}"


def short_name(name: str) -> str:
    """`ResNet`, of a full name or of an old, bare one."""
    return name.rpartition(":")[2]


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Dotted paths at which two plain forms differ, each as `path: old -> new`."""
    if isinstance(old, list) and isinstance(new, list):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return found
    return [] if old == new else [f"{path}: {old} -> {new}"]


# --------------------------------------------------------------------------------------------------------- and back


@dataclass
class Notes:
    """What was read otherwise than it stands there: each kind once, however often it stands there.

    assumed   "PawsConfig.gather" -> the default that the field has today and that was not written then
    replaced  "PawsConfig.lr_peak" -> what stands in its place today
    """

    assumed: dict[str, str] = field(default_factory=dict)
    replaced: dict[str, str] = field(default_factory=dict)

    def lines(self, source: object) -> list[str]:
        """At most a line for each of the two, for the user who has `source`."""
        told = []
        if self.assumed:
            told.append(f"{source} does not say {_listed(self.assumed, '{} ({} is assumed)')}")
        if self.replaced:
            told.append(f"{source} has settings of an earlier fastssl: {_listed(self.replaced, '{} is now {}')}")
        return told


def _listed(pairs: Mapping[str, str], how: str) -> str:
    return ", ".join(how.format(*pair) for pair in pairs.items())


def from_plain(kind: Any, plain: Any, notes: Notes | None = None, path: str = "") -> Any:
    """The value of type `kind`, a type or an annotation, that `to_plain` wrote down, before or after it went through
    JSON. Strict about types, names and values; what earlier commits wrote is read by `fastssl.config.old_names`, and a
    field that is not there takes its default: `notes` is told of both. `path` is where `plain` stands, for messages.

    Raises ConfigError. Imports no module but our own: types of other ones are known once their modules are loaded.
    """
    notes = Notes() if notes is None else notes
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _one_of(arguments, plain, notes, path)
    if origin is typing.Literal:
        if not any(plain == value and type(plain) is type(value) for value in arguments):
            raise _wrong(path, plain, f"one of {', '.join(map(str, arguments))}")
        return plain
    if origin in (tuple, list):
        return origin(_items(arguments, plain, notes, path))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(plain, dict):
            raise _wrong(path, plain, "values by name")
        return {key: from_plain(arguments[1], each, notes, f"{path}.{key}") for key, each in plain.items()}
    if isinstance(plain, dict):
        return _structure(kind, plain, notes, path)
    if kind is Any or kind is object:
        return plain
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _made(lambda: kind(plain), path)
    if kind is Path and isinstance(plain, str):
        return Path(plain)
    if kind is float and type(plain) is int:  # JSON does not tell 1 from 1.0, and nor do those who write recipes
        return plain
    if type(plain) is kind:
        return plain
    raise _wrong(path, plain, _noun(kind))


def _one_of(kinds: tuple[Any, ...], plain: Any, notes: Notes, path: str) -> Any:
    """The value of whichever of `kinds` it is."""
    if isinstance(plain, dict) and "type" in plain:
        found = _class_of(plain, path)
        if any(_may_be(found, kind) for kind in kinds):
            return _structure(found, plain, notes, path)
        plain = short_name(plain["type"])
    for kind in kinds:
        with suppress(ConfigError):
            return from_plain(kind, plain, notes, path)
    raise _wrong(path, plain, " or ".join(map(_noun, kinds)))


def _items(kinds: tuple[Any, ...], plain: Any, notes: Notes, path: str) -> Iterator[Any]:
    if not isinstance(plain, list | tuple):
        raise _wrong(path, plain, "a list")
    if kinds[-1:] == (Ellipsis,) or len(kinds) == 1:
        kinds = (kinds[0],) * len(plain)
    if len(kinds) != len(plain):
        raise _wrong(path, plain, f"a list of {len(kinds)}")
    for i, (kind, each) in enumerate(zip(kinds, plain, strict=True)):
        yield from_plain(kind, each, notes, f"{path}.{i}" if path else str(i))


def _structure(kind: Any, plain: Mapping[str, Any], notes: Notes, path: str) -> Any:
    """A dataclass, built from its fields."""
    actual = _class_of(plain, path)
    if not _may_be(actual, kind):
        raise _wrong(path, short_name(plain["type"]), _noun(kind))
    name = short_name(type_name(actual))
    given, replaced = todays(type_name(actual), {key: value for key, value in plain.items() if key != "type"})
    notes.replaced |= {f"{name}.{old}": new for old, new in replaced.items()}
    known = {f.name: f for f in fields(actual) if f.init}
    if unknown := sorted(given.keys() - known.keys()):
        raise ConfigError(f"{_at(path)}{name} has no {unknown[0]!r}{suggest(unknown[0], known)}")
    for missing in (each for each in known.values() if each.name not in given):
        notes.assumed[f"{name}.{missing.name}"] = _default(missing, f"{_at(path)}{name}")
    hints = typing.get_type_hints(actual)
    values = {key: from_plain(hints[key], given[key], notes, f"{path}.{key}" if path else key) for key in given}
    return _made(lambda: actual(**values), path)


def _default(missing: Field[Any], where: str) -> str:
    """The default in words. Raises ConfigError where there is none."""
    if missing.default is not MISSING:
        return str(missing.default)
    if missing.default_factory is not MISSING:
        return str(missing.default_factory())
    raise ConfigError(f"{where} lacks {missing.name!r}, which has no default")


def _class_of(plain: Mapping[str, Any], path: str) -> type:
    """The dataclass that `plain` names. Raises ConfigError."""
    written = plain.get("type")
    if not isinstance(written, str):
        raise _wrong(path, dict(plain), "a structure with its type")
    module, colon, qualname = type_today(written).partition(":")
    found: Any = _module(module, path) if colon else None
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, type) or not is_dataclass(found):
        raise ConfigError(f"{_at(path)}there is no {written!r} in this fastssl")
    return found


def _module(name: str, path: str) -> types.ModuleType | None:
    """The module, None where we have none of that name. One of others must be loaded already: to read a file is no
    reason to run what it names."""
    if name.partition(".")[0] in OURS and "_" not in (part[:1] for part in name.split(".")):  # `__main__` would run
        try:
            return import_module(name)
        except ModuleNotFoundError:
            return None
    if name not in sys.modules:
        raise ConfigError(f"{_at(path)}it is of the module {name}, which is not loaded")
    return sys.modules[name]


def _may_be(actual: type, kind: Any) -> bool:
    """Whether a value of the class `actual` may stand where `kind` is asked for."""
    if getattr(kind, "_is_protocol", False):
        asked = {name for name in (*vars(kind), *kind.__annotations__) if name[0] != "_"}
        return all(hasattr(actual, name) or name in (f.name for f in fields(actual)) for name in asked)
    return kind in (Any, object) or (isinstance(kind, type) and issubclass(actual, kind))


def _made(make: Callable[[], Any], path: str) -> Any:
    try:
        return make()
    except ValueError as error:  # what a description says of values that it cannot hold; ConfigError is one
        raise ConfigError(f"{_at(path)}{error}") from None


def _noun(kind: Any) -> str:
    nouns = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "nothing"}
    return nouns.get(kind) or str(getattr(kind, "__name__", kind))


def _wrong(path: str, plain: Any, wanted: str) -> ConfigError:
    return ConfigError(f"{_at(path)}{plain!r} stands where {wanted} is needed")


def _at(path: str) -> str:
    return f"{path}: " if path else ""
