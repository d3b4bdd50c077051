"""Crop boxes as arrays: (x0, y0, x1, y1) in image pixels, float64, from keys and image sizes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from loaders.plan.draws import uniforms
from loaders.plan.views import Centre, ClampedRrc, DistortedBox, FiveCrops, Rrc, View, Whole

_RRC_ATTEMPTS = 10  # torchvision.transforms.RandomResizedCrop.get_params
_DISTORTED_ATTEMPTS = 100  # SimCLR's, and TensorFlow's default, which S4L leaves
_DRAWS = 4  # of an attempt: two for the shape, two for the place


def boxes(view: View, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Boxes [M, 4] of `view` for images of `sizes` int [M, 2] (height, width), drawn from `keys` uint64 [M]."""
    match view.crop:
        case Rrc():
            return random_resized_boxes(view.crop, sizes, keys)
        case ClampedRrc():
            return clamped_boxes(view.crop, sizes, keys)
        case DistortedBox():
            return distorted_boxes(view.crop, sizes, keys)
        case Centre():
            return centre_boxes(sizes, view.size, view.crop.resize)
        case FiveCrops():
            return five_boxes(sizes, view.size, view.crop.resize)
        case Whole():
            return _whole(sizes)


def random_resized_boxes(crop: Rrc, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """torchvision's law: the first of ten attempts that fits, else the largest centred box of an allowed aspect."""
    low, high = crop.ratio
    height, width = _sides(sizes)
    w = np.where(width / height > high, np.rint(height * high), width)
    h = np.where(width / height < low, np.rint(width / low), height)
    largest = _corners((width - w) // 2, (height - h) // 2, w, h)

    def propose(u: np.ndarray, height: np.ndarray, width: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        w, h = _area_and_aspect(crop, u, height, width)
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        return _corners(np.floor(u[:, 2] * (width - w + 1)), np.floor(u[:, 3] * (height - h + 1)), w, h), fits

    return _first_that_fits(propose, largest, sizes, keys, _RRC_ATTEMPTS)


def clamped_boxes(crop: ClampedRrc, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The law of BYOL's and SemPPL's released code (google-deepmind/semppl, utils/dataset.py). A side that would round
    to nothing, which that code does not expect, is one pixel."""
    u = uniforms(keys, _DRAWS)
    height, width = _sides(sizes)
    w, h = _area_and_aspect(crop, u, height, width)
    w, h = np.clip(w, 1, width), np.clip(h, 1, height)
    return _corners(np.floor(u[:, 2] * (width - w + 1)), np.floor(u[:, 3] * (height - h + 1)), w, h)


def distorted_boxes(crop: DistortedBox, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """TensorFlow's law (sample_distorted_bounding_box_op.cc), the whole image being the one object to cover. As there,
    a box shorter than the image along an axis never touches the far edge."""

    def propose(u: np.ndarray, height: np.ndarray, width: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        least, most = (share * height * width for share in crop.area)
        aspect = crop.ratio[0] + (crop.ratio[1] - crop.ratio[0]) * u[:, 0]
        widest = np.floor((width + 0.5 - 1e-7) / aspect)  # the greatest height whose width rounds into the image
        highest = np.minimum(np.rint(np.sqrt(most / aspect)), np.minimum(widest, height))
        lowest = np.minimum(np.rint(np.sqrt(least / aspect)), highest)
        h = lowest + np.floor(u[:, 1] * (highest - lowest + 1))
        h += np.rint(h * aspect) * h < least  # rounding may leave the range of areas by one row
        h -= np.rint(h * aspect) * h > most
        w = np.rint(h * aspect)
        fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
        fits &= (w * h >= np.maximum(least, crop.covered * height * width)) & (w * h <= most)
        return _corners(np.floor(u[:, 2] * (width - w)), np.floor(u[:, 3] * (height - h)), w, h), fits

    return _first_that_fits(propose, _whole(sizes), sizes, keys, _DISTORTED_ATTEMPTS)


def centre_boxes(sizes: np.ndarray, size: int, resize: int | None) -> np.ndarray:
    """The source box of torchvision's Resize(resize) + CenterCrop(size): fractional, since the crop is placed on the
    resized image, whose longer side is truncated to an integer."""
    return _placed_boxes(sizes, size, resize, 0.5, 0.5)


def five_boxes(sizes: np.ndarray, size: int, resize: int | None) -> np.ndarray:
    """As `centre_boxes`, for sizes [5 * B, 2] of B images, copy-major: centre, then the four corners."""
    across, down = np.repeat([[0.5, 0.0, 1.0, 0.0, 1.0], [0.5, 0.0, 0.0, 1.0, 1.0]], len(sizes) // 5, axis=1)
    return _placed_boxes(sizes, size, resize, across, down)


def _placed_boxes(
    sizes: np.ndarray, size: int, resize: int | None, across: np.ndarray | float, down: np.ndarray | float
) -> np.ndarray:
    """`across` and `down` are shares of the room that a crop has: 0 the left or top edge, 1 the right or bottom one."""
    height, width = _sides(sizes)
    if resize is None:
        resized_h, resized_w = height, width
    else:
        short = np.minimum(height, width)
        resized_h, resized_w = resize * height // short, resize * width // short
    left, top = np.rint((resized_w - size) * across), np.rint((resized_h - size) * down)
    scale_x, scale_y = width / resized_w, height / resized_h
    boxes = _corners(left * scale_x, top * scale_y, size * scale_x, size * scale_y)
    inside: np.ndarray = np.minimum(boxes, np.stack([width, height, width, height], axis=1))  # rounding may go beyond
    return inside


def _sides(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return sizes[:, 0].astype(np.int64), sizes[:, 1].astype(np.int64)


def _whole(sizes: np.ndarray) -> np.ndarray:
    height, width = _sides(sizes)
    return _corners(np.zeros(len(sizes)), np.zeros(len(sizes)), width, height)


def _area_and_aspect(
    crop: Rrc | ClampedRrc, u: np.ndarray, height: np.ndarray, width: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rounded width and height of an area uniform in `crop.area` and an aspect log-uniform in `crop.ratio`."""
    area = height * width * (crop.area[0] + (crop.area[1] - crop.area[0]) * u[:, 0])
    low, high = np.log(crop.ratio)
    aspect = np.exp(low + (high - low) * u[:, 1])
    return np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))


def _first_that_fits(
    propose: Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    fallback: np.ndarray,
    sizes: np.ndarray,
    keys: np.ndarray,
    attempts: int,
) -> np.ndarray:
    """Boxes [M, 4]: of each image's `attempts` proposals the first that fits, else its box of `fallback`.

    propose  draws [P, 4], heights [P], widths [P] -> boxes [P, 4] and whether each fits [P]
    """
    box, pending = fallback.copy(), np.arange(len(keys))
    for attempt in range(attempts):
        if not len(pending):
            break
        u = uniforms(keys[pending], _DRAWS, first=attempt * _DRAWS)
        proposed, fits = propose(u, *_sides(sizes[pending]))
        box[pending[fits]] = proposed[fits]
        pending = pending[~fits]
    return box


def _corners(left: np.ndarray, top: np.ndarray, w: np.ndarray, h: np.ndarray) -> np.ndarray:
    return np.stack([left, top, left + w, top + h], axis=1).astype(np.float64)
