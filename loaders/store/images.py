"""Opening an image with Pillow, the careful way: few formats, a bounded size, one kind of error; and making of any of
them what the project trains on: upright RGB of 8 bits."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from loaders.errors import StoreError
from loaders.store.jpeg import exif_orientation, jpeg_facts

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")
SUFFIXES = (".jpeg", ".jpg", ".jpe", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")
MAX_PIXELS = 1 << 26  # 200 MB decoded; below Pillow's own warning, which is not thread-safe to turn into an error

_READ = "JPEG, PNG, WebP, TIFF, BMP or GIF"
_HEAD_BYTES = 1 << 13  # holds the headers of most JPEGs; the rest is read where it does not
_DEEP_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
_MAX_CHANNELS = 4  # colours and alpha, or CMYK
_TIFF_BITS = 10 + 9 * 12 + 4  # where `as_tiff` says how many bits a sample has: after header, nine tags and an end
_UPRIGHT = {  # EXIF orientation -> what turns the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """Not an image that can be used; the message says why."""


class NotAnImage(ImageError):
    """Of none of the formats."""


class TooManyPixels(ImageError):
    """A decompression bomb, by its header."""


class OddSamples(ImageError):
    """An image, but not of samples or channels that can be made RGB of 8 bits."""


class Header(NamedTuple):
    """What is known of an image before its pixels: its upright size, the EXIF orientation, 1..8, that it is stored in,
    and which of FORMATS it is. Formats whose pixels Pillow itself turns (TIFF) count as stored upright."""

    height: int
    width: int
    orientation: int
    form: str


def open_image(file: Path | io.BytesIO, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Read the header of an image of at most MAX_PIXELS pixels; the caller closes it. Raises ImageError."""
    try:
        image = Image.open(file, formats=formats)
    except UnidentifiedImageError:
        raise _unidentified(file, formats) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise TooManyPixels(str(e)) from e
    except (OSError, SyntaxError, ValueError) as e:
        raise ImageError(getattr(e, "strerror", None) or str(e)) from e
    try:
        if image.width * image.height > MAX_PIXELS:
            raise TooManyPixels(f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS} allowed")
        _check_samples(image)
    except ImageError:
        image.close()
        raise
    return image


def header_of(path: Path) -> Header:
    """The header of an image file. Raises ImageError."""
    try:
        with open(path, "rb", buffering=0) as file:
            head = file.read(_HEAD_BYTES)
            return header_of_bytes(head, lambda: head + file.read()) if head else header_of_bytes(b"")
    except OSError as e:
        raise ImageError(f"cannot be read: {e.strerror}") from e


def header_of_bytes(head: bytes, whole: object = None) -> Header:
    """The header of an image that begins with `head`; `whole` is called for all of its bytes where that is too little
    (None: it is the whole). Raises ImageError."""
    if not head:
        raise ImageError("it is empty")
    if head[:2] == b"\xff\xd8":
        try:
            return _jpeg_header(head)
        except StoreError:  # in the rest, or damaged
            pass
    data = whole() if callable(whole) else head
    if data[:2] == b"\xff\xd8":
        try:
            return _jpeg_header(data)
        except StoreError as e:
            raise ImageError(str(e)) from None
    with open_image(io.BytesIO(data)) as image:
        orientation = _orientation(image)
        height, width, form = image.height, image.width, image.format or ""
    sides = (width, height) if orientation > 4 else (height, width)
    return Header(*sides, orientation, form)


def _jpeg_header(data: bytes) -> Header:
    facts = jpeg_facts(data)
    if facts.height * facts.width > MAX_PIXELS:
        raise TooManyPixels(f"{facts.width} x {facts.height} pixels are more than the {MAX_PIXELS} allowed")
    sides = (facts.width, facts.height) if facts.orientation > 4 else (facts.height, facts.width)
    return Header(*sides, facts.orientation, "JPEG")


