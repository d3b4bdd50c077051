"""`fastssl predict`: the class of every image of a folder, as a table, and as a page to label by."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import click

from fastssl.commands.command import RUN, command
from fastssl.errors import ConfigError


@command()
@RUN
@click.option("--data", multiple=True, required=True, metavar="PATH", help="Images, or labelled=PATH: neighbours.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The table, FILE.csv.")
@click.option("--review", type=click.Path(path_type=Path), help="Also a page of thumbnails, the least sure first.")
def predict(run: Path, data: tuple[str, ...], out: Path, review: Path | None) -> None:
    """Say the class of every image, by RUN's classifier or its nearest neighbours. RUN: a run or an exported folder."""
    from fastssl.engine.reopen import open_networks
    from fastssl.evaluation.predict import images_at
    from fastssl.evaluation.predict import predict as predictions_of
    from fastssl.report.review import review_page

    images = [spec for spec in data if not spec.startswith("labelled=")]
    if len(images) != 1:
        raise ConfigError("--data: give the images once, as one path; labelled=PATH are those to find neighbours among")
    source = images_at(images[0])
    found = predictions_of(open_networks(run, tuple(spec for spec in data if spec not in images)), source)
    _write(out, as_csv(found.files, found.classes, found.probability.tolist(), found.runners_up), "--out")
    click.echo(f"{out}: {len(found):,} images, {len(set(found.classes)):,} of {len(found.class_names):,} classes")
    if review is not None:
        _write(review, review_page(run, source, found), "--review")
        click.echo(review)


def as_csv(files: tuple[str, ...], classes: list[str], probability: list[float], runners_up: list[str]) -> str:
    """The table, a row an image."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("file", "class", "probability", "runner_up"))
    for file, name, p, second in zip(files, classes, probability, runners_up, strict=True):
        rows.writerow((file, name, f"{p:.6f}", second))
    return text.getvalue()


def _write(path: Path, text: str, option: str) -> None:
    from loaders.files import write_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, text)
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be written: {error.strerror}") from error
