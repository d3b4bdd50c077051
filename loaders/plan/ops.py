"""Photometric and small geometric operations, and how each turns uniform draws into its parameters.

An op is a frozen description with `num_draws` uniforms an image and a table of `columns` parameters an image. The
law from draws to parameters is here and nowhere else, so every finish (reference, numba, Triton) applies the same
numbers. Column 0 is always `apply`: 1.0 where the op acts on the image, 0.0 where it does not. Factors follow
torchvision's conventions; values are in [0, 1] unless said otherwise.

Every parameter is an image's own, also where released code draws one for a whole batch (SimCLR's blur on TPUs): a draw
that many images share would depend on the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601-2, Pillow's convert("L")
TF_LUMA = (0.2989, 0.5870, 0.1140)  # TensorFlow's rgb_to_grayscale; they add up to 0.9999


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
class TfColourJitter(Op):
    """The jitter of TensorFlow programs (SimCLR, BYOL, SemPPL): four sub-ops in a random order, clipped after each.

    Brightness is value * gain + offset, gain uniform in [max(0, 1 - brightness), 1 + brightness] (SimCLR) and offset in
    [-offset, offset] (SemPPL). Contrast is about the mean of each channel. Saturation is HSV's S times a factor, hue a
    shift of H in turns. `order` as in `ColourJitter`.
    """

    num_draws: ClassVar[int] = 7
    columns: ClassVar[tuple[str, ...]] = ("apply", "order", "gain", "offset", "contrast", "saturation", "hue")

    brightness: float = 0.0
    offset: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def _rest(self, u: np.ndarray, out: np.ndarray) -> None:
        out[:, 0] = np.floor(u[:, 0] * 24)
        for column, strength in ((1, self.brightness), (3, self.contrast), (4, self.saturation)):
            out[:, column] = _between(u[:, column], max(0.0, 1 - strength), 1 + strength)
        out[:, 2] = _between(u[:, 2], -self.offset, self.offset)
        out[:, 5] = _between(u[:, 5], -self.hue, self.hue)


@dataclass(frozen=True)
class HsvNoise(Op):
    """S4L's exemplar colours: H + a (mod 1); S and V, each with draws of its own, x ** power * gain + offset, clipped.

    a is uniform in [-hue, hue]; power and gain are 2 to an exponent uniform in [-log_power, log_power] and [-log_gain,
    log_gain]; offset is uniform in [-offset, offset].
    """

    num_draws: ClassVar[int] = 8
    columns: ClassVar[tuple[str, ...]] = (
        "apply", "hue", "power_s", "gain_s", "offset_s", "power_v", "gain_v", "offset_v",
    )  # fmt: skip

    hue: float = 0.1
    log_power: float = 2.0
    log_gain: float = 0.5
    offset: float = 0.1

    def _rest(self, u: np.ndarray, out: np.ndarray) -> None:
        out[:, 0] = _between(u[:, 0], -self.hue, self.hue)
        for first in (1, 4):
            out[:, first] = np.exp2(_between(u[:, first], -self.log_power, self.log_power))
            out[:, first + 1] = np.exp2(_between(u[:, first + 1], -self.log_gain, self.log_gain))
            out[:, first + 2] = _between(u[:, first + 2], -self.offset, self.offset)


@dataclass(frozen=True)
class Grayscale(Op):
    """Replace every channel by the sum of the channels times `weights`."""

    columns: ClassVar[tuple[str, ...]] = ("apply", "red", "green", "blue")

    p: float = 0.2
    weights: tuple[float, float, float] = LUMA

    def _rest(self, u: np.ndarray, out: np.ndarray) -> None:
        out[:] = self.weights


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
class GaussianKernelBlur(Op):
    """Convolve with a Gaussian kernel of `taps` (odd) values that add up to 1, along x and along y, with zeros beyond
    the edge; its standard deviation in pixels is uniform in `sigma`. SimCLR's and SemPPL's blur (both pad "SAME")."""

    num_draws: ClassVar[int] = 2
    columns: ClassVar[tuple[str, ...]] = ("apply", "sigma", "reach")  # reach: taps beside the middle one

    p: float = 0.5
    sigma: tuple[float, float] = (0.1, 2.0)
    taps: int = 23

    @staticmethod
    def taps_for(size: int) -> int:
        """About a tenth of the view's side, as both methods take it: 23 at 224 pixels, 9 at 96."""
        return 2 * (size // 20) + 1

    def _rest(self, u: np.ndarray, out: np.ndarray) -> None:
        assert self.taps % 2 == 1
        out[:, 0] = _between(u[:, 0], *self.sigma)
        out[:, 1] = self.taps // 2


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