def decode(data: bytes, keep_grey: bool = False, least: tuple[int, int] | None = None) -> Image.Image:
    """An image of any of FORMATS, of several frames the first, as RGB of 8 bits and upright. Alpha is dropped, as
    Pillow's `convert("RGB")` does; of 16 bits a sample the high byte stays. With `keep_grey` a grey image stays one;
    with `least` (width, height) it may be smaller, no smaller than that, where that costs less. Raises ImageError."""
    with open_image(io.BytesIO(data)) as image:
        try:
            if least is not None:
                image.draft(None, least)
            return _upright(image, keep_grey)
        except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, OverflowError) as e:
            raise e if isinstance(e, ImageError) else ImageError(str(e)) from e


def _upright(image: Image.Image, keep_grey: bool) -> Image.Image:
    orientation = _orientation(image)
    image.load()
    shown = image
    if image.mode in _DEEP_MODES:
        shown = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    elif image.mode in ("P", "PA"):
        image.info.pop("transparency", None)  # or Pillow warns of what is dropped all the same
    if not (keep_grey and shown.mode == "L"):
        shown = shown.convert("RGB")
    return shown.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else shown


def as_tiff(pixels: bytes, height: int, width: int) -> bytes:
    """RGB pixels of 8 bits, row by row, as an image file that any decoder reads: a TIFF (6.0) in one strip."""
    tags = (  # number, type (3 short, 4 long), count, value; BitsPerSample's three stand behind the table
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, _TIFF_BITS), (259, 3, 1, 1), (262, 3, 1, 2),
        (273, 4, 1, _TIFF_BITS + 6), (277, 3, 1, 3), (278, 4, 1, height), (279, 4, 1, len(pixels)),
    )  # fmt: skip
    table = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + table + struct.pack("<IHHH", 0, 8, 8, 8) + pixels


def _orientation(image: Image.Image) -> int:
    """As the header has it; to be asked before the pixels are loaded, which may add more of what a file says."""
    exif = image.info.get("exif", b"") if image.format != "TIFF" else b""
    return exif_orientation(exif.removeprefix(b"Exif\0\0"))


def _check_samples(image: Image.Image) -> None:
    if image.mode in ("I", "F"):
        raise OddSamples("samples of 32 bits; 8 and 16 are read")
    if image.format == "TIFF" and (channels := _tiff_channels(image)) > _MAX_CHANNELS:
        raise OddSamples(f"{channels} channels; images of 1 (grey), 3 (RGB) or 4 (with alpha, or CMYK) are read")


def _tiff_channels(image: Image.Image) -> int:
    return int(image.tag_v2.get(277, 1))  # type: ignore[attr-defined]  # SamplesPerPixel


def _unidentified(file: Path | io.BytesIO, formats: tuple[str, ...]) -> ImageError:
    """Why Pillow does not know a file: a TIFF of more channels than it reads is one, too."""
    if isinstance(file, io.BytesIO):
        head = file.getvalue()[: 1 << 20]
    else:
        with open(file, "rb") as opened:
            head = opened.read(1 << 20)
    order = {b"II*\0": "little", b"MM\0*": "big"}.get(head[:4])
    if order and "TIFF" in formats:
        table = int.from_bytes(head[4:8], order)  # type: ignore[arg-type]
        count = int.from_bytes(head[table : table + 2], order)  # type: ignore[arg-type]
        for at in range(table + 2, min(table + 2 + 12 * count, len(head) - 11), 12):
            if int.from_bytes(head[at : at + 2], order) == 277:  # type: ignore[arg-type]
                channels = int.from_bytes(head[at + 8 : at + 10], order)  # type: ignore[arg-type]
                if channels > 1:
                    return OddSamples(f"a TIFF of {channels} channels that Pillow does not read; 1, 3 or 4 are wanted")
        return OddSamples("a TIFF whose samples Pillow does not read")
    if not head:
        return ImageError("it is empty")
    return NotAnImage(f"not a {_READ if formats == FORMATS else ' or '.join(formats)}")
