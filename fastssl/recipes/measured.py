"""What was measured of the recipes with this code, as data: from this come the tables of the documentation.

A number stands here only where its command, versions and spread are in a file of `benchmarks/results/`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Measured:
    """An accuracy in %, top-1 on the data set's held-out images: of one run, or the mean over `seeds`.

    how      what reads it out: "soft nearest neighbours", "its classifier", ...
    spread   standard deviation over seeds, for one run None
    took     wall time of a run, and on what
    commit   of the code that ran; empty where it was not noted
    results  the file of benchmarks/results that tells how
    labels   whose label was seen, where these are not the recipe's
    """

    top1: float
    how: str
    results: str
    spread: float | None = None
    seeds: int = 1
    took: str = ""
    commit: str = ""
    labels: str = ""
    but: str = ""  # how what was trained differs from the recipe

    def __str__(self) -> str:
        """`96.4 ± 1.4 by soft nearest neighbours (3 seeds)`."""
        spread = "" if self.spread is None else f" ± {self.spread}"
        seeds = "single seed" if self.seeds == 1 else f"{self.seeds} seeds"
        besides = "".join(f"; {each}" for each in (self.labels and f"labels {self.labels}", self.but) if each)
        return f"{self.top1}{spread} by {self.how} ({seeds}{besides})"


_NN, _CLASSIFIER, _LINEAR = "soft nearest neighbours", "its classifier", "a linear classifier"
_S4L, _SEMPPL = "s4l_cifar10_cpu_202611.md", "semppl_cifar10_cpu_202611.md"
_DIGITS, _SMALL = "digits_cpu_202611.md", "cifar10_small_cpu_202611.md"
_PROTOCOLS = "protocols_cifar10_cpu_202611.md"
_SPLIT = "paws-cifar10-4000-split-91"  # all were measured with these


def _s4l(top1: float, spread: float) -> Measured:
    took = "7 min, one core"
    told = {"how": _CLASSIFIER, "results": _S4L, "took": took, "commit": "f9cb37a", "labels": _SPLIT}
    return Measured(top1=top1, spread=spread, seeds=3, **told)


def _semppl(top1: float, spread: float) -> Measured:
    took = "7 min, one core"
    told = {"how": _LINEAR, "results": _SEMPPL, "took": took, "commit": "f9cb37a", "labels": _SPLIT}
    return Measured(top1=top1, spread=spread, seeds=3, **told)


def _after_paws(top1: float, spread: float, how: str, but: str = "") -> Measured:
    took = "5 min, one core"
    told = {"how": how, "results": _PROTOCOLS, "took": took, "labels": _SPLIT, "but": but}
    return Measured(top1=top1, spread=spread, seeds=3, **told)


MEASURED: dict[str, Measured] = {
    "paws.digits": Measured(
        top1=96.4, spread=1.4, seeds=3, how=_NN, results=_DIGITS, took="40 s, two cores", commit="d22fc25"
    ),
    "paws.digits_20": Measured(
        top1=94.8, spread=1.9, seeds=3, how=_NN, results="digits_few_labels.md", took="50 s, one core"
    ),
    "paws.digits_vit": Measured(
        top1=95.2, spread=0.5, seeds=3, how=_NN, results="digits_vit_cpu_202611.md", took="57 CPU seconds"
    ),
    "supervised.digits": Measured(
        top1=93.3, spread=0.3, seeds=3, how=_CLASSIFIER, results=_DIGITS, took="20 s, one core"
    ),
    "paws.cifar10_small": Measured(
        top1=74.7, how=_NN, results=_SMALL, took="40 min, two cores", commit="967e93e", labels=_SPLIT
    ),
    "supervised.cifar10_small": Measured(
        top1=78.3, how=_CLASSIFIER, results=_SMALL, took="40 min, two cores", commit="967e93e", labels=_SPLIT
    ),
    "suncet.cifar10_small": _after_paws(76.8, 0.1, _NN),
    "supervised.cifar10_finetune": _after_paws(76.8, 0.2, _CLASSIFIER),
    "distil.cifar10_small": _after_paws(74.6, 0.3, _CLASSIFIER, "width 8, 15 epochs"),
    "semppl.cifar10_small": _semppl(51.0, 1.4),
    "relicv2.cifar10_small": _semppl(49.9, 2.0),
    "s4l.supervised_cifar10_small": _s4l(76.0, 0.3),
    "s4l.pseudo_label_cifar10_small": _s4l(68.1, 0.6),
    "s4l.rotation_cifar10_small": _s4l(63.4, 0.3),
    "s4l.exemplar_cifar10_small": _s4l(72.0, 0.5),
    "s4l.vat_cifar10_small": _s4l(60.2, 0.2),
    "s4l.vat_entmin_cifar10_small": _s4l(60.8, 0.1),
    "s4l.moam_cifar10_small": _s4l(72.2, 0.4),
}
