"""The fast renderer on CPU: the libturbojpeg that FFCV links, and our resampler, without the GIL.

One compiled call takes a stretch of images from JPEG bytes to all their crops, on one core. FFCV's own imdecode asks
for the fast DCT and its resize averages areas, up to 5/255 from Pillow; with the accurate DCT the decoded pixels are
Pillow's to the bit, and so are the crops. What turbojpeg does not decode without complaint as an RGB or grey image of
the expected size, upright (PNG, CMYK, damage), goes to the `pil` renderer, which renders it or names it in its error.

Only FFCV's C library is used; its Loader stays out, though it reads our files, because it
- ignores turbojpeg's return code, so a damaged image becomes garbage, and maps the file, so a shrunk one is a SIGBUS;
- holds a buffer of the largest image for every row of a batch (4,096 rows and one 15-megapixel file: 180 GB);
- runs on numba's thread pool, whose default aborts the process when another thread uses it, and leaves a thread
  behind where an epoch is left early;
- reads one file, from the start of an epoch.
Importing the package also compiles code, for seconds at every start; hence the library is opened directly.
"""

from __future__ import annotations

import ctypes
import weakref
import zlib
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from numba import njit, types

from loaders.plan.plan import Rows
from loaders.plan.views import RandomCrop
from loaders.renderers import resample
from loaders.renderers.jpegs import JpegRenderer
from loaders.renderers.resample import CODES, over_grey, resize_boxes
from loaders.renderers.spread import spread
from loaders.store.images import MAX_PIXELS
from loaders.store.jpeg import orientation_of
from loaders.timing import CROP, DECODE, FETCH, now

_IMAGES_A_TASK = 4  # about 6 ms
_KEPT_PIXELS = 1 << 22  # a decoder's own buffer; larger images get one for the moment

# turbojpeg.h
_RGB = 0  # TJPF_RGB
_ACCURATE_DCT = 4096  # TJFLAG_ACCURATEDCT
_LAST_COLOUR_SPACE = 2  # TJCS_RGB, TJCS_YCbCr, TJCS_GRAY; then CMYK and YCCK

_MONOTONIC, _THREAD_CPU = 1, 3  # time.h


def _open_turbojpeg() -> ctypes.CDLL:
    """FFCV's extension module as a C library: symbols are found in what it links, too. Raises ImportError."""
    ffcv = find_spec("ffcv")
    files = [f for folder in (ffcv and ffcv.submodule_search_locations) or () for f in Path(folder).glob("_libffcv*")]
    if not files:
        raise ImportError("the package ffcv, with its compiled library, is not installed")
    try:
        library = ctypes.CDLL(str(files[0]))
    except OSError as e:
        raise ImportError(str(e)) from e
    library.tjInitDecompress.restype = ctypes.c_void_p
    library.tjDestroy.argtypes = [ctypes.c_void_p]
    return library


def _external(library: ctypes.CDLL, name: str, *arguments: types.Type) -> Any:
    """A function of `library` that compiled code, kept on disk too, calls by name."""
    llvm.add_symbol(f"fastssl_{name}", ctypes.cast(library[name], ctypes.c_void_p).value)
    return types.ExternalFunction(f"fastssl_{name}", types.intc(*arguments))


_turbojpeg = _open_turbojpeg()
_int, _address, _length = types.intc, types.intp, types.ulong
_read_header = _external(
    _turbojpeg, "tjDecompressHeader3", _address, _address, _length, _address, _address, _address, _address
)
_decompress = _external(
    _turbojpeg, "tjDecompress2", _address, _address, _length, _address, _int, _int, _int, _int, _int
)

_clock = _external(ctypes.CDLL(None), "clock_gettime", _int, _address)


@njit(nogil=True, cache=True)
def _stamp(stamp):
    """Into int64 [2, 2]: seconds and nanoseconds of the wall clock and of this thread's CPU."""
    _clock(_MONOTONIC, stamp.ctypes.data)
    _clock(_THREAD_CPU, stamp.ctypes.data + 16)


@njit(nogil=True, cache=True)
def _spend(spent, since, stamp):
    """Add the nanoseconds since `since` to `spent`, int64 [2], and begin anew."""
    _stamp(stamp)
    for k in range(2):
        spent[k] += (stamp[k, 0] - since[k, 0]) * 1_000_000_000 + stamp[k, 1] - since[k, 1]
        since[k] = stamp[k]


