"""What others report of the recipes, as data: from this come `fastssl recipes` and the tables of the documentation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from fastssl.methods.base import Epochs, Stages

Recipe = TypeVar("Recipe", bound=Callable[[], Stages])

_BY_RECIPE: dict[Callable[[], Stages], tuple[Published, ...]] = {}


@dataclass(frozen=True, kw_only=True)
class Published:
    """Accuracies in % that `source` gives, top-1 on the data set's validation images unless they say otherwise.

    labels   the share of the labels that was seen in training or fine-tuning: "1 %", "all", "4,000"
    epochs   of the recipe's first stage; where it fine-tunes a run, of that run's pre-training
    """

    source: str
    labels: str
    epochs: int
    nearest: float | None = None  # by soft nearest neighbours
    linear: float | None = None  # by a linear classifier
    fine_tuned: float | None = None
    classifier: float | None = None  # of the classifier that the recipe itself trains
    top5: float | None = None  # of the same
    spread: float | None = None  # standard deviation over seeds
    but: str = ""  # how what was trained differs from the recipe

    def __str__(self) -> str:
        """`73.9 % fine-tuned and 71.0 % by nearest neighbours, with 10 % of the labels after 100 epochs (PAWS)`."""
        spread = "" if self.spread is None else f" +- {self.spread}"
        measured = {
            "fine-tuned": self.fine_tuned,
            "by nearest neighbours": self.nearest,
            "linear": self.linear,
            "top-1": self.classifier,
            "top-5": self.top5,
        }
        numbers = " and ".join(f"{value}{spread} % {how}" for how, value in measured.items() if value is not None)
        but = f"; {self.but}" if self.but else ""
        return f"{numbers}, with {self.labels} of the labels after {self.epochs} epochs ({self.source}{but})"


def published(*numbers: Published) -> Callable[[Recipe], Recipe]:
    """Say what is published of the recipe below."""

    def told(recipe: Recipe) -> Recipe:
        _BY_RECIPE[recipe] = numbers
        return recipe

    return told


def published_of(recipe: Callable[[], Stages]) -> tuple[Published, ...]:
    """What is published of `recipe`; nothing for most."""
    return _BY_RECIPE.get(recipe, ())


def cells(recipe: Callable[[], Stages]) -> tuple[str, str]:
    """For a table: accuracies by nearest neighbours, and fine-tuned or of the recipe's classifier. Several are divided
    by slashes, in the order in which they are published, those of a run of another length than the recipe's with that
    length; – where there is none."""
    numbers, first = published_of(recipe), recipe()[0]
    fine_tunes = "init" in first.needs
    lengths = [
        "" if fine_tunes or Epochs(each.epochs) == first.length else f" ({each.epochs:,} ep.)" for each in numbers
    ]
    nearest = [_cell(n, n.nearest) + length for n, length in zip(numbers, lengths, strict=True)]
    trained = [_cell(n, n.fine_tuned or n.classifier) + length for n, length in zip(numbers, lengths, strict=True)]
    return _joined(nearest), _joined(trained)


def _joined(found: list[str]) -> str:
    return " / ".join(cell for cell in found if cell[0] != " ") or "–"


def _cell(of: Published, value: float | None) -> str:
    if value is None:
        return " "
    return f"{value}" if of.spread is None else f"{value} ± {of.spread}"
