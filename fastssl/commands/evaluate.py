"""`fastssl evaluate`: what a run's encoder is worth, by the protocols asked for."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastssl.commands.command import CPU_RANKS, GPUS, RUN, as_typed, command, on_ranks
from fastssl.errors import ConfigError

if TYPE_CHECKING:
    import torch

_WITH_TAP = {"soft-nn", "knn", "linear"}


class _Protocols(click.Option):
    """Its help names the protocols that there are; to find them takes torch, so only where help is asked for."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        from fastssl.evaluation import protocol_names

        self.help = f"One or several of {', '.join(protocol_names())}."
        return super().get_help_record(ctx)


@command()
@RUN
@click.option("--protocol", "protocols", cls=_Protocols, multiple=True, required=True, metavar="NAME")
@click.option(
    "--data",
    multiple=True,
    metavar="[KEY=]PATH",
    help="KEY: labelled, validation, or a published set that the protocol measures on: imagenet_v2, food101, ...",
)
@click.option("--labels", help="Images to learn from: all, per-class=N, a list's name or path [as the run did].")
@click.option("--tap", help="Where soft-nn, knn and linear take features: backbone, h, z, ... [each its own].")
@GPUS
@CPU_RANKS
def evaluate(
    run: Path,
    protocols: tuple[str, ...],
    data: tuple[str, ...],
    labels: str | None,
    tap: str | None,
    gpus: int | None,
    cpu_ranks: int | None,
) -> None:
    """Score the encoder of RUN at its newest checkpoint; prints JSON."""
    from fastssl.evaluation import divide, load_protocol

    own, sets = divide(data, [load_protocol(name) for name in protocols])
    if tap and (others := sorted(set(protocols) - _WITH_TAP)):
        raise ConfigError(f"--tap {tap}: {others[0]} takes features where it always does; leave one of them out")
    asked = {"run": run, "data": own, "sets": sets, "labels": labels, "tap": tap}
    on_ranks(gpus, cpu_ranks, partial(_scored, asked, protocols, as_typed()))


def _scored(asked: dict[str, Any], protocols: tuple[str, ...], command: str, device: torch.device) -> None:
    """On each of the ranks; the first one says it."""
    from fastssl import dist
    from fastssl.engine.apart import warnings_of
    from fastssl.engine.reopen import open_run
    from fastssl.evaluation import load_protocol

    subject, step = open_run(**asked, device=device)
    warnings = warnings_of(subject.data)
    for text in warnings if dist.is_main() else ():
        click.echo(f"warning: {text}", err=True)
    scores = {key: value for name in protocols for key, value in load_protocol(name).evaluate(subject).items()}
    provenance = subject.provenance(subject.looked_at)
    if dist.is_main():
        click.echo(json.dumps({**scores, "step": step, "provenance": provenance, "command": command}, indent=2))
