"""`fastssl profile`: where the time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastssl.commands.command import CHANGES, CPU_RANKS, DATA, GPUS, as_typed, command, ranks, settings
from fastssl.commands.command import out as out_option
from fastssl.errors import ConfigError

PROFILED_RECIPE = "paws.rn50_100ep"


@command()
@click.argument("recipe", default=PROFILED_RECIPE)
@DATA
@click.option("--only", "what", type=click.Choice(["loader", "step", "all"]), default="all", show_default=True)
@out_option("Folder for what is written [runs/RECIPE-profile].")
@click.option("--baseline", type=click.Path(path_type=Path), metavar="FILE", help="A profile.json; exit 1 if slower.")
@GPUS
@CPU_RANKS
@settings("how", "loader", "cache_gib")
@CHANGES
@click.option("--seconds", type=click.FloatRange(1), default=20.0, show_default=True, help="To measure for, about.")
@click.option("--trace", is_flag=True, help="Also write trace.json: torch's profiler over three steps.")
def profile(
    recipe: str,
    data: tuple[str, ...],
    what: str,
    out: Path | None,
    baseline: Path | None,
    gpus: int | None,
    cpu_ranks: int | None,
    changes: tuple[str, ...],
    seconds: float,
    trace: bool,
    **chosen: Any,
) -> None:
    """Say where the time goes, what binds, and what 64 GPUs would do. Needs neither data nor a GPU: RECIPE (default:
    paws.rn50_100ep) runs at a size that this machine can do."""
    from fastssl.api.on_ranks import on_ranks
    from fastssl.engine.job import Job
    from fastssl.profiling import profile as profiles
    from fastssl.recipes.resolve import canonical, resolve

    if trace and what == "loader":
        raise ConfigError("--trace shows the step: leave --stage loader out")
    recipe = canonical(recipe)
    job = Job(
        recipe=recipe,
        stages=resolve(recipe, changes),
        changes=changes,
        data=data,
        out=out or Path("runs") / f"{recipe.replace(':', '.')}-profile",
        seed=0,
        command=as_typed(),
        **ranks(gpus, cpu_ranks),
        **chosen,
    )
    profiles.run(job, what, seconds, trace, baseline, on_ranks)  # type: ignore[arg-type]
