"""Photometric and small geometric operations, and how each turns uniform draws into its parameters.

An op is a frozen description with `num_draws` uniforms an image and a table of `columns` parameters an image. The
law from draws to parameters is here and nowhere else, so every finish (reference, numba, Triton) applies the same
numbers. Column 0 is always `apply`: 1.0 where the op acts on the image, 0.0 where it does not. Factors follow
torchvision's conventions; values are in [0, 1] unless said otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np


@dataclass(frozen=True)
class Op:
    """Base: acts with probability `p`, drawn from the first uniform."""

    num_draws: ClassVar[int] = 1
    columns: ClassVar[tuple[str, ...]] = ("apply",)

    p: float = 1.0

    def parameters(self, u: np.ndarray) -> np.ndarray:
        """Uniform draws float64 [M, num_draws] in [0, 1) -> parameters float32 [M, len(columns)]."""
        assert u.shape[1] == self.num_draws
        table = np.empty((len(u), len(self.columns)), np.float32)
        table[:, 0] = u[:, 0] < self.p
        self._rest(u[:, 1:], table[:, 1:])
        return table

    def _rest(self, u: np.ndarray, out: np.ndarray) -> None:
        """Fill the columns after `apply`."""


def _between(u: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (high - low) * u


@dataclass(frozen=True)
class Flip(Op):
    """Mirror left-right."""

    p: float = 0.5


@dataclass(frozen=True)
class ColourJitter(Op):
    """torchvision's ColorJitter: the four sub-ops in a random order.

    Factors of brightness, contrast and saturation are uniform in [max(0, 1 - x), 1 + x]; the hue shift, in turns of
    the colour circle, is uniform in [-hue, hue]. `order` numbers the 24 permutations of (brightness, contrast,
    saturation, hue) in lexicographic order.
    """

    num_draws: ClassVar[int] = 6
    columns: ClassVar[tuple[str, ...]] = ("apply", "order", "brightness", "contrast", "saturation", "hue")

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def _rest(self, u: np.ndarray, out: np.ndarray) -> None:
        out[:, 0] = np.floor(u[:, 0] * 24)
        for column, strength in enumerate((self.brightness, self.contrast, self.saturation), start=1):
            out[:, column] = _between(u[:, column], max(0.0, 1 - strength), 1 + strength)
        out[:, 4] = _between(u[:, 4], -self.hue, self.hue)


@dataclass(frozen=True)
class Grayscale(Op):
    """Replace the channels by their luma (ITU-R 601: .299, .587, .114)."""

    p: float = 0.2


@dataclass(frozen=True)
class GaussianBlur(Op):
    """Pillow's GaussianBlur: three extended box blurs that approximate standard deviation `sigma`, in pixels of the
    final-size crop; uniform in `sigma`."""

    num_draws: ClassVar[int] = 2
    columns: ClassVar[tuple[str, ...]] = ("apply", "sigma")

    p: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)

    def _rest(self, u: np.ndarray, out: np.ndarray) -> None:
        out[:, 0] = _between(u[:, 0], *self.sigma)


@dataclass(frozen=True)
class Solarise(Op):
    """Invert values at or above a threshold, uniform in `threshold` (in [0, 1])."""

    num_draws: ClassVar[int] = 2
    columns: ClassVar[tuple[str, ...]] = ("apply", "threshold")

    p: float = 0.2
    threshold: tuple[float, float] = (0.0, 1.0)

    def _rest(self, u: np.ndarray, out: np.ndarray) -> None:
        out[:, 0] = _between(u[:, 0], *self.threshold)


@dataclass(frozen=True)
class Equalize(Op):
    """Pillow's ImageOps.equalize, per channel, on values rounded to uint8."""

    p: float = 0.2


@dataclass(frozen=True)
class Affine(Op):
    """Rotate, scale and shift about the image's centre, bilinear, with edge pixels repeated outside.

    Angle uniform in [-degrees, degrees], counter-clockwise; scale uniform in `scale`; shifts uniform in
    [-shift, shift], as shares of the image side.
    """

    num_draws: ClassVar[int] = 5
    columns: ClassVar[tuple[str, ...]] = ("apply", "angle", "scale", "shift_x", "shift_y")  # angle in radians

    degrees: float = 10.0
    scale: tuple[float, float] = (0.9, 1.1)
    shift: float = 0.1

    def _rest(self, u: np.ndarray, out: np.ndarray) -> None:
        out[:, 0] = np.deg2rad(_between(u[:, 0], -self.degrees, self.degrees))
        out[:, 1] = _between(u[:, 1], *self.scale)
        out[:, 2] = _between(u[:, 2], -self.shift, self.shift)
        out[:, 3] = _between(u[:, 3], -self.shift, self.shift)


@dataclass(frozen=True)
class Noise(Op):
    """Add independent Gaussian noise to every value; its standard deviation is uniform in `std`.

    The noise of a value is a hash of (image key, index of the value), so every finish draws the same one. The key is
    carried as two floats that are exact integers below 2**24.
    """

    num_draws: ClassVar[int] = 4
    columns: ClassVar[tuple[str, ...]] = ("apply", "std", "key_low", "key_high")

    std: tuple[float, float] = (0.0, 0.1)

    def _rest(self, u: np.ndarray, out: np.ndarray) -> None:
        out[:, 0] = _between(u[:, 0], *self.std)
        out[:, 1:] = np.floor(u[:, 1:] * 2**24)
