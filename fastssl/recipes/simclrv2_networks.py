"""The networks of SimCLRv2's table 1 (arXiv 2006.10029) and what it reports of each: data for the recipes that are made
of it, and the functions that are made from one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastssl.methods.base import Stages
from fastssl.nn.encoders.resnet import SimclrResNet
from fastssl.nn.trunks.resnet import Depth
from fastssl.recipes.published import Published, published

SOURCE = "SimCLRv2, arXiv 2006.10029"


@dataclass(frozen=True)
class Network:
    """A row of table 1, in %: fine-tuned with 1, 10 and 100 % of the labels, a linear classifier, and supervised."""

    depth: Depth
    width: int
    selective_kernel: bool
    one_pct: float
    ten_pct: float
    every: float
    linear: float
    supervised: float

    @property
    def name(self) -> str:
        """`rn152w3_sk`."""
        return f"rn{self.depth}{f'w{self.width}' if self.width > 1 else ''}{'_sk' if self.selective_kernel else ''}"

    @property
    def encoder(self) -> SimclrResNet:
        return SimclrResNet(self.depth, self.width, self.selective_kernel)

    def fine_tuned(self) -> dict[str, float]:
        """By the share of the labels."""
        return {"1 %": self.one_pct, "10 %": self.ten_pct, "all": self.every}

    def pretrained(self, but: str = "") -> tuple[Published, ...]:
        """What is published of the first stage."""
        return tuple(
            Published(
                source=SOURCE,
                labels=labels,
                epochs=800,
                fine_tuned=value,
                linear=self.linear if labels == "all" else None,
                but=but,
            )
            for labels, value in self.fine_tuned().items()
        )


_ROWS = (
    Network(50, 1, False, 57.9, 68.4, 76.3, 71.7, 76.6),
    Network(50, 1, True, 64.5, 72.1, 78.7, 74.6, 78.5),
    Network(50, 2, False, 66.3, 73.9, 79.1, 75.6, 77.8),
    Network(50, 2, True, 70.6, 77.0, 81.3, 77.7, 79.3),
    Network(101, 1, False, 62.1, 71.4, 78.2, 73.6, 78.0),
    Network(101, 1, True, 68.3, 75.1, 80.6, 76.3, 79.6),
    Network(101, 2, False, 69.1, 75.8, 80.7, 77.0, 78.9),
    Network(101, 2, True, 73.2, 78.8, 82.4, 79.0, 80.1),
    Network(152, 1, False, 64.0, 73.0, 79.3, 74.5, 78.3),
    Network(152, 1, True, 70.0, 76.5, 81.3, 77.2, 79.9),
    Network(152, 2, False, 70.2, 76.6, 81.1, 77.4, 79.1),
    Network(152, 2, True, 74.2, 79.4, 82.9, 79.4, 80.4),
    Network(152, 3, True, 74.9, 80.1, 83.1, 79.8, 80.5),
)
NETWORKS = {network.name: network for network in _ROWS}
CIFAR10_DEPTHS: tuple[Depth, ...] = (18, 34, 50, 101, 152, 200)  # appendix G


def made(module: dict[str, Any], name: str, doc: str, make: Callable[[], Stages], *numbers: Published) -> None:
    """Put the recipe `name` into `module`, a module's names: it tells `doc` of itself and makes what `make` makes, and
    `numbers` are published of it."""

    def recipe() -> Stages:
        return make()

    recipe.__doc__, recipe.__name__, recipe.__qualname__, recipe.__module__ = doc, name, name, module["__name__"]
    module[name] = published(*numbers)(recipe)
