"""The DALI renderer, on CPU or GPU: one pipeline, which is given bytes and boxes and decides nothing itself.

Decoding on the CPU gives Pillow's pixels to the bit. The resampler differs from Pillow's where the filter reaches
beyond a crop: DALI repeats the border, Pillow leaves those taps out (a few percent of a border pixel's neighbours;
0.2/255 on average). On a GPU the decoder is nvJPEG's (`mixed`): pixels may differ by a little, and none of them
passes through the host. NOT YET RUN on a GPU.

What only Pillow can judge (PNG, CMYK, what does not lie upright, a size other than expected) goes through the `pil`
renderer on its own; where DALI meets damage the `pil` renderer names the image.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from loaders.errors import RenderError, StoreError
from loaders.plan.plan import Rows
from loaders.plan.views import Filter, RandomCrop, View
from loaders.renderers.pil import PilRenderer
from loaders.store.images import MAX_PIXELS
from loaders.store.jpeg import jpeg_header, orientation_of
from loaders.store.source import EncodedSource
from loaders.timing import DECODE, FETCH, PhaseTimes, now

_FILTERS = {
    Filter.BILINEAR: {"interp_type": types.INTERP_LINEAR, "antialias": True},
    Filter.BICUBIC: {"interp_type": types.INTERP_CUBIC, "antialias": True},
    Filter.BICUBIC_ALIASED: {"interp_type": types.INTERP_CUBIC, "antialias": False},
}
_COLOURS = (1, 3)  # components of a grey and a colour JPEG; four are CMYK


class DaliRenderer:
    """Renders an encoded source with `threads` threads of DALI's, on the CPU or the GPU `device_id`.

    Every image is decoded once for all its views, as RGB.
    """

    def __init__(
        self,
        source: EncodedSource,
        pool: ThreadPoolExecutor,
        threads: int,
        device_id: int | None = None,
        times: PhaseTimes | None = None,
    ):
        self.source, self.threads, self.device_id, self.times = source, threads, device_id, times or PhaseTimes()
        self._pil = PilRenderer(source, pool, self.times)
        self._pipeline: Pipeline | None = None
        self._copied: torch.cuda.Event | None = None  # the end of the last copies out of DALI's buffers

    def render(self, rows: Rows, out: Mapping[str, Any]) -> None:
        """Fill out[view name], uint8 [copies * B, S, S, 3], with the crops that `rows` describes, copy-major.

        The arrays are NumPy's, or with a `device_id` torch's on that device. Raises RenderError for an image that is
        damaged or not of the size its source says.
        """
        begin = now()
        files = [self._file(i) for i in rows.ids.tolist()]
        begin = self.times.add(FETCH, begin)
        known = np.array([self._is_ours(i, file) for i, file in zip(rows.ids, files, strict=True)], bool)
        places = np.flatnonzero(known)
        for b in np.flatnonzero(~known).tolist():
            self._render_elsewhere(rows, b, out)
        if len(places):
            self._run(rows, places, [np.frombuffer(files[b], np.uint8) for b in places], out)
        self.times.add(DECODE, begin)  # and crop: DALI's own threads do both, whose CPU time is not seen from here

    def _run(self, rows: Rows, places: np.ndarray, files: list[np.ndarray], out: Mapping[str, Any]) -> None:
        """Render images `places` of `rows`."""
        views = tuple(v.view for v in rows.views)
        if self._pipeline is None or self._pipeline.max_batch_size < len(places):
            self._pipeline = _pipeline(views, len(rows.ids), self.threads, self.device_id)
        self._pipeline.feed_input("files", files)
        row_sets = []
        for v in rows.views:
            for copy in range(v.view.copies):
                row_sets.append((v.view.name, copy * len(rows.ids) + places))
                for name, value in _box_inputs(v.view, v.boxes[row_sets[-1][1]]).items():
                    self._pipeline.feed_input(f"{v.view.name}.{copy}.{name}", value)
        if self._copied is not None:
            self._copied.synchronize()  # long past, as a rule; DALI writes into the same buffers again
        try:
            results = self._pipeline.run()
        except RuntimeError as e:
            self._pipeline = None  # it does not run again after an error
            for b in places.tolist():
                self._pil.decode(int(rows.ids[b]))
            raise RenderError(f"{self.source.name}: DALI cannot render a batch that Pillow can decode: {e}") from e
        for result, (name, target_rows) in zip(results, row_sets, strict=True):
            if self.device_id is None:
                out[name][target_rows] = result.as_array()
            else:
                _copy_on_device(result, out[name], target_rows)
        if self.device_id is not None:
            self._copied = torch.cuda.current_stream(self.device_id).record_event()

    def _render_elsewhere(self, rows: Rows, b: int, out: Mapping[str, Any]) -> None:
        if self.device_id is None:
            return self._pil.render_image(rows, b, out)
        crops = {v.view.name: np.empty(tuple(out[v.view.name].shape), np.uint8) for v in rows.views}
        self._pil.render_image(rows, b, crops)
        for v in rows.views:
            for row in range(b, len(v.boxes), len(rows.ids)):
                out[v.view.name][row] = out[v.view.name].new_tensor(crops[v.view.name][row])

    def _file(self, i: int) -> bytes:
        """The bytes of image `i`; nothing where it cannot be read, so that the `pil` renderer says why."""
        try:
            return self.source.jpeg(i)
        except (StoreError, OSError):
            return b""

    def _is_ours(self, i: int, file: bytes) -> bool:
        """Whether DALI may have this file: an upright grey or colour JPEG of the expected size."""
        try:
            height, width, components = jpeg_header(file)
        except StoreError:
            return False
        expected = tuple(self.source.sizes[i].tolist())
        ours = (height, width) == expected and components in _COLOURS and height * width <= MAX_PIXELS
        return ours and orientation_of(file) == 1


def _copy_on_device(result: Any, target: torch.Tensor, target_rows: np.ndarray) -> None:
    """Rows of a torch tensor from a TensorListGPU, without the host, queued on the current stream.

    Not on DALI's own: torch hands out memory again as soon as its last reader is queued, and only what is queued behind
    that reader may write there. DALI has the stream wait for what it decodes.
    """
    stream = ctypes.c_void_p(torch.cuda.current_stream(target.device).cuda_stream)
    if len(target_rows) == target_rows[-1] - target_rows[0] + 1:
        rows = target[int(target_rows[0]) : int(target_rows[-1]) + 1]
        result.copy_to_external(ctypes.c_void_p(rows.data_ptr()), stream, non_blocking=True)
    else:
        for k, row in enumerate(target_rows.tolist()):
            result[k].copy_to_external(ctypes.c_void_p(target[row].data_ptr()), stream, non_blocking=True)


def _box_inputs(view: View, boxes: np.ndarray) -> dict[str, np.ndarray]:
    """Boxes float64 [B, 4] (x0, y0, x1, y1) as DALI takes them: rows before columns."""
    start, end = boxes[:, [1, 0]], boxes[:, [3, 2]]
    if isinstance(view.crop, RandomCrop):
        pair = {"start": start.astype(np.int32), "shape": (end - start).astype(np.int32)}
    else:
        pair = {"start": start.astype(np.float32), "end": end.astype(np.float32)}
    return {name: np.ascontiguousarray(value) for name, value in pair.items()}


def _pipeline(views: tuple[View, ...], batch: int, threads: int, device_id: int | None) -> Pipeline:
    """One decode, all crops: an output [B, S, S, 3] for each copy of each view."""
    pipeline = Pipeline(batch_size=batch, num_threads=threads, device_id=device_id, prefetch_queue_depth=1)

    def given(name: str, dtype: Any) -> Any:
        return fn.external_source(name=name, dtype=dtype, ndim=1)

    with pipeline:
        image = fn.decoders.image(
            fn.external_source(name="files", dtype=types.UINT8, ndim=1, no_copy=True),
            device="cpu" if device_id is None else "mixed",
            output_type=types.RGB,
            adjust_orientation=False,  # what does not lie upright does not come here
            jpeg_fancy_upsampling=True,  # else chroma differs from Pillow's
        )
        outputs = []
        for view in views:
            for copy in range(view.copies):
                resize = {"size": (view.size, view.size), **_FILTERS[view.filter]}
                name = f"{view.name}.{copy}"
                if isinstance(view.crop, RandomCrop):  # cut first: nothing beyond the box shows
                    start, shape = given(f"{name}.start", types.INT32), given(f"{name}.shape", types.INT32)
                    outputs.append(fn.resize(fn.slice(image, start, shape, axes=(0, 1)), **resize))
                else:
                    start, end = given(f"{name}.start", types.FLOAT), given(f"{name}.end", types.FLOAT)
                    outputs.append(fn.resize(image, roi_start=start, roi_end=end, **resize))
        pipeline.set_outputs(*outputs)
    pipeline.build()
    return pipeline
