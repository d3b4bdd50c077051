"""Every recipe, and every sweep that the project writes down, at the door: the published lists on the names that they
choose from. The images themselves are never opened, so there are none.

S4L's lists are the real ones where FASTSSL_LISTS names a folder that has them; else others stand in that share images
with PAWS's held-out ones, as the real ones do.
"""

from __future__ import annotations

import functools
import hashlib
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from fastssl.commands import dry_run
from fastssl.commands import sweep as sweeps
from fastssl.costs.trace import Untraceable
from fastssl.engine.job import Job
from fastssl.errors import ConfigError
from fastssl.recipes import s4l
from fastssl.recipes.resolve import recipes, resolve
from loaders import loader
from loaders.errors import StoreError
from loaders.labels import published, subsets
from loaders.store.data import DataSets
from loaders.store.digits import open_digits
from loaders.store.source import ArraySource, digest
from tools import papers_page

SHARED = {"s4l-1": 105, "s4l-10": 1141}  # images that S4L's lists share with paws-heldout
PER_CLASS = {"s4l-1": 13, "s4l-10": 128}
RECIPES = [name for name in recipes() if not name.endswith(".mine")]  # those follow the data that one has


@dataclass(frozen=True, eq=False)
class Names:
    """A source of encoded images of which nothing but names, classes and sizes can be had."""

    name: str
    labels: np.ndarray
    names: tuple[str, ...]
    class_names: tuple[str, ...]
    channels = 3
    unreadable = {}  # noqa: RUF012  (none)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def sizes(self) -> np.ndarray:
        return np.full((len(self), 2), (375, 500), np.int32)

    def name_of(self, i: int) -> str:
        return self.names[i]

    path_of = name_of

    def files(self) -> list[Path]:
        return []

    def fingerprint(self) -> str:
        return digest(self.class_names, self.labels)

    def jpeg(self, i: int) -> bytes:
        raise AssertionError("an image was opened")


class Foreground:
    """Masks of which only their shares are looked at."""

    name = about = "masks"

    def __init__(self, count: int):
        self.foreground = np.ones(count)

    def __len__(self) -> int:
        return len(self.foreground)

    def fingerprint(self) -> str:
        return ""


def of_names(name: str, names: list[str], class_names: tuple[str, ...]) -> Names:
    number = {class_name: c for c, class_name in enumerate(class_names)}
    return Names(name, np.array([number[image.partition("_")[0]] for image in names]), tuple(names), class_names)


def first_of_each_class(names: list[str], count: int) -> list[str]:
    taken: dict[str, list[str]] = {}
    for name in names:
        taken.setdefault(name.partition("_")[0], []).append(name)
    return [name for class_names in taken.values() for name in class_names[:count]]


