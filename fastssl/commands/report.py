"""`fastssl report`: one page about a run."""

from __future__ import annotations

from pathlib import Path

import click

from fastssl.commands.command import DATA, RUN, command
from fastssl.commands.command import out as out_option


@command()
@RUN
@click.option("--compare", type=click.Path(path_type=Path, exists=True, file_okay=False), help="A run beside it.")
@DATA
@out_option("The page [RUN/report.html].")
def report(run: Path, compare: Path | None, data: tuple[str, ...], out: Path | None) -> None:
    """Write one self-contained HTML page about RUN: curves, crops, classes, embeddings. RUN may still be going."""
    from fastssl.report.training import write_report

    out = out or run / "report.html"
    write_report(run, compare, data, out)
    click.echo(out)
