"""`fastssl evaluate`: what a run's encoder is worth, by the protocols asked for."""

from __future__ import annotations

import json
from pathlib import Path

import click

from fastssl.commands.command import RUN, as_typed, command
from fastssl.errors import ConfigError

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
def evaluate(run: Path, protocols: tuple[str, ...], data: tuple[str, ...], labels: str | None, tap: str | None) -> None:
    """Score the encoder of RUN at its newest checkpoint; prints JSON."""
    from fastssl.engine.reopen import open_run
    from fastssl.evaluation import divide, load_protocol
    from loaders.store.apart import check_apart

    chosen = [load_protocol(name) for name in protocols]
    own, sets = divide(data, chosen)
    if tap and (others := sorted(set(protocols) - _WITH_TAP)):
        raise ConfigError(f"--tap {tap}: {others[0]} takes features where it always does; leave one of them out")
    subject, step = open_run(run, own, sets, labels, tap)
    for text in check_apart(subject.data):
        click.echo(f"warning: {text}", err=True)
    scores = {key: value for protocol in chosen for key, value in protocol.evaluate(subject).items()}
    provenance = subject.provenance(subject.looked_at)
    click.echo(json.dumps({**scores, "step": step, "provenance": provenance, "command": as_typed()}, indent=2))
