"""`fastssl export`: a run's networks for others."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from fastssl.commands.command import RUN, command
from fastssl.commands.command import out as out_option


@command()
@RUN
@out_option("Folder for the files [RUN/export].")
@click.option("--checkpoint", "step", type=click.IntRange(0), metavar="STEP", help="Of this step [the newest].")
@click.option("--network", type=click.Choice(["online", "target"]), default="online", show_default=True)
@click.option("--format", "form", type=click.Choice(["safetensors", "onnx"]), default="safetensors",
              show_default=True, help="onnx: the trunk as that, too; the extra `onnx`.")  # fmt: skip
def export(run: Path, out: Path | None, step: int | None, network: str, form: Literal["safetensors", "onnx"]) -> None:
    """Write RUN's trunk with torchvision's key names, its heads, and a model card: a folder that needs no fastssl."""
    from fastssl.export.folder import export as write_export

    click.echo(write_export(run, out or run / "export", step, network, form))
