"""What a JPEG says of itself before its pixels: enough to fill a table of sizes, and to sort out odd files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from loaders.errors import StoreError

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF markers (ITU T.81, table B.1)
_BARE = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a length
_APP1, _SCAN, _END = 0xE1, 0xDA, b"\xff\xd9"
_ORIENTATION = 0x0112  # EXIF 2.3, table 4
_EXIF = b"Exif\0\0"


class JpegFacts(NamedTuple):
    """`bits` a sample; `orientation` 1..8 as EXIF has it, 1 where it says nothing that makes sense."""

    height: int
    width: int
    components: int
    bits: int
    orientation: int
    has_end: bool


def jpeg_header(data: bytes) -> tuple[int, int, int]:
    """(height, width, components) from the frame header. Raises StoreError where there is none."""
    for marker, start, end in _segments(data):
        if marker in _FRAMES:
            return _frame(data, start, end)[:3]
    raise StoreError("a JPEG without a frame header")


def jpeg_facts(data: bytes) -> JpegFacts:
    """Reads all headers up to the first scan. Raises StoreError where there is no frame or no scan."""
    frame, orientation = None, 1
    for marker, start, end in _segments(data):
        if marker in _FRAMES and frame is None:
            frame = _frame(data, start, end)
        elif marker == _APP1 and data[start : start + len(_EXIF)] == _EXIF:
            orientation = exif_orientation(data[start + len(_EXIF) : end])
        elif marker == _SCAN and frame is not None:
            return JpegFacts(*frame, orientation, data.rfind(_END, end) >= 0)
    raise StoreError("a JPEG without a " + ("scan" if frame else "frame header"))


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, first byte, end) of the contents of each segment up to the first scan header, which is the last."""
    if data[:2] != b"\xff\xd8":
        raise StoreError("not a JPEG")
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in _BARE:
            at += 2
        else:
            end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
            yield marker, at + 4, end
            if marker == _SCAN:
                return
            at = max(end, at + 4)  # a length below 2 is damage


def _frame(data: bytes, start: int, end: int) -> tuple[int, int, int, int]:
    """(height, width, components, bits)"""
    bits, high, low, wide, narrow, components = data[start : start + 6].ljust(6, b"\0")
    height, width = high << 8 | low, wide << 8 | narrow
    if end > len(data) or not height or not width:
        raise StoreError("a JPEG without a size")
    return height, width, components, bits


def orientation_of(data: bytes) -> int:
    """The EXIF orientation, 1..8, of a JPEG; 1 of anything else. Costs microseconds: looking for EXIF's name among the
    bytes instead took as long as cutting a small crop."""
    try:
        return jpeg_facts(data).orientation
    except StoreError:
        return 1


def exif_orientation(tiff: bytes) -> int:
    """What EXIF data, which are laid out as a TIFF, say of the orientation: 1..8, 1 where that makes no sense."""
    order = {b"II": "little", b"MM": "big"}.get(tiff[:2])
    if order is None:
        return 1

    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], order)  # type: ignore[arg-type]

    table = number(4, 4)
    for entry in range(table + 2, min(table + 2 + 12 * number(table, 2), len(tiff) - 11), 12):
        if number(entry, 2) == _ORIENTATION:
            value = number(entry + 8, 2)
            return value if 1 <= value <= 8 else 1
    return 1
