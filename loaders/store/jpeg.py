"""What a JPEG says of itself in its header: enough to fill a table of sizes without decoding."""

from __future__ import annotations

from loaders.errors import StoreError

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF markers (ITU T.81, table B.1)
_BARE = frozenset({0x01, *range(0xD0, 0xD9)})  # markers without a length


def jpeg_header(data: bytes) -> tuple[int, int, int]:
    """(height, width, components) from the frame header. Raises StoreError where there is none."""
    if data[:2] != b"\xff\xd8":
        raise StoreError("not a JPEG")
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in _BARE:
            at += 2
        elif marker in _FRAMES:
            height, width = int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
            if not height or not width:
                raise StoreError("a JPEG without a size")
            return height, width, data[at + 9]
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    raise StoreError("a JPEG without a frame header")
