"""What a method asks the loader for: streams of images, and the views cut from each image.

Everything here is a frozen description; nothing reads data or draws a random number. A method builds a
:class:`loaders.plan.plan.Plan` from these, `plan.py` turns it into ids, boxes and parameters, a renderer into
pixels, a finish into tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from loaders.plan.autoaugment import AutoAugment
from loaders.plan.ops import Op


@dataclass(frozen=True)
class Rrc:
    """RandomResizedCrop with torchvision's law: area share uniform in `area`, aspect log-uniform in `ratio`,
    ten attempts, then the largest centred box of an allowed aspect. Boxes have integer corners."""

    area: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class ClampedRrc:
    """RandomResizedCrop with BYOL's and SemPPL's law: area share uniform in `area`, aspect log-uniform in `ratio`, each
    side cut down to the image's where it is longer, nothing drawn again. Boxes have integer corners."""

    area: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class DistortedBox:
    """The "inception crop" of SimCLR and S4L: TensorFlow's sample_distorted_bounding_box around the whole image.

    Aspect uniform in `ratio`; then the height, not the area, uniform over those that give an area share in `area`.
    Boxes that cover less than `covered` of the image are drawn again, which makes that the actual smallest share.
    After 100 attempts the whole image. Boxes have integer corners.
    """

    area: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    covered: float = 0.1


@dataclass(frozen=True)
class Centre:
    """Shorter side scaled to `resize` pixels, then the central `View.size` square (evaluation).

    `resize=None` cuts the central square without scaling first. Resampling may read image pixels beyond the box,
    as it does when the whole image is resized before it is cropped.
    """

    resize: int | None = None


@dataclass(frozen=True)
class FiveCrops:
    """As `Centre`, but five squares, one a copy: the central one and those in the corners (top left, top right, bottom
    left, bottom right). Its view has five copies."""

    resize: int | None = None


@dataclass(frozen=True)
class Whole:
    """The whole image, scaled to `View.size` whatever its aspect (small square sets: digits, CIFAR)."""


RandomCrop = Rrc | ClampedRrc | DistortedBox  # cut out first, then scaled: nothing beyond the box shows
Crop = RandomCrop | Centre | FiveCrops | Whole


class Filter(Enum):
    """Resampling filters: Pillow's, which widen when they shrink an image (antialias), and the cubic that does not
    (TensorFlow's `resize` of method `bicubic`: four taps an axis, renormalised at the edge)."""

    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BICUBIC_ALIASED = "bicubic without antialias"


@dataclass(frozen=True)
class Pixels:
    """What the network receives: (value / 255 - mean) / std per channel.

    A one-entry mean or std serves images of any number of channels.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10 = Pixels((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
UNIT = Pixels((0.0,), (1.0,))  # [0, 1]
SIGNED = Pixels((0.5,), (0.5,))  # [-1, 1]


@dataclass(frozen=True)
class SaliencyMask:
    """ReLICv2's and SemPPL's masking: with probability `p`, a copy's own, everything outside the image's salient
    foreground becomes one level of grey, uniform in 0..255 and drawn for the copy, before the crop is cut. An image
    whose foreground is less than `least_foreground` of its area is never masked. What is foreground is said by the
    masks that are given with the data: :mod:`loaders.store.masks`.
    """

    p: float = 0.1  # both: the SemPPL paper's
    least_foreground: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1 or not 0 <= self.least_foreground <= 1:
            raise ValueError("a mask's p and least_foreground are shares, from 0 to 1")


@dataclass(frozen=True)
class View:
    """One way of looking at an image: a mask, where there is one, a crop, a policy, where there is one, photometric
    ops in order, then normalisation.

    `copies` independent draws of the same description count as one view of that many copies (PAWS's two global
    crops, exemplar's eight); each copy is also given at every quarter turn in `turns` (rotation prediction),
    counter-clockwise like `numpy.rot90`. Rows of the finished tensor are turn-major, then copy-major, then image.
    """

    name: str
    size: int
    crop: Crop
    ops: tuple[Op, ...] = ()
    pixels: Pixels = IMAGENET
    filter: Filter = Filter.BILINEAR
    copies: int = 1
    turns: tuple[int, ...] = (0,)
    mask: SaliencyMask | None = None
    policy: AutoAugment | None = None

    def __post_init__(self) -> None:
        if self.size < 1 or self.copies < 1 or not self.turns:
            raise ValueError(f"view {self.name!r} needs a pixel, a copy and a turn at least")
        if isinstance(self.crop, FiveCrops) and self.copies != 5:
            raise ValueError(f"view {self.name!r} cuts five crops, so it has 5 copies, not {self.copies}")


@dataclass(frozen=True)
class All:
    """Every image of the source."""


@dataclass(frozen=True)
class PerClass:
    """A keyed split: `count` images of every class, chosen by `split_seed` (independent of the run's seed) among those
    in `of`."""

    count: int
    split_seed: int = 0
    of: Subset = field(default_factory=All)


@dataclass(frozen=True)
class Listed:
    """A published label list, by name (`simclr-10`) or by path: image file names, or integer indices."""

    name: str


@dataclass(frozen=True)
class Complement:
    """Every image that is not in `of`."""

    of: Subset


Subset = All | PerClass | Listed | Complement


@dataclass(frozen=True)
class Shuffled:
    """Every epoch a fresh keyed permutation; the last partial batch of an epoch is left out."""


@dataclass(frozen=True)
class Balanced:
    """Each batch holds `per_class` images of each of `classes_global` classes, counted over all ranks.

    Classes come from a keyed permutation that is renewed when the next block would not fit; a class's images are
    drawn without replacement within a batch, afresh each time; a class of fewer images repeats them. Rows are
    class-major. Label columns number the classes of the batch, 0..classes_global-1, not the classes of the data set.
    """

    classes_global: int
    per_class: int


@dataclass(frozen=True)
class Sequential:
    """Ids in ascending order, once; the last batch may be short (evaluation, labelling a set)."""


Order = Shuffled | Balanced | Sequential


@dataclass(frozen=True)
class Stream:
    """One flow of images into a method: where from, how many a step over all ranks, in which order, seen how."""

    name: str
    source: str
    views: tuple[View, ...]
    order: Order
    batch_global: int
    ids: Subset = field(default_factory=All)
    visible: Subset = field(default_factory=All)  # images outside it carry label -1
    every_image: bool = False  # refuse data with an image that shows no label
    every_class: bool = False  # refuse data with a class of which no label shows


def parse_subset(text: str) -> Subset:
    """What users type for a set of images: `all`, `per-class=10`, `per-class=10@3` (split seed 3), `not:LIST`, or a
    list's name or path; also `per-class=10 of SET` and `not:SET`. Raises ValueError on a malformed count."""
    if text == "all":
        return All()
    if text.startswith("not:"):
        return Complement(parse_subset(text.removeprefix("not:")))
    if text.startswith("per-class="):
        counted, _, of = text.removeprefix("per-class=").partition(" of ")
        count, _, split_seed = counted.partition("@")
        if not count.isdecimal() or not (split_seed or "0").isdecimal() or int(count) == 0:
            raise ValueError(f"{text!r}: write per-class=COUNT or per-class=COUNT@SPLIT_SEED, whole numbers")
        return PerClass(int(count), int(split_seed or 0), parse_subset(of or "all"))
    return Listed(text)
