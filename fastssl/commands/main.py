"""The command line: parses, then calls. Errors a user can put right are one line and exit code 1."""

from __future__ import annotations

import functools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from fastssl.errors import EXIT_HUNG, EXIT_STOPPED, ConfigError, FastsslError, Hung, Stopped
from fastssl.recipes.datasets import KNOWN_SETS
from loaders.errors import LoaderError

DEFAULT_RECIPE = "paws.digits"
PROFILED_RECIPE = "paws.rn50_100ep"


def _in_users_words(command: Callable[..., Any]) -> Callable[..., Any]:
    """Turn our errors into click's: one line, no traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except Stopped as stop:
            if str(stop):  # one rank of all says it
                click.echo(stop, err=True)
            sys.exit(EXIT_STOPPED)
        except Hung as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(EXIT_HUNG)
        except (FastsslError, LoaderError) as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            raise click.ClickException("interrupted; the same command continues from the last checkpoint") from None

    return wrapped


_data = click.option("--data", multiple=True, metavar="[KEY=]PATH", help="KEY: unlabelled, labelled, validation, masks")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fastssl-train")
def main() -> None:
    """Pre-train image encoders from many unlabelled and few labelled images."""
    # OpenMP's threads spin between parallel regions by default and so take the cores from the loader's threads, from
    # other ranks and from each other: a step took up to ten times as long. Read as torch loads, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # torch's networking warns of host names it cannot look up and of peers that leave; what matters comes as an error.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


@main.command()
@click.argument("recipe", default=DEFAULT_RECIPE)
@_data
@click.option("--out", type=click.Path(path_type=Path), help="Run directory [runs/RECIPE-seedK].")
@click.option("--gpus", type=click.IntRange(1), help="Ranks, one a GPU, on all hosts together.")
@click.option("--cpu-ranks", type=click.IntRange(1), help="Ranks on CPUs, here unless a launcher starts them [1].")
@click.option(
    "--step",
    "how",
    type=click.Choice(["eager", "eager-recompute", "compiled", "graphed"]),
    help="How a step is done [compiled on a GPU, eager on a CPU].",
)
@click.option("--loader", default="auto", show_default=True, help="auto, ffcv, dali, pil or memory.")
@click.option("--cache-gib", type=click.FloatRange(0), default=0.0, help="Memory for decoded support images [0].")
@click.option("--damaged", type=click.Choice(["stop", "replace"]), default="stop", help="At unreadable images [stop].")
@click.option("--resume", type=click.Choice(["auto", "never"]), default="auto", show_default=True)
@click.option("--allow-change", multiple=True, metavar="KEY", help="Continue a run although this setting differs.")
@click.option("--init-from", type=click.Path(path_type=Path), help="Start from the weights of this run or file.")
@click.option("--unsafe-pickle", is_flag=True, help="Read weights from pickles that run code: only whom you trust.")
@click.option("--stage-to", type=click.Path(path_type=Path), help="Copy .beton data to this local folder first.")
@click.option("--log-to", multiple=True, metavar="TRACKER", help="Besides metrics.jsonl: tensorboard or wandb.")
@click.option(
    "--nonfinite",
    type=click.Choice(["stop", "skip-once"]),
    default="stop",
    show_default=True,
    help="At a loss that is not finite; skip-once leaves the first such step out.",
)
@click.option(
    "--watchdog",
    "watchdog_s",
    type=click.FloatRange(0),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="A rank that hangs for so long is named, and the run ends; 0: never.",
)
@click.option("--labels", help="Labelled images: all, per-class=N, a list's name or path.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change a field of the recipe.")
@click.option("--sweep", "swept", multiple=True, metavar="KEY=V1,V2,...", help="A run for each value; then the best.")
@click.option("--held-out", metavar="SET", help="--sweep: training images to choose by [a list, or 12 a class].")
@click.option("--seeds", default="0", show_default=True, help="Seed, or several separated by commas.")
@click.option("--dry-run", is_flag=True, help="Print what would be done; needs neither data nor devices.")
@click.option("--submit", type=click.Choice(["slurm"]), help="Submit as a job, which is requeued when it is preempted.")
@click.option("--nodes", type=click.IntRange(1), help="--submit: hosts [ranks / 8].")
@click.option("--gpus-per-node", type=click.IntRange(1), help="--submit: GPUs of each host [8].")
@click.option("--cpus-per-rank", type=click.IntRange(1), help="--submit: [10 beside a GPU, else 1].")
@click.option("--partition", help="--submit: SLURM's partition [its default].")
@click.option("--time", "time_limit", metavar="[D-]H:MM:SS", help="--submit: time limit, after which it is requeued.")
@_in_users_words
def train(
    recipe: str,
    data: tuple[str, ...],
    out: Path | None,
    gpus: int | None,
    cpu_ranks: int | None,
    how: str | None,
    loader: str,
    cache_gib: float,
    damaged: str,
    resume: str,
    allow_change: tuple[str, ...],
    init_from: Path | None,
    unsafe_pickle: bool,
    stage_to: Path | None,
    log_to: tuple[str, ...],
    nonfinite: str,
    watchdog_s: float,
    labels: str | None,
    changes: tuple[str, ...],
    swept: tuple[str, ...],
    held_out: str | None,
    seeds: str,
    dry_run: bool,
    submit: str | None,
    nodes: int | None,
    gpus_per_node: int | None,
    cpus_per_rank: int | None,
    partition: str | None,
    time_limit: str | None,
) -> None:
    """Train RECIPE (default: paws.digits). The same command continues a run that was stopped."""
    from fastssl.commands.dry_run import describe
    from fastssl.commands.on_ranks import on_ranks
    from fastssl.commands.sweep import prepare
    from fastssl.commands.sweep import run as run_sweep
    from fastssl.engine.job import Job
    from fastssl.evaluation.summary import accuracy_cell, spread_over_seeds
    from fastssl.launch.started_by_others import launcher
    from fastssl.recipes.resolve import resolve
    from fastssl.run_dir.checkpoint import write_atomically

    if gpus and cpu_ranks:
        raise ConfigError("--gpus and --cpu-ranks: give one of them")
    if labels is not None:
        changes = (*changes, f"labels={labels}")
    stages = resolve(recipe, changes)
    known = KNOWN_SETS[stages[0].method.dataset]
    chosen = _seeds(seeds)
    if not data and known.embedded:
        data = (stages[0].method.dataset,)
    if not data and not dry_run:
        raise ConfigError(f"{recipe} needs images: --data {known.how}")
    if out and len(chosen) > 1:
        raise ConfigError("--out names one run; with several --seeds leave it out")
    if len(chosen) > 1 and launcher() is not None:
        raise ConfigError("--seeds: one seed a command where a launcher starts the ranks")
    if held_out is not None and not swept:
        raise ConfigError("--held-out belongs to --sweep")
    if swept and (len(chosen) > 1 or submit or launcher() is not None or resume == "never"):
        raise ConfigError(
            "--sweep does its runs one after the other, starts their ranks itself and always continues: leave out "
            "several --seeds, --submit, --resume never and torchrun or srun"
        )
    job = Job(
        recipe=recipe,
        stages=stages,
        changes=changes,
        data=data,
        out=out or Path("runs") / f"{recipe}{'-sweep' if swept else ''}-seed{chosen[0]}",
        seed=chosen[0],
        device="cuda" if gpus else "cpu",
        world=gpus or cpu_ranks or 1,
        how=how,  # type: ignore[arg-type]
        loader=loader,
        cache_gib=cache_gib,
        damaged=damaged,  # type: ignore[arg-type]
        resume=resume,  # type: ignore[arg-type]
        allow_change=allow_change,
        init_from=init_from,
        unsafe_pickle=unsafe_pickle,
        stage_to=stage_to,
        log_to=log_to,
        nonfinite=nonfinite,  # type: ignore[arg-type]
        watchdog_s=watchdog_s,
        command=shlex.join(["fastssl", *sys.argv[1:]]),
    )
    sweep = prepare(job, swept, held_out) if swept else None
    if dry_run:
        click.echo(describe(job) + (f"\n{sweep.described()}" if sweep else ""))
        return
    if missing := (next(iter(sweep.runs.values())) if sweep else job).missing_inputs():
        raise ConfigError(f"{recipe} builds on another run: give {' and '.join(missing)}")
    if sweep:
        run_sweep(sweep, on_ranks)
        return
    jobs = [replace(job, seed=seed, out=out or Path("runs") / f"{recipe}-seed{seed}") for seed in chosen]
    if submit:
        from fastssl.launch.ranks import Ranks
        from fastssl.launch.slurm import submit as submit_to_slurm

        for each in jobs:
            click.echo(
                submit_to_slurm(
                    Ranks(each.world, each.device),
                    functools.partial(on_ranks, each),
                    each.recipe,
                    each.out.absolute() / "slurm",
                    nodes=nodes,
                    gpus_per_node=gpus_per_node,
                    cpus_per_rank=cpus_per_rank,
                    partition=partition,
                    time_limit=time_limit,
                )
            )
        return
    if any((nodes, gpus_per_node, cpus_per_rank, partition, time_limit)):
        raise ConfigError("--nodes, --gpus-per-node, --cpus-per-rank, --partition and --time belong to --submit slurm")
    results = [on_ranks(j) for j in jobs]
    if len(jobs) > 1:
        scores = spread_over_seeds(results)
        for name, spread in scores.items():
            click.echo(f"{name}: {accuracy_cell(spread)}")
        together = Path("runs") / f"{recipe}-seeds-{'-'.join(map(str, chosen))}.json"
        kept = {"command": job.command, "seeds": chosen, "scores": scores}
        write_atomically(together, json.dumps(kept, indent=2) + "\n")
        click.echo(f"kept in {together}")


def _seeds(text: str) -> list[int]:
    parts = text.split(",")
    if len(set(parts)) < len(parts) or not all(part.isdecimal() and int(part) < 2**63 for part in parts):
        raise ConfigError(f"--seeds {text!r}: write different whole numbers separated by commas, such as 0,1,2")
    return [int(part) for part in parts]


@main.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--protocol",
    "protocols",
    multiple=True,
    required=True,
    help="soft-nn, knn, classifier, turned-classifier, linear, robustness or transfer.",
)
@click.option(
    "--data",
    multiple=True,
    metavar="[KEY=]PATH",
    help="KEY: labelled, validation, or a published set that the protocol measures on: imagenet_v2, food101, ...",
)
@click.option("--labels", help="Images to learn from: all, per-class=N, a list's name or path [as the run did].")
@_in_users_words
def evaluate(run: Path, protocols: tuple[str, ...], data: tuple[str, ...], labels: str | None) -> None:
    """Score the encoder of RUN at its newest checkpoint; prints JSON."""
    from fastssl.engine.reopen import open_run
    from fastssl.evaluation import divide, load_protocol

    chosen = [load_protocol(name) for name in protocols]
    own, sets = divide(data, chosen)
    subject, step = open_run(run, own, sets, labels)
    scores = {key: value for protocol in chosen for key, value in protocol.evaluate(subject).items()}
    command = shlex.join(["fastssl", *sys.argv[1:]])
    provenance = subject.provenance(subject.looked_at)
    click.echo(json.dumps({**scores, "step": step, "provenance": provenance, "command": command}, indent=2))


@main.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@_data
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the arrays [RUN/embeddings].")
@click.option("--tap", help="Layer to take the features from [the backbone].")
@_in_users_words
def embed(run: Path, data: tuple[str, ...], out: Path | None, tap: str | None) -> None:
    """Write features, labels and ids of RUN's images as arrays."""
    from fastssl.engine.reopen import open_run
    from fastssl.evaluation.embed import embed as write_embeddings

    subject, _ = open_run(run, data)
    roles = sorted(subject.data.sources.keys() - {"train"} | {"unlabelled"})
    for role in roles:
        click.echo(write_embeddings(subject, role, tap or subject.method.taps[0], out or run / "embeddings"))


