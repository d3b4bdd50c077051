"""`fastssl embed`: a run's features, labels and ids as arrays."""

from __future__ import annotations

from pathlib import Path

import click

from fastssl.commands.command import DATA, RUN, command
from fastssl.commands.command import out as out_option


@command()
@RUN
@DATA
@out_option("Folder for the arrays [RUN/embeddings].")
@click.option("--tap", help="Layer to take the features from [the backbone].")
def embed(run: Path, data: tuple[str, ...], out: Path | None, tap: str | None) -> None:
    """Write features, labels and ids of RUN's images as arrays."""
    from fastssl.engine.reopen import open_run
    from fastssl.evaluation.embed import embed as write_embeddings
    from loaders.store.data import NOTHING_HELD_OUT

    subject, _ = open_run(run, (*data, NOTHING_HELD_OUT) if data else ())  # all of what somebody wants embedded
    roles = sorted(subject.data.sources.keys() - {"train"} | {"unlabelled"})
    for role in roles:
        click.echo(write_embeddings(subject, role, tap or subject.method.taps[0], out or run / "embeddings"))
