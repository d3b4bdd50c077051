"""What becomes of an image file at conversion: kept as it is, made an RGB JPEG, or put on the quarantine list."""

from __future__ import annotations

import io
from dataclasses import dataclass
from enum import IntEnum

from PIL import Image

from loaders.errors import StoreError
from loaders.store.images import (
    MAX_PIXELS,
    ImageError,
    NotAnImage,
    OddSamples,
    TooManyPixels,
    decode,
    header_of_bytes,
    open_image,
)
from loaders.store.jpeg import jpeg_facts

MAX_BYTES = 1 << 26  # of one image file; ImageNet's largest has about 15 MiB
QUALITY = 95  # of images that have to be written anew
MAX_SIDE = 65500  # libjpeg's limit

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"


class Outcome(IntEnum):
    """Stored in journals: never renumber. Below EMPTY an image is in the set."""

    KEPT = 1
    WAS_CMYK = 2
    WAS_PNG = 3
    WAS_ROTATED = 4
    REENCODED = 5
    WAS_OTHER = 6
    EMPTY = 16
    TOO_LARGE = 17
    NOT_AN_IMAGE = 18
    DEEP = 20
    BOMB = 21
    TRUNCATED = 22
    DAMAGED = 23
    TWICE = 24
    TOO_LARGE_ANEW = 25

    @property
    def in_set(self) -> bool:
        return self < Outcome.EMPTY


SAID = {
    Outcome.KEPT: "kept byte for byte",
    Outcome.WAS_CMYK: "CMYK, now an RGB JPEG",
    Outcome.WAS_PNG: "PNG, now an RGB JPEG",
    Outcome.WAS_ROTATED: "EXIF-rotated, now an upright RGB JPEG",
    Outcome.REENCODED: "re-encoded as asked",
    Outcome.WAS_OTHER: "WebP, TIFF, BMP or GIF, now an RGB JPEG",
    Outcome.EMPTY: "no bytes",
    Outcome.TOO_LARGE: f"more than {MAX_BYTES} bytes",
    Outcome.NOT_AN_IMAGE: "not a JPEG, PNG, WebP, TIFF, BMP or GIF",
    Outcome.DEEP: "samples or channels that are not read",
    Outcome.BOMB: f"more than {MAX_PIXELS} pixels, or a side beyond {MAX_SIDE}",
    Outcome.TRUNCATED: "truncated",
    Outcome.DAMAGED: "damaged: it does not decode",
    Outcome.TWICE: "a second file of this name",
    Outcome.TOO_LARGE_ANEW: "its RGB JPEG does not fit a page",
}


@dataclass(frozen=True)
class Reencode:
    """Every image anew: JPEG quality, and the longer side in pixels above which an image is made smaller."""

    quality: int
    max_side: int

    @property
    def said(self) -> str:
        return f"no side longer than {self.max_side}, JPEG of quality {self.quality}"


@dataclass(frozen=True)
class Verdict:
    """`anew` are the bytes to store in place of the file's; height and width are of what is stored, 0 of nothing."""

    outcome: Outcome
    height: int = 0
    width: int = 0
    anew: bytes | None = None


def scaled(width: int, height: int, max_side: int) -> tuple[int, int]:
    """(width, height) of an image that is made smaller until no side is longer than `max_side`."""
    scale = max_side / max(width, height)
    return (max(1, round(width * scale)), max(1, round(height * scale))) if scale < 1 else (width, height)


def judge(data: bytes, decode_check: bool = True, reencode: Reencode | None = None) -> Verdict:
    """Never raises: what cannot be used has an outcome. Without `decode_check` a file that needs no change is judged
    by its headers and its end marker alone."""
    if not data:
        return Verdict(Outcome.EMPTY)
    if len(data) > MAX_BYTES:
        return Verdict(Outcome.TOO_LARGE)
    if not data.startswith(_JPEG):
        return _write_anew(data, Outcome.WAS_PNG if data.startswith(_PNG) else Outcome.WAS_OTHER, reencode)
    try:
        facts = jpeg_facts(data)
    except StoreError:
        return Verdict(Outcome.TRUNCATED if b"\xff\xd9" not in data[-2:] else Outcome.DAMAGED)
    if facts.bits != 8:
        return Verdict(Outcome.DEEP)
    if facts.height * facts.width > MAX_PIXELS or max(facts.height, facts.width) > MAX_SIDE:
        return Verdict(Outcome.BOMB)
    if not facts.has_end:  # Pillow decodes a file that lacks a little at its end without a word
        return Verdict(Outcome.TRUNCATED)
    if facts.components == 4:
        return _write_anew(data, Outcome.WAS_CMYK, reencode)
    if facts.orientation != 1:
        return _write_anew(data, Outcome.WAS_ROTATED, reencode)
    if reencode:
        return _write_anew(data, Outcome.REENCODED, reencode)
    if facts.components not in (1, 3):
        return Verdict(Outcome.DAMAGED)
    if decode_check and not _decodes(data, facts.width, facts.height):
        return Verdict(Outcome.DAMAGED)
    return Verdict(Outcome.KEPT, facts.height, facts.width)


def _decodes(data: bytes, width: int, height: int) -> bool:
    try:
        with open_image(io.BytesIO(data)) as image:
            image.load()
            return image.size == (width, height)
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, OverflowError):
        return False


def _write_anew(data: bytes, outcome: Outcome, reencode: Reencode | None) -> Verdict:
    """As an upright RGB JPEG; one that was grey and is re-encoded stays grey."""
    try:
        if max(header_of_bytes(data)[:2]) > MAX_SIDE:
            return Verdict(Outcome.BOMB)
        rgb = decode(data, keep_grey=outcome is Outcome.REENCODED)
    except TooManyPixels:
        return Verdict(Outcome.BOMB)
    except OddSamples:
        return Verdict(Outcome.DEEP)
    except NotAnImage:
        return Verdict(Outcome.NOT_AN_IMAGE)
    except ImageError:
        return Verdict(Outcome.DAMAGED)
    size = scaled(rgb.width, rgb.height, reencode.max_side) if reencode else rgb.size
    if size != rgb.size:
        rgb = rgb.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    rgb.save(buffer, "JPEG", quality=reencode.quality if reencode else QUALITY, comment=b"")
    return Verdict(outcome, rgb.height, rgb.width, buffer.getvalue())
