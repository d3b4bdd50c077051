"""`fastssl recipes`: what there is to train."""

from __future__ import annotations

import click


@click.command()
def recipes() -> None:
    """List the recipes."""
    from fastssl.recipes.resolve import recipes as all_recipes

    found = all_recipes()
    width = max(map(len, found))
    for name, recipe in found.items():
        click.echo(f"{name:{width}}  {' '.join((recipe.__doc__ or '').split())}")
