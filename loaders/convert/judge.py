"""What becomes of an image file at conversion: kept as it is, made an RGB JPEG, or put on the quarantine list."""

from __future__ import annotations

import io
from dataclasses import dataclass
from enum import IntEnum

from PIL import Image

from loaders.errors import StoreError
from loaders.store.images import MAX_PIXELS, ImageError, TooManyPixels, open_image
from loaders.store.jpeg import jpeg_facts

MAX_BYTES = 1 << 26  # of one image file; ImageNet's largest has about 15 MiB
QUALITY = 95  # of images that have to be written anew
MAX_SIDE = 65500  # libjpeg's limit

_PNG, _GIF, _JPEG = b"\x89PNG\r\n\x1a\n", b"GIF8", b"\xff\xd8"
_UPRIGHT = {  # EXIF orientation -> what turns the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Outcome(IntEnum):
    """Stored in journals: never renumber. Up to REENCODED an image is in the set."""

    KEPT = 1
    WAS_CMYK = 2
    WAS_PNG = 3
    WAS_ROTATED = 4
    REENCODED = 5
    EMPTY = 16
    TOO_LARGE = 17
    NOT_AN_IMAGE = 18
    GIF = 19
    DEEP = 20
    BOMB = 21
    TRUNCATED = 22
    DAMAGED = 23
    TWICE = 24
    TOO_LARGE_ANEW = 25

    @property
    def in_set(self) -> bool:
        return self <= Outcome.REENCODED


SAID = {
    Outcome.KEPT: "kept byte for byte",
    Outcome.WAS_CMYK: "CMYK, now an RGB JPEG",
    Outcome.WAS_PNG: "PNG, now an RGB JPEG",
    Outcome.WAS_ROTATED: "EXIF-rotated, now an upright RGB JPEG",
    Outcome.REENCODED: "re-encoded as asked",
    Outcome.EMPTY: "no bytes",
    Outcome.TOO_LARGE: f"more than {MAX_BYTES} bytes",
    Outcome.NOT_AN_IMAGE: "neither JPEG nor PNG",
    Outcome.GIF: "GIF",
    Outcome.DEEP: "more than 8 bits a sample",
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


@dataclass(frozen=True)
class Verdict:
    """`anew` are the bytes to store in place of the file's; height and width are of what is stored, 0 of nothing."""

    outcome: Outcome
    height: int = 0
    width: int = 0
    anew: bytes | None = None


def judge(data: bytes, decode_check: bool = True, reencode: Reencode | None = None) -> Verdict:
    """Never raises: what cannot be used has an outcome. Without `decode_check` a file that needs no change is judged
    by its headers and its end marker alone."""
    if not data:
        return Verdict(Outcome.EMPTY)
    if len(data) > MAX_BYTES:
        return Verdict(Outcome.TOO_LARGE)
    if data.startswith(_GIF):
        return Verdict(Outcome.GIF)
    if data.startswith(_PNG):
        deep = data[24:25] > b"\x08"  # bit depth in IHDR; Pillow would quietly cut it to 8
        return Verdict(Outcome.DEEP) if deep else _write_anew(data, Outcome.WAS_PNG, 1, reencode)
    if not data.startswith(_JPEG):
        return Verdict(Outcome.NOT_AN_IMAGE)
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
        return _write_anew(data, Outcome.WAS_CMYK, facts.orientation, reencode)
    if facts.orientation != 1:
        return _write_anew(data, Outcome.WAS_ROTATED, facts.orientation, reencode)
    if reencode:
        return _write_anew(data, Outcome.REENCODED, 1, reencode)
    if facts.components not in (1, 3):
        return Verdict(Outcome.DAMAGED)
    if decode_check:
        try:
            with _decoded(data) as image:
                if image.size != (facts.width, facts.height):
                    return Verdict(Outcome.DAMAGED)
        except ImageError:
            return Verdict(Outcome.DAMAGED)
    return Verdict(Outcome.KEPT, facts.height, facts.width)


def _decoded(data: bytes) -> Image.Image:
    image = open_image(io.BytesIO(data))
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, OverflowError) as e:
        image.close()
        raise ImageError(str(e)) from e
    return image


def _write_anew(data: bytes, outcome: Outcome, orientation: int, reencode: Reencode | None) -> Verdict:
    try:
        with _decoded(data) as image:
            if max(image.size) > MAX_SIDE:
                return Verdict(Outcome.BOMB)
            rgb = image if image.mode == "L" and outcome is Outcome.REENCODED else image.convert("RGB")
            if orientation in _UPRIGHT:
                rgb = rgb.transpose(_UPRIGHT[orientation])
            scale = reencode.max_side / max(rgb.size) if reencode else 1.0
            if scale < 1:
                size = max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale))
                rgb = rgb.resize(size, Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            rgb.save(buffer, "JPEG", quality=reencode.quality if reencode else QUALITY, comment=b"")
    except TooManyPixels:
        return Verdict(Outcome.BOMB)
    except ImageError:
        return Verdict(Outcome.DAMAGED)
    return Verdict(outcome, rgb.height, rgb.width, buffer.getvalue())
