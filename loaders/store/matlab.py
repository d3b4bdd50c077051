"""The arrays in a MATLAB 5 file, as far as published data sets need them: structs of numbers and text, and numbers.

Source: MAT-File Format, version 5 (MathWorks). Lengths are checked before anything is allocated.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np

from loaders.errors import StoreError

_MAX_BYTES = 1 << 26
_COMPRESSED, _MATRIX = 15, 14
_STRUCT, _CHAR = 2, 4
_NUMERIC = range(6, 16)  # double, single, and integers of 8 to 64 bits
_NUMBERS = {
    **{1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"},
    **{16: "u1", 17: "u2"},  # text
}
# what wrong lengths, types and values end in: unpacking, next() in and out of a generator, chr()
_DAMAGE = (struct.error, zlib.error, StopIteration, RuntimeError, LookupError, ValueError, TypeError, OverflowError)

T = TypeVar("T")
Value = str | float | None
"""Text (ASCII, else its bytes), a number (the first of an array), or None: empty, or of a kind not needed here."""


def structs(data: bytes, name: str) -> list[dict[str, Value]]:
    """The struct array called `name`, as a list of field -> value. Raises StoreError where it is not there."""
    return _find(data, name, _struct_array, "array of structs")


def numbers(data: bytes, name: str) -> np.ndarray:
    """The numeric array called `name`, flat, column by column. Raises StoreError where it is not there."""
    return _find(data, name, _numeric_array, "array of numbers")


def _find(data: bytes, name: str, read: Callable[[bytes, str, str], T | None], what: str) -> T:
    order = {b"IM": "<", b"MI": ">"}.get(data[126:128])
    if order is None:
        raise StoreError("not a MATLAB 5 file")
    try:
        for kind, body in _elements(data[128:], order):
            if kind == _COMPRESSED:
                unpacked = zlib.decompressobj().decompress(body, _MAX_BYTES)
                kind, body = next(_elements(unpacked, order))
            if kind == _MATRIX and (found := read(body, order, name)) is not None:
                return found
    except _DAMAGE as e:
        raise StoreError(f"a damaged MATLAB file ({type(e).__name__})") from e
    raise StoreError(f"no {what} called {name!r}")


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """(type, contents) of each data element; those of up to four bytes share the word of their tag."""
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from(order + "II", data, at)
        if kind >> 16:
            kind, size = kind & 0xFFFF, kind >> 16
            yield kind, data[at + 4 : at + 4 + min(size, 4)]
            at += 8
            continue
        if size > len(data) - at - 8:
            raise ValueError("an element ends beyond the file")
        yield kind, data[at + 8 : at + 8 + size]
        at += 8 + (size if kind == _COMPRESSED else size + -size % 8)


def _class_and_name(parts: Iterator[tuple[int, bytes]], order: str) -> tuple[int, str]:
    """Of an array, from its first three elements; the contents follow."""
    (_, flags), _, (_, name) = next(parts), next(parts), next(parts)
    return flags[0 if order == "<" else 3], name.decode("latin-1")


def _numeric_array(body: bytes, order: str, wanted: str) -> np.ndarray | None:
    parts = _elements(body, order)
    kind_of_array, name = _class_and_name(parts, order)
    if kind_of_array not in _NUMERIC or name != wanted:
        return None
    kind, contents = next(parts)
    return np.frombuffer(contents, np.dtype(order + _NUMBERS[kind]))


def _struct_array(body: bytes, order: str, wanted: str) -> list[dict[str, Value]] | None:
    parts = _elements(body, order)
    if _class_and_name(parts, order) != (_STRUCT, wanted):
        return None
    (_, width_i4), (_, names) = next(parts), next(parts)
    (width,) = struct.unpack_from(order + "i", width_i4)
    if not 0 < width <= 1024:
        raise ValueError("no field names")
    fields = [names[k : k + width].split(b"\0")[0].decode("latin-1") for k in range(0, len(names), width)]
    values = [_value(b, order) if kind == _MATRIX else None for kind, b in parts]
    if not fields or len(values) % len(fields):
        raise ValueError("fields are missing")
    rows = range(0, len(values), len(fields))
    return [dict(zip(fields, values[k : k + len(fields)], strict=True)) for k in rows]


def _value(body: bytes, order: str) -> Value:
    if not body:
        return None
    parts = list(_elements(body, order))
    if len(parts) < 4 or parts[3][0] not in _NUMBERS:
        return None
    kind, contents = parts[3]
    numbers = np.frombuffer(contents, np.dtype(order + _NUMBERS[kind]))
    if parts[0][1][0 if order == "<" else 3] == _CHAR:
        return "".join(map(chr, numbers.tolist()))
    return float(numbers[0]) if len(numbers) else None