def _compile(resampler: int) -> Callable[..., Any]:
    """The stretch, compiled. numba's cache does not notice changes in other files, but it does look at the values a
    function encloses: `resampler` stands for the code of resample.py."""

    @njit(nogil=True, cache=True)
    def render(
        handle, files, lengths, sizes, pixels, masks, mask_ends, begin, num_images,
        boxes, greys, cut_first, filters, outs, spent,
    ):  # fmt: skip
        """Images begin, begin + 1, ... of `num_images`, one a file: decode each, resize its crops into their rows.

        files, lengths  int64 [n], address and length of JPEG bytes
        sizes   int32 [n, 2], expected height and width
        pixels  uint8, scratch
        masks   bool, the pixels of all masks, one after the other; mask_ends int64 [n], nothing of an image without
        boxes, greys, cut_first, filters, outs  one a view; boxes float64 [M, 4], greys int16 [M], -1 for no mask, outs
                uint8 [M, S, S, 3], all copy-major
        spent   int64 [2, 2], to which nanoseconds of wall and CPU are added: of decoding, of cutting crops

        Returns bool [n]: which images were rendered.
        """
        rendered = np.zeros(len(files), np.bool_)
        header = np.empty(4, np.int32)  # width, height, subsampling, colour space
        at = header.ctypes.data
        only = np.zeros(1, np.int64)
        since, stamp = np.empty((2, 2), np.int64), np.empty((2, 2), np.int64)
        _stamp(since)
        assert resampler  # enclosed, as it is named here
        for i in range(len(files)):
            height, width = sizes[i]
            if height * width > MAX_PIXELS:
                continue
            if _read_header(handle, files[i], lengths[i], at, at + 4, at + 8, at + 12):
                continue
            if header[0] != width or header[1] != height or header[3] > _LAST_COLOUR_SPACE:
                continue
            num_bytes = height * width * 3
            if num_bytes > len(pixels):
                pixels = np.empty(num_bytes, np.uint8)
            if _decompress(handle, files[i], lengths[i], pixels.ctypes.data, width, 0, height, _RGB, _ACCURATE_DCT):
                continue
            image = pixels[:num_bytes].reshape(1, height, width, 3)
            _spend(spent[0], since, stamp)
            for v in range(len(outs)):
                for row in range(begin + i, len(outs[v]), num_images):
                    part, shown = slice(row, row + 1), image
                    if greys[v][row] >= 0:
                        mask = masks[mask_ends[i] - height * width : mask_ends[i]].reshape(height, width)
                        shown = over_grey(image, mask, np.uint8(greys[v][row]), boxes[v][row], cut_first[v])
                    resize_boxes(shown, only, boxes[v][part], cut_first[v], filters[v], outs[v][part])
            _spend(spent[1], since, stamp)
            rendered[i] = True
        return rendered

    return render


_render = _compile(zlib.crc32(Path(resample.__file__).read_bytes()))


class _Decoder:
    """A turbojpeg instance and a buffer for one image; serves one thread at a time."""

    def __init__(self) -> None:
        self.handle = _turbojpeg.tjInitDecompress()
        self.pixels = np.empty(3 * _KEPT_PIXELS, np.uint8)
        weakref.finalize(self, _turbojpeg.tjDestroy, self.handle)


class FfcvRenderer(JpegRenderer):
    """Renders an encoded source with the threads of `pool`, which it neither owns nor closes.

    Every image is decoded once for all its views; pixels are those of `PilRenderer`.
    """

    def render(self, rows: Rows, out: Mapping[str, np.ndarray]) -> None:
        """Fill out[view name], uint8 [copies * B, S, S, 3], with the crops that `rows` describes, copy-major.

        Raises RenderError for an image that is damaged or not of the size its source says.
        """
        views = [v.view for v in rows.views]
        boxes, outs = tuple(np.ascontiguousarray(v.boxes) for v in rows.views), tuple(out[view.name] for view in views)
        greys = tuple(np.full(len(v.boxes), -1, np.int16) if v.greys is None else v.greys for v in rows.views)
        cut_first = np.array([isinstance(view.crop, RandomCrop) for view in views])
        filters = np.array([CODES[view.filter] for view in views])

        def work(begin: int, end: int) -> None:
            ids, start, spent = rows.ids[begin:end], now(), np.zeros((2, 2), np.int64)
            files = [np.frombuffer(self._file(i), np.uint8) for i in ids.tolist()]
            masks = [self._mask(rows, b).ravel() for b in range(begin, end)]
            self.times.add(FETCH, start)
            addresses = np.array([file.ctypes.data for file in files])
            lengths = np.array([len(file) for file in files])
            decoder = self._taken(_Decoder)
            rendered = _render(
                decoder.handle,
                addresses,
                lengths,
                self.source.sizes[ids],
                decoder.pixels,
                np.concatenate(masks),
                np.cumsum([len(mask) for mask in masks]),
                begin,
                len(rows.ids),
                boxes,
                greys,
                cut_first,
                filters,
                outs,
                spent,
            )
            self._idle.append(decoder)
            self.times.add_ns(DECODE, spent[0], len(ids))
            self.times.add_ns(CROP, spent[1], len(ids))
            for i in np.flatnonzero(~rendered).tolist():
                self.render_image(rows, begin + i, out)

        spread(self.pool, work, len(rows.ids), _IMAGES_A_TASK)

    def _file(self, i: int) -> bytes:
        """As for all, and nothing of an image that does not lie upright: `pil` turns it."""
        file = super()._file(i)
        return file if orientation_of(file) == 1 else b""
