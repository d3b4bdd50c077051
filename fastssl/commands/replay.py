"""`fastssl replay`: a step that was not finite, once more."""

from __future__ import annotations

from pathlib import Path

import click

from fastssl.commands.command import DATA, command, ranks


@command()
@click.argument("dump", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@DATA
@click.option("--gpus", type=click.IntRange(1), help="Ranks, one a GPU [as the run had].")
@click.option("--cpu-ranks", type=click.IntRange(1), help="Ranks on CPUs [as the run had].")
def replay(dump: Path, data: tuple[str, ...], gpus: int | None, cpu_ranks: int | None) -> None:
    """Do a step again that was not finite, from the last checkpoint before it, and say where it first shows."""
    from fastssl.api.on_ranks import on_ranks
    from fastssl.engine.reopen import job_to_replay

    asked = ranks(gpus, cpu_ranks) if gpus or cpu_ranks else {"device": None, "world": None}
    on_ranks(job_to_replay(dump, data, **asked))
