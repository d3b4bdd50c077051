"""What recipes for one's own images follow from: how many there are, of how many classes, how large, and on what they
are learnt from; and the choices that are made of it.

The choices are few, and each is said in a line. They depend on the data and on the kind of device, not on a machine's
cores or load, so that a run continues anywhere. The sizes for CPUs are meant for some 40 minutes on two cores; the ones
for GPUs have not run on any yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from fastssl.errors import ConfigError
from fastssl.nn.encoders.resnet import ResNet
from loaders.plan.views import IMAGENET, SIGNED, Centre, Pixels, View

LEAST_IMAGES = 100  # in all, for networks that know nothing yet: below, an epoch is a step or two
LEAST_SIDE = 32  # pixels
SIDES = {"cpu": (96, 64, 48, 32), "cuda": (224, 160, 128, 96, 64, 48, 32)}  # of crops
SEEN = {"cpu": 200_000, "cuda": 100_000_000}  # images in all epochs
MOST_EPOCHS = {"cpu": 200, "cuda": 400}
MOST_BATCH = {"cpu": 128, "cuda": 1024}
MOST_SUPPORT = {"cpu": 256, "cuda": 1680}  # labelled images a step


@dataclass(frozen=True)
class Images:
    """Of a user's data, as training sees it.

    num_images      without regard to labels, of the stream that is learnt from
    num_labelled    that show their label
    num_classes     among these
    smallest_class  labelled images of the class that has fewest
    side            the median of the images' shorter sides, in pixels
    from_weights    whether training starts from another run's
    """

    num_images: int
    num_labelled: int
    num_classes: int
    smallest_class: int
    side: int
    channels: int = 3
    device: Literal["cpu", "cuda"] = "cpu"
    from_weights: bool = False


TYPICAL = Images(num_images=10_000, num_labelled=1_000, num_classes=10, smallest_class=100, side=256)


@dataclass(frozen=True)
class Choices:
    """What follows from `images`. Raises ConfigError where there are too few of them, or they are too small."""

    images: Images

    def __post_init__(self) -> None:
        of = self.images
        least = 2 if of.from_weights else LEAST_IMAGES
        if of.num_images < least:
            raise ConfigError(f"{of.num_images} images to learn from are too few: {least} at least")
        if of.side < LEAST_SIDE:
            raise ConfigError(
                f"the images' shorter side is {of.side} pixels at the median, less than the smallest crops: "
                f"{LEAST_SIDE} at least"
            )

    def need_classes(self, recipe: str) -> None:
        """Raise ConfigError where there is nothing to learn classes from."""
        if not self.images.num_labelled:
            raise ConfigError(
                f"{recipe} learns from labels, and no image has one: give --data labelled=PATH with a folder for each "
                "class, or train without any: simclrv2.mine"
            )
        if self.images.num_classes < 2:
            raise ConfigError(f"{recipe}: all labelled images are of one class, so there is nothing to tell apart")

    @property
    def on_cpu(self) -> bool:
        return self.images.device == "cpu"

    @property
    def crop(self) -> int:
        """Pixels of a crop's side: the largest that most images fill."""
        return next(side for side in SIDES[self.images.device] if side <= self.images.side)

    @property
    def pixels(self) -> Pixels:
        return IMAGENET if self.images.channels == 3 else SIGNED

    @property
    def eval_view(self) -> View:
        return View("eval", self.crop, Centre(resize=round(self.crop * 8 / 7)), pixels=self.pixels)

    @property
    def encoder(self) -> ResNet:
        stem: Literal["cifar", "imagenet"] = "imagenet" if self.crop >= 64 else "cifar"
        return ResNet(10, stem=stem, base_width=32) if self.on_cpu else ResNet(50 if self.crop >= 96 else 18, stem=stem)

    @property
    def batch(self) -> int:
        """Images a step: at least eight steps an epoch."""
        return min(MOST_BATCH[self.images.device], max(8, _power_of_two(self.images.num_images // 8)))

    @property
    def labelled_batch(self) -> int:
        return min(MOST_BATCH[self.images.device], max(2, _power_of_two(self.images.num_labelled // 2)))

    @cached_property
    def support(self) -> tuple[int, int]:
        """Classes a step, and images of each: all classes where they fit, for an image whose class is not among a
        step's supports is told to be of another."""
        of, most = self.images, MOST_SUPPORT[self.images.device]
        each = max(1, min(of.smallest_class, 7, max(2, most // of.num_classes)))  # 7: as PAWS's authors have it
        classes = min(of.num_classes, max(2, most // each))
        return classes - (classes % 8 if classes >= 16 else 0), each  # eights divide among ranks

    def epochs(self, num_images: int) -> int:
        """Passes over that many images."""
        device = self.images.device
        return max(1, min(MOST_EPOCHS[device], SEEN[device] // num_images))

    def said(self) -> list[str]:
        """A line a choice, with what it follows from and the setting that changes it."""
        of, where = self.images, "a CPU" if self.on_cpu else "GPUs"
        lines = [
            f"images: {of.num_images:,}, of which {of.num_labelled:,} show one of {of.num_classes:,} classes; shorter "
            f"side {of.side} pixels at the median",
            f"crops of {self.crop} pixels: the largest for {where} that most images fill (--set eval_view.size=...)",
            f"network {self.encoder.name}: for {where} (--set 'encoder=resnet(18)')",
            f"at least eight steps an epoch: up to {self.batch} images a step (--set batch_global=...)",
            f"some {SEEN[of.device]:,} images in all, at most {MOST_EPOCHS[of.device]} epochs (--set epochs=...)",
        ]
        if of.num_classes > 1:
            classes, each = self.support
            lines.append(
                f"up to {classes} classes of {each} images a step: the smallest class has {of.smallest_class} (--set "
                "classes_global=..., images_per_class=...)"
            )
        return lines


def _power_of_two(most: int) -> int:
    """The largest up to `most`, which is at least 1."""
    return 1 << (max(1, most).bit_length() - 1)
