"""`fastssl recipes`: what there is to train."""

from __future__ import annotations

import sys

import click

from fastssl.commands.help import Command


@click.command(cls=Command)
def recipes() -> None:
    """List the recipes and what is published of each; piped, their names alone."""
    from fastssl.recipes.published import published_of
    from fastssl.recipes.resolve import recipes as all_recipes

    found = all_recipes()
    if not sys.stdout.isatty():
        click.echo("\n".join(found))
        return
    width = max(map(len, found))
    for name, recipe in found.items():
        click.echo(f"{name:{width}}  {' '.join((recipe.__doc__ or '').split())}")
        for each in published_of(recipe):
            click.echo(f"{'':{width}}  {each}")
