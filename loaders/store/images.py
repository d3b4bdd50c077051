"""Opening an image with Pillow, the careful way: few formats, a bounded size, no EXIF rotation, one kind of error."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG")
MAX_PIXELS = 1 << 26  # 200 MB decoded; below Pillow's own warning, which is not thread-safe to turn into an error


class ImageError(ValueError):
    """Not an image that can be used; the message says why."""


class TooManyPixels(ImageError):
    """A decompression bomb, by its header."""


def open_image(file: Path | io.BytesIO, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Read the header of an image of at most MAX_PIXELS pixels; the caller closes it. Raises ImageError."""
    try:
        image = Image.open(file, formats=formats)
    except UnidentifiedImageError:
        raise ImageError(f"not a {' or '.join(formats)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise TooManyPixels(str(e)) from e
    except (OSError, SyntaxError, ValueError) as e:
        raise ImageError(str(e)) from e
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise TooManyPixels(f"{image.width} x {image.height} pixels are more than the {MAX_PIXELS} allowed")
    return image
