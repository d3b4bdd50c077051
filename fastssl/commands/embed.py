"""`fastssl embed`: a run's features, labels and ids as arrays."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastssl.commands.command import CPU_RANKS, DATA, GPUS, RUN, command, on_ranks
from fastssl.commands.command import out as out_option

if TYPE_CHECKING:
    import torch


@command()
@RUN
@DATA
@out_option("Folder for the arrays [RUN/embeddings].")
@click.option("--tap", help="Layer to take the features from [the backbone].")
@GPUS
@CPU_RANKS
def embed(
    run: Path, data: tuple[str, ...], out: Path | None, tap: str | None, gpus: int | None, cpu_ranks: int | None
) -> None:
    """Write features, labels and ids of RUN's images as arrays."""
    on_ranks(gpus, cpu_ranks, partial(_embedded, run, data, out or run / "embeddings", tap))


def _embedded(run: Path, data: tuple[str, ...], out: Path, tap: str | None, device: torch.device) -> None:
    """On each of the ranks; the first one writes, and says where."""
    from fastssl import dist
    from fastssl.engine.reopen import open_run
    from fastssl.evaluation.embed import embed as write_embeddings
    from loaders.store.data import NOTHING_HELD_OUT

    everything = (*data, NOTHING_HELD_OUT) if data else ()  # all of what somebody wants embedded
    subject, _ = open_run(run, everything, device=device)
    for role in sorted(subject.data.sources.keys() - {"train"} | {"unlabelled"}):
        path = write_embeddings(subject, role, tap or subject.method.taps[0], out)
        if dist.is_main():
            click.echo(path)
