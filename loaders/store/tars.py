"""Where the files in a tar archive lie. Headers alone are read, nothing is extracted, and no name becomes a path.

Source: POSIX.1-2017, pax interchange format. A reader of our own, because the standard library's trusts the lengths
of extended headers, which a damaged archive may give as terabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from loaders.errors import StoreError

BLOCK = 512
_MAX_EXTENDED = 1 << 20
_KINDS = {b"0": "file", b"\0": "file", b"7": "file", b"1": "hard link", b"2": "symbolic link", b"5": "folder"}

Read = Callable[[int, int], bytes]
"""(offset, size) -> at most that many bytes of the archive."""


class Member(NamedTuple):
    name: str
    kind: str
    offset: int
    size: int
    mtime: int


def members(read: Read, start: int, end: int, where: str) -> Iterator[Member]:
    """The members of the archive in bytes start..end. Raises StoreError, naming `where`, on damage or a cut."""
    at, long_name = start, None
    while at < end:
        header = read(at, BLOCK)
        if len(header) < BLOCK or at + BLOCK > end:
            raise StoreError(f"{where}: cut short at byte {at}")
        if not any(header):  # end of the archive
            return
        if _number(header[148:156]) != sum(header[:148]) + 8 * 32 + sum(header[156:]):
            raise StoreError(f"{where}: damaged, or not a tar archive: no header at byte {at}")
        size, offset = _number(header[124:136]), at + BLOCK
        if size > end - offset:
            raise StoreError(f"{where}: cut short: a member of {size} bytes begins at byte {at}")
        kind = header[156:157]
        at = offset + size + -size % BLOCK
        if kind in b"xL":
            if size > _MAX_EXTENDED:
                raise StoreError(f"{where}: damaged: a name of {size} bytes at byte {offset}")
            found = read(offset, size)
            long_name = _pax_path(found, where) if kind == b"x" else _text(found)
            continue
        if kind in b"12":  # some archivers give links the size of what they point to, without its bytes
            at = offset
        prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
        short_name = f"{prefix}/{_text(header[:100])}" if prefix else _text(header[:100])
        yield Member(long_name or short_name, _KINDS.get(kind, "special"), offset, size, _number(header[136:148]))
        long_name = None


def _number(field: bytes) -> int:
    """Octal text, or base 256 where the first bit is set. Nonsense becomes a number that no archive can hold."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & (1 << (8 * len(field) - 1)) - 1
    try:
        return int(field.strip(b" \0") or b"0", 8) if b"-" not in field else 1 << 63
    except ValueError:
        return 1 << 63


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "backslashreplace")


def _pax_path(data: bytes, where: str) -> str | None:
    """The name in an extended header: records `LENGTH key=value\\n`."""
    path = None
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not len(length) < int(length[:9]) <= len(data):
            raise StoreError(f"{where}: damaged: an extended header that is none")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        if key == b"size":
            raise StoreError(f"{where}: a member with its size in an extended header; ImageNet's archives have none")
        if key == b"path":
            path = _text(value)
        data = data[int(length) :]
    return path
