"""The default renderer: simplejpeg's libjpeg-turbo and our resampler, both without the GIL.

simplejpeg is a small wheel that carries libjpeg-turbo 3. It decodes into a buffer of ours, with the accurate DCT and
smooth upsampling that Pillow also asks for, so decoded pixels are Pillow's to the bit, and so are the crops. What it
does not decode without complaint as an RGB or grey image of the expected size, upright (PNG, CMYK, damage), goes to the
`pil` renderer, which renders it or names it in its error.

Images that are stored decoded are cut from the buffer that they are read into, and from nothing else.

Between two images stand a few tens of microseconds of Python (`benchmarks.loader` reports them): they are all that
many threads wait for each other.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from simplejpeg import decode_jpeg

from loaders.errors import StoreError
from loaders.plan.plan import Rows
from loaders.plan.views import RandomCrop
from loaders.renderers.jpegs import NO_MASK, JpegRenderer
from loaders.renderers.resample import CODES, resize_copies
from loaders.renderers.spread import spread
from loaders.store.images import MAX_PIXELS
from loaders.store.jpeg import jpeg_facts
from loaders.store.source import holds_pixels
from loaders.timing import CROP, DECODE, FETCH, now

_IMAGES_A_TASK = 4  # about 6 ms
_KEPT_BYTES = 3 << 22  # a thread's own buffer; larger images get one for the moment
_UPRIGHT, _BITS, _COLOURS = 1, 8, (1, 3)  # components; not those of CMYK and YCCK


class Crops:
    """Where the crops of a step's images go, looked up once a step: `cut` is all that is left to do an image."""

    def __init__(self, rows: Rows, out: Mapping[str, np.ndarray]):
        self.num_images = len(rows.ids)
        self.views = [
            (
                np.ascontiguousarray(v.boxes),
                np.full(len(v.boxes), -1, np.int16) if v.greys is None else v.greys,
                isinstance(v.view.crop, RandomCrop),
                CODES[v.view.filter],
                out[v.view.name],
            )
            for v in rows.views
        ]

    def cut(self, image: np.ndarray, b: int, mask: np.ndarray = NO_MASK) -> None:
        """All crops of image `b` of the step, uint8 [H, W, 3], whose foreground is `mask`, bool [H, W]."""
        for boxes, greys, cut_first, filter, out in self.views:
            resize_copies(image, mask, boxes, greys, cut_first, filter, b, self.num_images, out)


class TurboRenderer(JpegRenderer):
    """Renders an encoded source with the threads of `pool`, which it neither owns nor closes.

    Every image is decoded once for all its views; pixels are those of `PilRenderer`.
    """

    def render(self, rows: Rows, out: Mapping[str, np.ndarray]) -> None:
        """Fill out[view name], uint8 [copies * B, S, S, 3], with the crops that `rows` describes, copy-major.

        Raises RenderError for an image that is damaged or not of the size its source says.
        """
        crops, ids, sizes = Crops(rows, out), rows.ids.tolist(), self.source.sizes[rows.ids].tolist()

        def work(begin: int, end: int) -> None:
            buffer = self._taken(lambda: np.empty(_KEPT_BYTES, np.uint8))
            for b in range(begin, end):
                height, width = sizes[b]
                start = now()
                image = self._pixels(ids[b], buffer)
                if image is None:
                    file = self._file(ids[b])
                    start = self.times.add(FETCH, start)
                    image = _decoded(file, height, width, buffer)
                    start = self.times.add(DECODE, start)
                else:
                    start = self.times.add(FETCH, start)
                if image is None:
                    self.render_image(rows, b, out)
                else:
                    crops.cut(image, b, self._mask(rows, b))
                    self.times.add(CROP, start)
            self._idle.append(buffer)

        spread(self.pool, work, len(ids), _IMAGES_A_TASK)

    def _pixels(self, i: int, buffer: np.ndarray) -> np.ndarray | None:
        """Image `i` where it is stored decoded; None also where it cannot be read, so that the `pil` renderer says
        why."""
        try:
            return self.source.read_pixels(i, buffer) if holds_pixels(self.source) else None
        except StoreError:
            return None


def _decoded(file: bytes, height: int, width: int, buffer: np.ndarray) -> np.ndarray | None:
    """A JPEG as RGB, uint8 [height, width, 3], in `buffer` or in one of its own; None where it is none, of another
    size, too large, of other colours, not upright, or damaged."""
    try:
        facts = jpeg_facts(file)
        if (facts.height, facts.width, facts.orientation, facts.bits) != (height, width, _UPRIGHT, _BITS):
            return None
        if facts.components not in _COLOURS or height * width > MAX_PIXELS:
            return None
        room = buffer if height * width * 3 <= len(buffer) else np.empty(height * width * 3, np.uint8)
        image: np.ndarray = decode_jpeg(file, "RGB", buffer=room)
        return image
    except (StoreError, ValueError):
        return None
