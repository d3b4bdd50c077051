"""How few held-out images a choice may rest on: the runs of a sweep, scored on several numbers of them (S4L, arXiv
1905.03670, section 7 and figure 3).

    python -m tools.validation_sizes runs/SWEEP --per-class 1,5,40

Scores every run that the sweep kept on so many held-out images of each class, keyed and nested, none of which a run
learnt the label of; and tells how these accuracies agree with those on the most images: their correlation, that of
their ranks, and what the choice by few images loses. Writes `validation_sizes.json` into the sweep's folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from fastssl.commands.sweep import RECORD
from fastssl.engine.reopen import open_run
from fastssl.errors import ConfigError, FastsslError
from fastssl.evaluation import load_protocol
from fastssl.run_dir.files import read_json
from fastssl.run_dir.written import read_run
from loaders.errors import LoaderError
from loaders.files import write_file

TABLE = "validation_sizes.json"


def scores(sweep: Path, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Accuracy of each run by the number of images of a class, and how many images these are in all. Raises ConfigError
    where there is no sweep or too little of it, StoreError where a class has fewer images."""
    if not (sweep / RECORD).exists():
        raise ConfigError(f"{sweep} holds no sweep: it has no {RECORD}")
    record = read_json(sweep / RECORD)
    names = [name for name, row in record["runs"].items() if not row.get("diverged")]
    if len(names) < 3:
        raise ConfigError(f"{sweep} has {len(names)} finished runs; three are the least that can agree")
    protocol = load_protocol(record["score"].removesuffix("_top1").replace("_", "-"))
    found: dict[str, Any] = {"score": record["score"], "images": {}, "runs": {name: {} for name in names}}
    for name in names:
        labels = read_run(sweep / name).stages[-1].config.labels
        others = labels.removeprefix("not:") if labels.startswith("not:") else f"not:{labels}"
        for size in sizes:
            subject, _ = open_run(sweep / name, (), held_out=f"per-class={size} of {others}")
            result = protocol.evaluate(subject)
            found["runs"][name][str(size)] = result[record["score"]]
            found["images"][str(size)] = subject.provenance(("validation",))["validation"]["count"]
    return found


def agreement(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By size, against the largest: `correlation` (Pearson's) and `rank_correlation` (Spearman's) of the runs'
    accuracies, and `lost`, by how much the run that is best on so many images is worse on the most."""
    sizes = list(found["images"])
    table = np.array([[row[size] for size in sizes] for row in found["runs"].values()])
    most = table[:, -1]
    return {
        size: {
            "correlation": _correlation(column, most),
            "rank_correlation": _correlation(_ranks(column), _ranks(most)),
            "lost": float(most.max() - most[column.argmax()]),
        }
        for size, column in zip(sizes, table.T, strict=True)
    }


def _ranks(values: np.ndarray) -> np.ndarray:
    """Mean ranks of equal values."""
    return np.array([((values < v).sum() + (values <= v).sum() - 1) / 2 for v in values])


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """0 where one of them is the same for all runs."""
    a, b = one - one.mean(), other - other.mean()
    length = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / length if length else 0.0


@click.command()
@click.argument("sweep", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--per-class", "sizes", default="1,5", help="Held-out images of a class, ascending, by commas.")
def main(sweep: Path, sizes: str) -> None:
    """Score the runs of SWEEP on several numbers of held-out images."""
    try:
        counts = tuple(sorted(int(size) for size in sizes.split(",")))
    except ValueError:
        raise click.ClickException(f"--per-class {sizes!r}: write whole numbers, as 1,5,40") from None
    try:
        found = scores(sweep, counts)
    except (FastsslError, LoaderError) as error:
        raise click.ClickException(str(error)) from error
    found["agreement"] = agreement(found)
    write_file(sweep / TABLE, json.dumps(found, indent=2) + "\n")
    for size, agrees in found["agreement"].items():
        told = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in agrees.items())
        click.echo(f"{found['images'][size]:,} images ({size} a class): {told}")


if __name__ == "__main__":
    main()
