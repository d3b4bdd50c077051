"""Crop boxes as arrays: (x0, y0, x1, y1) in image pixels, float64, from keys and image sizes."""

from __future__ import annotations

import numpy as np

from loaders.plan.draws import uniforms
from loaders.plan.views import Centre, Rrc, View, Whole

_ATTEMPTS = 10  # torchvision.transforms.RandomResizedCrop.get_params
_DRAWS_PER_ATTEMPT = 4


def boxes(view: View, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Boxes [M, 4] of `view` for images of `sizes` int [M, 2] (height, width), drawn from `keys` uint64 [M]."""
    match view.crop:
        case Rrc():
            return random_resized_boxes(view.crop, sizes, keys)
        case Centre():
            return centre_boxes(sizes, view.size, view.crop.resize)
        case Whole():
            whole = np.zeros((len(sizes), 4))
            whole[:, 2:] = sizes[:, ::-1]
            return whole


def random_resized_boxes(crop: Rrc, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """torchvision's law: the first of ten attempts that fits, else the largest centred box of an allowed aspect."""
    height, width = sizes[:, 0].astype(np.int64), sizes[:, 1].astype(np.int64)
    low, high = crop.ratio
    # The fallback first; attempts overwrite it.
    w = np.where(width / height > high, np.rint(height * high), width)
    h = np.where(width / height < low, np.rint(width / low), height)
    box = _corners((width - w) // 2, (height - h) // 2, w, h)
    pending = np.arange(len(keys))
    for attempt in range(_ATTEMPTS):
        u = uniforms(keys[pending], _DRAWS_PER_ATTEMPT, first=attempt * _DRAWS_PER_ATTEMPT)
        area = height[pending] * width[pending] * (crop.area[0] + (crop.area[1] - crop.area[0]) * u[:, 0])
        aspect = np.exp(np.log(low) + (np.log(high) - np.log(low)) * u[:, 1])
        w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
        fits = (w > 0) & (w <= width[pending]) & (h > 0) & (h <= height[pending])
        left = np.floor(u[:, 2] * (width[pending] - w + 1))
        top = np.floor(u[:, 3] * (height[pending] - h + 1))
        box[pending[fits]] = _corners(left, top, w, h)[fits]
        pending = pending[~fits]
        if not len(pending):
            break
    return box


def centre_boxes(sizes: np.ndarray, size: int, resize: int | None) -> np.ndarray:
    """The source box of torchvision's Resize(resize) + CenterCrop(size): fractional, since the crop is placed on the
    resized image, whose longer side is truncated to an integer."""
    height, width = sizes[:, 0].astype(np.int64), sizes[:, 1].astype(np.int64)
    if resize is None:
        resized_h, resized_w = height, width
    else:
        short = np.minimum(height, width)
        resized_h, resized_w = resize * height // short, resize * width // short
    left, top = np.rint((resized_w - size) / 2), np.rint((resized_h - size) / 2)
    scale_x, scale_y = width / resized_w, height / resized_h
    return _corners(left * scale_x, top * scale_y, size * scale_x, size * scale_y)


def _corners(left: np.ndarray, top: np.ndarray, w: np.ndarray, h: np.ndarray) -> np.ndarray:
    return np.stack([left, top, left + w, top + h], axis=1).astype(np.float64)
