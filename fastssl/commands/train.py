"""`fastssl train`: a recipe on data, with one seed or several; a sweep; what either would do; a submitted job."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastssl.commands.command import (
    CHANGES,
    CPU_RANKS,
    DATA,
    GPUS,
    Function,
    as_typed,
    command,
    ranks,
    settings,
)
from fastssl.commands.command import (
    out as out_option,
)
from fastssl.errors import ConfigError

if TYPE_CHECKING:
    from fastssl.commands.sweep import Sweep
    from fastssl.engine.job import Job

DEFAULT_RECIPE = "paws.digits"
SUBMISSION = {  # parameter of `launch.slurm.submit` -> its option; docs/gpus.md and --submit's help tell of them
    "nodes": click.option("--nodes", type=click.IntRange(1), hidden=True),
    "gpus_per_node": click.option("--gpus-per-node", type=click.IntRange(1), hidden=True),
    "cpus_per_rank": click.option("--cpus-per-rank", type=click.IntRange(1), hidden=True),
    "partition": click.option("--partition", hidden=True),
    "time_limit": click.option("--time", "time_limit", metavar="[D-]H:MM:SS", hidden=True),
}


def _submission(function: Function) -> Function:
    for option in reversed(SUBMISSION.values()):
        function = option(function)
    return function


@command()
@click.argument("recipe", default=DEFAULT_RECIPE)
@DATA
@out_option("Run directory [runs/RECIPE-seedK].")
@GPUS
@CPU_RANKS
@settings()
@click.option("--labels", help="Labelled images: all, per-class=N, a list, a path.")
@CHANGES
@click.option("--sweep", "swept", multiple=True, metavar="KEY=V1,V2,...", help="A run for each value; then the best.")
@click.option("--held-out", metavar="SET", help="--sweep: images to choose by [a list, 12 a class].")
@click.option("--seeds", default="0", show_default=True, help="Seed, or several separated by commas.")
@click.option("--dry-run", is_flag=True, help="Say what would be done; needs no data or devices.")
@click.option(
    "--submit",
    type=click.Choice(["slurm"]),
    help="As a job; with --time, --nodes, --gpus-per-node, --cpus-per-rank, --partition.",
)
@_submission
def train(
    recipe: str,
    data: tuple[str, ...],
    out: Path | None,
    gpus: int | None,
    cpu_ranks: int | None,
    labels: str | None,
    changes: tuple[str, ...],
    swept: tuple[str, ...],
    held_out: str | None,
    seeds: str,
    dry_run: bool,
    submit: str | None,
    **others: Any,
) -> None:
    """Train RECIPE (default: paws.digits). The same command continues a run that was stopped."""
    from fastssl.launch import server
    from fastssl.launch.ranks import launcher

    if max(gpus or 1, cpu_ranks or 1) > 1 and not (dry_run or submit or launcher()):
        server.begin("fastssl.api.on_ranks")  # imports for the ranks what is imported here

    from fastssl.api.jobs import default_out, job_of, refuse_without_data, refuse_without_inputs
    from fastssl.api.on_ranks import on_ranks
    from fastssl.commands.sweep import prepare
    from fastssl.commands.sweep import run as run_sweep

    submission = {name: others.pop(name) for name in SUBMISSION}
    chosen = _seeds(seeds)
    _check(out, chosen, held_out, swept, submit, submission, others["resume"])
    job = job_of(
        recipe,
        data=data,
        changes=changes,
        labels=labels,
        out=out,
        seed=chosen[0],
        command=as_typed(),
        **ranks(gpus, cpu_ranks),
        **others,
    )

    def where(seed: int) -> Path:
        return out or default_out(job, seed, "-sweep" if swept else "")

    job = replace(job, out=where(job.seed))
    if not dry_run:
        refuse_without_data(job)
    sweep = prepare(job, swept, held_out) if swept else None
    if dry_run:
        _describe(job, sweep)
        return
    refuse_without_inputs(next(iter(sweep.runs.values())) if sweep else job)
    if sweep:
        run_sweep(sweep, on_ranks)
        return
    jobs = [replace(job, seed=seed, out=where(seed)) for seed in chosen]
    if submit:
        _submit(jobs, submission)
    else:
        _train(jobs, on_ranks)


def _check(
    out: Path | None,
    seeds: Sequence[int],
    held_out: str | None,
    swept: tuple[str, ...],
    submit: str | None,
    submission: dict[str, Any],
    resume: str,
) -> None:
    """Raise ConfigError where options do not go together."""
    from fastssl.launch.ranks import launcher

    if out and len(seeds) > 1:
        raise ConfigError("--out names one run; with several --seeds leave it out")
    if len(seeds) > 1 and launcher() is not None:
        raise ConfigError("--seeds: one seed a command where a launcher starts the ranks")
    if held_out is not None and not swept:
        raise ConfigError("--held-out belongs to --sweep")
    if swept and (len(seeds) > 1 or submit or launcher() is not None or resume == "never"):
        raise ConfigError(
            "--sweep does its runs one after the other, starts their ranks itself and always continues: leave out "
            "several --seeds, --submit, --resume never and torchrun or srun"
        )
    if any(submission.values()) and not submit:
        raise ConfigError("--nodes, --gpus-per-node, --cpus-per-rank, --partition and --time belong to --submit slurm")


def _describe(job: Job, sweep: Sweep | None) -> None:
    from fastssl.commands.dry_run import describe

    click.echo(describe(job) + (f"\n{sweep.described()}" if sweep else ""))


def _submit(jobs: list[Job], submission: dict[str, Any]) -> None:
    from fastssl.api.on_ranks import on_ranks
    from fastssl.launch.ranks import Ranks
    from fastssl.launch.slurm import submit

    for job in jobs:
        name, logs = job.recipe.replace(":", "."), job.out.absolute() / "slurm"
        click.echo(submit(Ranks(job.world, job.device), partial(on_ranks, job), name, logs, **submission))


def _train(jobs: list[Job], on_ranks: Callable[[Job], Any]) -> None:
    """One after the other; of several the mean and spread, which are kept beside the runs."""
    from fastssl.evaluation.accuracies import accuracy_cell, spread_over_seeds
    from loaders.files import write_file

    results = [on_ranks(job) for job in jobs]
    if len(jobs) > 1:
        seeds = [job.seed for job in jobs]
        scores = spread_over_seeds(results)
        for name, spread in scores.items():
            click.echo(f"{name}: {accuracy_cell(spread)}")
        together = Path("runs") / f"{jobs[0].recipe.replace(':', '.')}-seeds-{'-'.join(map(str, seeds))}.json"
        kept = {"command": jobs[0].command, "seeds": seeds, "scores": scores}
        write_file(together, json.dumps(kept, indent=2) + "\n")
        click.echo(f"kept in {together}")


def _seeds(text: str) -> list[int]:
    parts = text.split(",")
    if len(set(parts)) < len(parts) or not all(part.isdecimal() and int(part) < 2**63 for part in parts):
        raise ConfigError(f"--seeds {text!r}: write different whole numbers separated by commas, such as 0,1,2")
    return [int(part) for part in parts]
