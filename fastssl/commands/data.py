"""`fastssl data`: what a path holds, what of it is left out, and what would train on it."""

from __future__ import annotations

from pathlib import Path

import click

from fastssl.commands.command import command


@command("data", computes=False)
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--contact-sheet", type=click.Path(path_type=Path), metavar="FILE.html", help="Show some images' crops.")
def data(path: str, as_json: bool, contact_sheet: Path | None) -> None:
    """Look at the images in PATH as training would: splits, classes, formats, sizes, what is left out or damaged, and
    the command that would train on them."""
    from rich.console import Console
    from rich.text import Text

    from fastssl.commands import contents

    found = contents.look(path)
    if contact_sheet is not None:
        contents.show(found, contact_sheet)
    if as_json:
        click.echo(contents.as_json(found))
    else:
        console = Console(markup=False, emoji=False, highlight=False)
        for part in contents.as_tables(found):
            console.print(part, soft_wrap=isinstance(part, Text))
