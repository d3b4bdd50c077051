"""The reference renderer: Pillow decodes, Pillow resizes; any encoded source, no extras needed."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from loaders.errors import RenderError, StoreError
from loaders.plan.plan import Rows
from loaders.plan.views import Filter, RandomCrop, View
from loaders.renderers.resample import CODES, resize_boxes
from loaders.renderers.spread import spread
from loaders.store.images import ImageError, decode
from loaders.store.masks import Masks, mask_of
from loaders.store.source import EncodedSource
from loaders.timing import CROP, DECODE, FETCH, PhaseTimes, now

_RESAMPLING = {Filter.BILINEAR: Image.Resampling.BILINEAR, Filter.BICUBIC: Image.Resampling.BICUBIC}
_IMAGES_A_TASK = 2


class PilRenderer:
    """Renders an encoded source with the threads of `pool`, which it neither owns nor closes.

    Every image is decoded once for all its views, as RGB (grey and CMYK are converted) and upright, as its EXIF has it.

    A copy with a mask is cut from the whole image on a grey background, as its papers have it: mask, then crop, then
    resize. A mask carried through the crop as a fourth channel, to be laid over the finished crop, would be another
    thing: the filter has by then mixed background into the foreground's edge, and rounded both.
    """

    device_id: int | None = None

    def __init__(
        self,
        source: EncodedSource,
        pool: ThreadPoolExecutor,
        times: PhaseTimes | None = None,
        masks: Masks | None = None,
    ):
        self.source, self.pool, self.times, self.masks = source, pool, times or PhaseTimes(), masks

    def render(self, rows: Rows, out: Mapping[str, np.ndarray]) -> None:
        """Fill out[view name], uint8 [copies * B, S, S, 3], with the crops that `rows` describes, copy-major.

        Raises RenderError for an image that is damaged or not of the size its source says.
        """

        def work(begin: int, end: int) -> None:
            for b in range(begin, end):
                self.render_image(rows, b, out)

        spread(self.pool, work, len(rows.ids), _IMAGES_A_TASK)

    def render_image(self, rows: Rows, b: int, out: Mapping[str, np.ndarray]) -> None:
        """The share of `render` that is image `b` of `rows`."""
        image = self.decode(int(rows.ids[b]))
        begin = now()
        if rows.is_masked(b):
            assert self.masks is not None
            foreground = Image.fromarray(mask_of(self.masks, self.source, int(rows.ids[b])))
            begin = self.times.add(FETCH, begin)
        for v in rows.views:
            for row in range(b, len(v.boxes), len(rows.ids)):
                shown = image
                if v.greys is not None and v.greys[row] >= 0:
                    grey = Image.new("RGB", image.size, (int(v.greys[row]),) * 3)
                    shown = Image.composite(image, grey, foreground)
                out[v.view.name][row] = crop(shown, v.boxes[row], v.view)
        self.times.add(CROP, begin)

    def decode(self, i: int) -> Image.Image:
        """Image `i` as RGB. Raises RenderError."""
        try:
            begin = now()
            file = self.source.jpeg(i)
            begin = self.times.add(FETCH, begin)
            image, (height, width) = decode(file), self.source.sizes[i]
            if image.size != (width, height):
                raise ImageError(f"it is {image.width} x {image.height}, its source says {width} x {height}")
            self.times.add(DECODE, begin)
            return image
        except (StoreError, ImageError) as e:
            raise RenderError(f"image {i} ({self._name_of(i)}) of {self.source.name}: {e}", image_id=i) from e

    def _name_of(self, i: int) -> str:
        try:
            return self.source.name_of(i)
        except StoreError:  # whatever took the image may have taken its name
            return "name unreadable"


def crop(image: Image.Image, box: np.ndarray, view: View) -> Image.Image:
    """The part `box` of `image` scaled to the view's size: cut first for random crops, so that nothing beyond the box
    shows; else scaled in place, as if the whole image had been."""
    if view.filter not in _RESAMPLING:  # Pillow always antialiases
        pixels, out = np.array(image)[None], np.empty((1, view.size, view.size, 3), np.uint8)
        cut_first = isinstance(view.crop, RandomCrop)
        resize_boxes(pixels, np.zeros(1, np.int64), box[None], cut_first, CODES[view.filter], out)
        return Image.fromarray(out[0])
    size, filter = (view.size, view.size), _RESAMPLING[view.filter]
    x0, y0, x1, y1 = box.tolist()
    if isinstance(view.crop, RandomCrop):
        return image.crop((int(x0), int(y0), int(x1), int(y1))).resize(size, filter)
    return image.resize(size, filter, box=(x0, y0, x1, y1))
