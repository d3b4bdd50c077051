"""AutoAugment's operations, by Pillow, on the crops that another renderer has made.

The paper (arXiv 1805.09501) gives each operation's range in its table 6 and cuts it into levels. A level is a tenth of
the range, as in its authors' code (tensorflow/models, research/autoaugment, and tensorflow/tpu, efficientnet), so that
the last of 0..9 does not reach the end; torchvision and others take ninths. Where code and paper part:

- posterising keeps 8 to 4 bits, as table 6 has it; the authors' code keeps 4 to 0;
- solarising inverts from 256 down to 0, as in tensorflow/models; tensorflow/tpu has it from 0 up;
- colour, contrast and sharpness go from factor 0.1 to 1.9, in the authors' code and in table 6 (1 changes nothing);
  torchvision draws on which side of 1 they are, and none of the authors' does;
- what a rotation or a shear uncovers becomes grey, 128, as in tensorflow/tpu: the mean, about, as in tensorflow/models;
- pixels are not interpolated, which is the default of what either of them calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from loaders.plan.autoaugment import SUB_POLICIES
from loaders.plan.plan import Rows
from loaders.renderers import Renderer
from loaders.renderers.spread import spread
from loaders.timing import CROP, PhaseTimes, now

CHANNELS = (1, 3)  # what Pillow has a mode for, grey and RGB
_GREY = 128
_LEVELS = 10
_ROWS_A_TASK = 8

Operation = Callable[[Image.Image, int, int], Image.Image]  # image, level, sign


def _fill(image: Image.Image) -> tuple[int, ...]:
    return (_GREY,) * len(image.getbands())


def _rotate(image: Image.Image, level: int, sign: int) -> Image.Image:
    """By up to 30 degrees, counter-clockwise where the sign is positive."""
    return image.rotate(sign * 30 * level / _LEVELS, Image.Resampling.NEAREST, fillcolor=_fill(image))


def _shear_x(image: Image.Image, level: int, sign: int) -> Image.Image:
    """Rows move sideways, by up to 0.3 of how far they are from the top."""
    coefficients = (1, sign * 0.3 * level / _LEVELS, 0, 0, 1, 0)
    return image.transform(
        image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.NEAREST, fillcolor=_fill(image)
    )


def _enhanced(enhancer: Callable[[Image.Image], Any]) -> Operation:
    def enhance(image: Image.Image, level: int, _: int) -> Image.Image:
        result: Image.Image = enhancer(image).enhance(0.1 + 1.8 * level / _LEVELS)
        return result

    return enhance


OPERATIONS: dict[str, Operation] = {
    "autocontrast": lambda image, _level, _sign: ImageOps.autocontrast(image),
    "colour": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "equalize": lambda image, _level, _sign: ImageOps.equalize(image),
    "invert": lambda image, _level, _sign: ImageOps.invert(image),
    "posterize": lambda image, level, _sign: ImageOps.posterize(image, 8 - level * 4 // _LEVELS),
    "rotate": _rotate,
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": _shear_x,
    "solarize": lambda image, level, _sign: ImageOps.solarize(image, 256 - level * 256 // _LEVELS),
}


def augment(crop: np.ndarray, chosen: np.ndarray) -> None:
    """Do to `crop`, uint8 [S, S, 1 or 3], in place, what a row of `AutoAugment.chosen` says."""
    sub_policy, *signs = chosen.tolist()
    if not any(signs):
        return
    image = Image.fromarray(crop[..., 0] if crop.shape[2] == 1 else crop)
    for (name, _, level), sign in zip(SUB_POLICIES[sub_policy], signs, strict=True):
        if sign:
            image = OPERATIONS[name](image, level, sign)
    crop[:] = np.asarray(image).reshape(crop.shape)


class AutoAugmented:
    """What `renderer` renders into NumPy arrays, augmented by the threads of `pool` where a view has the policy."""

    device_id: int | None = None

    def __init__(self, renderer: Renderer, pool: ThreadPoolExecutor, times: PhaseTimes):
        assert renderer.device_id is None
        self.renderer, self.pool, self.times = renderer, pool, times

    def render(self, rows: Rows, out: Mapping[str, np.ndarray]) -> None:
        """Fill out[view name], uint8 [copies * B, S, S, C], with the crops that `rows` describes, copy-major. Raises
        what the renderer raises."""
        self.renderer.render(rows, out)
        for v in rows.views:
            if v.policy is not None:
                self._augment(out[v.view.name], v.policy)

    def _augment(self, crops: np.ndarray, chosen: np.ndarray) -> None:
        def work(begin: int, end: int) -> None:
            start = now()
            for row in range(begin, end):
                augment(crops[row], chosen[row])
            self.times.add(CROP, start)

        spread(self.pool, work, len(crops), _ROWS_A_TASK)