@main.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--compare", type=click.Path(path_type=Path, exists=True, file_okay=False), help="A run beside it.")
@_data
@click.option("--out", type=click.Path(path_type=Path), help="The page [RUN/report.html].")
@_in_users_words
def report(run: Path, compare: Path | None, data: tuple[str, ...], out: Path | None) -> None:
    """Write one self-contained HTML page about RUN: curves, crops, classes, embeddings. RUN may still be going."""
    from fastssl.report.training import write_report

    out = out or run / "report.html"
    write_report(run, compare, data, out)
    click.echo(out)


@main.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the files [RUN/export].")
@click.option("--checkpoint", "step", type=click.IntRange(0), metavar="STEP", help="Of this step [the newest].")
@click.option("--network", type=click.Choice(["online", "target"]), default="online", show_default=True)
@_in_users_words
def export(run: Path, out: Path | None, step: int | None, network: str) -> None:
    """Write RUN's trunk with torchvision's key names, its heads, and a model card: a folder that needs no fastssl."""
    from fastssl.export.folder import export as write_export

    click.echo(write_export(run, out or run / "export", step, network))


@main.command()
@click.argument("dump", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@_data
@click.option("--gpus", type=click.IntRange(1), help="Ranks, one a GPU [as the run had].")
@click.option("--cpu-ranks", type=click.IntRange(1), help="Ranks on CPUs [as the run had].")
@_in_users_words
def replay(dump: Path, data: tuple[str, ...], gpus: int | None, cpu_ranks: int | None) -> None:
    """Do a step again that was not finite, from the last checkpoint before it, and say where it first shows."""
    from fastssl.commands.on_ranks import on_ranks
    from fastssl.engine.reopen import job_to_replay

    if gpus and cpu_ranks:
        raise ConfigError("--gpus and --cpu-ranks: give one of them")
    on_ranks(job_to_replay(dump, data, "cuda" if gpus else "cpu" if cpu_ranks else None, gpus or cpu_ranks))


@main.command()
@click.argument("recipe", default=PROFILED_RECIPE)
@_data
@click.option("--stage", "what", type=click.Choice(["loader", "step", "all"]), default="all", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Folder for what is written [runs/RECIPE-profile].")
@click.option("--baseline", type=click.Path(path_type=Path), metavar="FILE", help="A profile.json; exit 1 if slower.")
@click.option("--gpus", type=click.IntRange(1), help="Ranks, one a GPU.")
@click.option("--cpu-ranks", type=click.IntRange(1), help="Ranks on CPUs [1].")
@click.option(
    "--step",
    "how",
    type=click.Choice(["eager", "eager-recompute", "compiled", "graphed"]),
    help="How a step is done [compiled on a GPU, eager on a CPU].",
)
@click.option("--loader", default="auto", show_default=True, help="auto, ffcv, dali, pil or memory.")
@click.option("--cache-gib", type=click.FloatRange(0), default=0.0, help="Memory for decoded support images [0].")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change a field of the recipe.")
@click.option("--seconds", type=click.FloatRange(1), default=20.0, show_default=True, help="To measure for, about.")
@click.option("--trace", is_flag=True, help="Also write trace.json: torch's profiler over three steps.")
@_in_users_words
def profile(
    recipe: str,
    data: tuple[str, ...],
    what: str,
    out: Path | None,
    baseline: Path | None,
    gpus: int | None,
    cpu_ranks: int | None,
    how: str | None,
    loader: str,
    cache_gib: float,
    changes: tuple[str, ...],
    seconds: float,
    trace: bool,
) -> None:
    """Say where the time goes, what binds, and what 64 GPUs would do. Needs neither data nor a GPU: RECIPE (default:
    paws.rn50_100ep) runs at a size that this machine can do."""
    from fastssl.commands.on_ranks import on_ranks
    from fastssl.engine.job import Job
    from fastssl.profiling import profile as profiles
    from fastssl.recipes.resolve import resolve

    if gpus and cpu_ranks:
        raise ConfigError("--gpus and --cpu-ranks: give one of them")
    if trace and what == "loader":
        raise ConfigError("--trace shows the step: leave --stage loader out")
    job = Job(
        recipe=recipe,
        stages=resolve(recipe, changes),
        changes=changes,
        data=data,
        out=out or Path("runs") / f"{recipe}-profile",
        seed=0,
        device="cuda" if gpus else "cpu",
        world=gpus or cpu_ranks or 1,
        how=how,  # type: ignore[arg-type]
        loader=loader,
        cache_gib=cache_gib,
        command=shlex.join(["fastssl", *sys.argv[1:]]),
    )
    profiles.run(job, what, seconds, trace, baseline, on_ranks)  # type: ignore[arg-type]


@main.command("convert-imagenet")
@click.argument("src", required=False, type=click.Path(path_type=Path))
@click.argument("out", required=False, type=click.Path(path_type=Path))
@click.option("--no-decode-check", is_flag=True, help="Trust that every file decodes; headers are read all the same.")
@click.option("--subset", metavar="LIST", help="Only these training images: a list's name or path.")
@click.option("--reencode", metavar="QUALITY,MAX_SIDE", help="Write every image anew, no longer side than that.")
@click.option("--dry-run", is_flag=True, help="Print what would be done and the disk it needs.")
@click.option("--verify", type=click.Path(path_type=Path), metavar="OUT", help="Read OUT again, against its manifest.")
@_in_users_words
def convert_imagenet(
    src: Path | None,
    out: Path | None,
    no_decode_check: bool,
    subset: str | None,
    reencode: str | None,
    dry_run: bool,
    verify: Path | None,
) -> None:
    """SRC, ImageNet's archives or folders train/CLASS/* and val/CLASS/*, to OUT/train.beton, OUT/val.beton and
    OUT/manifest.json. The same command continues a conversion that was stopped. SRC is only read."""
    from fastssl.commands import converting
    from loaders.convert import conversion as convert

    start_s = time.monotonic()
    if verify is not None:
        if src is not None or dry_run:
            raise ConfigError("--verify OUT stands alone: it reads a finished conversion")
        with converting.reporting() as report:
            manifest = convert.verify(verify, report)
        click.echo(converting.summary(manifest, time.monotonic() - start_s))
        return
    if src is None or out is None:
        raise ConfigError("convert-imagenet takes SRC and OUT, or --verify OUT")
    anew = converting.parse_reencode(reencode) if reencode is not None else None
    plan = convert.prepare(src, convert.Options(not no_decode_check, anew, subset))
    click.echo(converting.described(plan, out))
    if not dry_run:
        with converting.reporting() as report:
            manifest = convert.convert(plan, out, report)
        click.echo(converting.summary(manifest, time.monotonic() - start_s))


@main.command()
@click.option("--data", type=click.Path(path_type=Path), help="Also time reading this file, or one in this folder.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(data: Path | None, as_json: bool) -> None:
    """Look at this machine: what training can use, what is in the way, what to do about it."""
    from rich.console import Console

    from fastssl.commands import examination as doctors

    rows = doctors.examine(data)
    if as_json:
        click.echo(doctors.as_json(rows))
    else:
        Console(markup=False, emoji=False).print(doctors.as_table(rows))
    sys.exit(0 if doctors.usable(rows) else 1)


@main.command()
def recipes() -> None:
    """List the recipes."""
    from fastssl.recipes.resolve import recipes as all_recipes

    found = all_recipes()
    width = max(map(len, found))
    for name, recipe in found.items():
        click.echo(f"{name:{width}}  {' '.join((recipe.__doc__ or '').split())}")


if __name__ == "__main__":
    main()