def s4ls(name: str, folder: Path, ten: list[str], held: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """S4L's list, or one in its place of as many images of each class."""
    try:
        return subsets.entries_of(subsets._read_list(name, ())[1])
    except StoreError:
        listed = [*held[:: len(held) // SHARED[name]][: SHARED[name]], *first_of_each_class(ten, PER_CLASS[name] - 2)]
        content = "\n".join(listed).encode()
        (folder / f"{name}.txt").write_bytes(content)
        entry = replace(published.PUBLISHED[name], sha256=hashlib.sha256(content).hexdigest(), as_lines="")
        monkeypatch.setitem(published.PUBLISHED, name, entry)
        return listed


@pytest.fixture(scope="module")
def module_patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def sets(test_data, tmp_path_factory, module_patch):
    """The data sets that recipes are of: the names on the lists and CIFAR-10's indices; nothing is fetched."""

    def no_network(url):
        raise OSError("no network")

    def not_traced(stage, facts, world):
        raise Untraceable("another test's")

    module_patch.setattr(published, "_fetch", no_network)
    module_patch.setattr(dry_run, "traced", not_traced)
    module_patch.setattr(loader, "resolve", functools.cache(subsets.resolve))  # the lists are long
    folder, splits = tmp_path_factory.mktemp("lists"), test_data / "splits"
    ten, held = (
        subsets.entries_of(published.read_published(name, [splits])[1]) for name in ("simclr-10", "paws-heldout")
    )
    of_s4l = [s4ls(name, folder, ten, held, module_patch) for name in SHARED]
    names = sorted({*ten, *held, *of_s4l[0], *of_s4l[1]})
    class_names = tuple(sorted({name.partition("_")[0] for name in names}))
    assert len(class_names) == 1000
    train = of_names("ImageNet's names", names, class_names)
    validation = of_names("validation", [f"{name}_v.JPEG" for name in class_names], class_names)
    search = (splits, folder)
    nothing, rng = np.zeros((1, 32, 32, 3), np.uint8), np.random.default_rng(0)

    def cifar10(count):
        images = np.broadcast_to(nothing, (count, 32, 32, 3))
        return ArraySource(f"{count} of CIFAR-10", images, rng.integers(0, 10, count), tuple("abcdefghij"))

    digits = dict(zip(("train", "validation"), open_digits(), strict=True))
    return {
        "imagenet": DataSets({"train": train, "validation": validation}, search, {"train": Foreground(len(train))}),
        "cifar10": DataSets({"train": cifar10(50_000), "validation": cifar10(10_000)}, search),
        "digits": DataSets(digits, search),
    }


def job_of(name: str, changes: tuple[str, ...] = ()) -> Job:
    return Job(name, resolve(name, changes), changes, ("stub",), Path("out"), 0, "cpu", 1)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_passes_its_door(name, sets, monkeypatch):
    """Catches a recipe whose list, classes or number of images a class do not fit one another, and one that its own
    evaluation refuses: the ImageNet recipes are otherwise tried by those who have ImageNet."""
    data = sets[resolve(name)[-1].config.dataset]
    monkeypatch.setattr(dry_run, "open_data", lambda specs: data)
    monkeypatch.setattr(dry_run, "check_apart", lambda data: [])
    told = dry_run.describe(job_of(name))
    assert "steps" in told and "no data" not in told and "not found" not in told, told


def s4ls_sweeps() -> list[tuple[str, tuple[str, ...], tuple[str, ...], str | None]]:
    """(recipe, changes, what is swept, held-out images): the two commands of the recipes' header, for each of the terms
    that it names, on images by default and on as many as the paper chose by for 1 %."""
    text, found = (s4l.__doc__ or "").replace("\\\n", ""), []
    for command in re.findall(r"^ +fastssl train (s4l.rotation .*)$", text, re.MULTILINE):
        for recipe, term in (("rotation", "rotation"), ("exemplar", "exemplar"), ("vat", "vat"), ("vat_entmin", "vat")):
            words = shlex.split(command.replace("rotation.weight", f"{term}.weight"))
            options = list(zip(words[1::2], words[2::2], strict=True))
            labels = dict(options).get("--labels", "s4l-10")
            changes = (f"labels={labels}", *(value for option, value in options if option == "--set"))
            swept = tuple(value for option, value in options if option == "--sweep")
            for held_out in (None, f"per-class=5 of not:{labels}"):
                found.append((f"s4l.{recipe}", changes, swept, held_out))
    return found


def sweeps_of_the_page() -> list[tuple[str, tuple[str, ...], tuple[str, ...], str | None]]:
    """The same of what docs/papers.md sweeps."""
    found = []
    for row in (row for paper in papers_page.PAPERS for row in paper.rows):
        if swept := tuple(re.findall(r"--sweep ([\w.]+=[\w.,]*\w)", row.how)):
            found.append((re.findall(r"`([\w.]+)`", row.how)[0], (), swept, None))
    return found


SWEEPS = [*s4ls_sweeps(), *sweeps_of_the_page()]


def test_the_sweeps_are_found():
    assert len(SWEEPS) == 18 and len({name for name, *_ in SWEEPS}) == 6


@pytest.mark.parametrize(("name", "changes", "swept", "held_out"), SWEEPS)
def test_every_sweep_passes_its_door(name, changes, swept, held_out, sets):
    """Catches held-out images that are among the labelled ones: S4L's lists share some with PAWS's held-out images, and
    a sweep by these is refused."""
    sweep = sweeps.prepare(job_of(name, changes), swept, held_out)
    images = sweeps._checked(sweep, sets["imagenet"])
    assert images.count == (5_000 if held_out else 12_000) and len(sweep.runs) >= 10


@pytest.mark.parametrize("labels", SHARED)
def test_held_out_images_that_are_labelled_are_refused(labels, sets):
    """As many as the list shares with them; else the test above could not fail."""
    sweep = sweeps.prepare(job_of("s4l.rotation", (f"labels={labels}",)), ("rate.peak=.1,.3",), "paws-heldout")
    with pytest.raises(ConfigError, match=f"{SHARED[labels]} of its 12000 images are among the training labels"):
        sweeps._checked(sweep, sets["imagenet"])
