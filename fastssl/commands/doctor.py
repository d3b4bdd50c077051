"""`fastssl doctor`: what this machine can do."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from fastssl.commands.help import Command


@click.command(cls=Command)
@click.option("--data", type=click.Path(path_type=Path), help="Also time reading this file, or one in this folder.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(data: Path | None, as_json: bool) -> None:
    """Look at this machine: what training can use, what is in the way, what to do about it."""
    from rich.console import Console

    from fastssl.commands import examination

    rows = examination.examine(data)
    if as_json:
        click.echo(examination.as_json(rows))
    else:
        Console(markup=False, emoji=False).print(examination.as_table(rows))
    sys.exit(0 if examination.usable(rows) else 1)
