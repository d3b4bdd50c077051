"""A table of results from runs: does those that are missing, keeps what each wrote, and writes the page.

    python -m tools.table benchmarks/results/digits_labels.toml          # run what is missing, then the page
    python -m tools.table benchmarks/results/digits_labels.toml --page   # the page alone, from what is kept

A description is TOML: `scores` are the columns of shares, by their names in result.json, shown in percent; `seeds`;
for each of `[[rows]]` its `group` and `name`, and `arguments`, what follows `fastssl train`. `shared` is appended to
all of them. For `by_epoch`, where it is given, a table each says what every evaluation found.

A run lies in RUNS/NAME/ROW-seedN and continues where it was stopped. Its result.json, and for `by_epoch` the lines of
metrics.jsonl that tell of evaluations, are copied unedited to a folder beside the description. The page has the
description's name, with `.md`, and holds the table between the lines `<!-- table -->` and `<!-- /table -->`.
Descriptions that name a recipe or setting that does not exist are refused before anything runs: each row is dry-run.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import click

BEGIN, END = "<!-- table -->", "<!-- /table -->"


@dataclass(frozen=True)
class Row:
    """What is compared: `arguments` as one would type them after `fastssl train`."""

    group: str
    name: str
    arguments: tuple[str, ...]

    @property
    def slug(self) -> str:
        """The row's name in file names."""
        return re.sub(r"[^a-z0-9]+", "-", f"{self.group} {self.name}".lower()).strip("-")


@dataclass(frozen=True)
class Table:
    """A description, read; `kept` is where results lie."""

    path: Path
    scores: dict[str, str]  # title -> name in result.json; a row that lacks one shows a dash
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]
    by_epoch: dict[str, str]  # title -> name in evaluations

    @property
    def kept(self) -> Path:
        return self.path.with_suffix("")

    def result(self, row: Row, seed: int) -> Path:
        return self.kept / f"{row.slug}-seed{seed}.json"

    def evaluations(self, row: Row, seed: int) -> Path:
        return self.kept / f"{row.slug}-seed{seed}.jsonl"


def read(path: Path) -> Table:
    """Raises ClickException that names what is wrong with the description."""
    try:
        plain = tomllib.loads(path.read_text())
        shared = shlex.split(plain.get("shared", ""))
        rows = tuple(Row(row["group"], row["name"], (*shlex.split(row["arguments"]), *shared)) for row in plain["rows"])
        table = Table(path, dict(plain["scores"]), tuple(plain["seeds"]), rows, dict(plain.get("by_epoch", {})))
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise click.ClickException(f"{path}: not a table's description: {error!r}") from None
    slugs = [row.slug for row in rows]
    if twice := [slug for slug in slugs if slugs.count(slug) > 1]:
        raise click.ClickException(f"{path}: two rows are called {twice[0]}")
    return table


def train(arguments: tuple[str, ...], *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastssl", "train", *arguments, *more]
    return subprocess.run(command, capture_output=True, text=True)


def check(table: Table) -> None:
    """Raises ClickException for the first row that a dry run refuses."""
    for row in table.rows:
        done = train(row.arguments, "--dry-run")
        if done.returncode:
            raise click.ClickException(f"{table.path}: {row.group}, {row.name}: {done.stderr.strip()}")


def run_missing(table: Table, runs: Path) -> None:
    """Seed by seed, so that a table that is stopped has whole columns; raises ClickException where a run fails."""
    table.kept.mkdir(exist_ok=True)
    for seed in table.seeds:
        for row in table.rows:
            result, out = table.result(row, seed), runs / table.path.stem / f"{row.slug}-seed{seed}"
            if result.exists():
                continue
            click.echo(f"{row.slug}, seed {seed}")
            done = train(row.arguments, "--seeds", str(seed), "--out", str(out))
            if done.returncode:
                raise click.ClickException(f"{' '.join(row.arguments)}: {done.stderr.strip()[-500:]}")
            if table.by_epoch:
                lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
                table.evaluations(row, seed).write_text(
                    "".join(line for line in lines if "evaluation" in json.loads(line))
                )
            result.write_bytes((out / "result.json").read_bytes())


def cell(values: list[float], digits: int = 1) -> str:
    """Mean and standard deviation."""
    if not values:
        return "–"
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


def seconds(result: dict[str, Any]) -> float:
    """Of training, in all stages."""
    return float(sum(stage["trained_s"] for stage in result.get("stages", {"": result}).values()))


def markdown(table: Table) -> str:
    """The table's lines, and after them a command for each row."""
    titles = ("", "", *table.scores, "seconds of training", "seeds")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    commands, group = [], None
    for row in table.rows:
        results = [table.result(row, seed) for seed in table.seeds]
        kept: list[dict[str, Any]] = [json.loads(path.read_text()) for path in results if path.exists()]
        cells = [cell([100 * r[name] for r in kept if name in r]) for name in table.scores.values()]
        trained = f"{fmean(map(seconds, kept)):,.0f}" if kept else "–"
        shown = row.group if row.group != group else ""
        lines.append(f"| {shown} | {row.name} | {' | '.join(cells)} | {trained} | {len(kept)} |")
        commands.append(f"    fastssl train {shlex.join(row.arguments)} --seeds {','.join(map(str, table.seeds))}")
        group = row.group
    for title, name in table.by_epoch.items():
        lines += ["", *_by_epoch(table, title, name)]
    return "\n".join([*lines, "", *commands])


def _by_epoch(table: Table, title: str, name: str) -> list[str]:
    """The lines of a table of what each evaluation found of `name`."""
    found: list[dict[float, list[float]]] = []
    for row in table.rows:
        found.append({})
        for path in (path for seed in table.seeds if (path := table.evaluations(row, seed)).exists()):
            for each in map(json.loads, path.read_text().splitlines()):
                found[-1].setdefault(each["epoch"], []).append(each["evaluation"][name])
    epochs = sorted({epoch for of_row in found for epoch in of_row})
    titles = (title, "", *(f"epoch {epoch:g}" for epoch in epochs))
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row, of_row in zip(table.rows, found, strict=True):
        cells = " | ".join(cell(of_row.get(epoch, []), digits=2) for epoch in epochs)
        lines.append(f"| {row.group} | {row.name} | {cells} |")
    return lines


def page(table: Table) -> str:
    """The page as it should be. Raises ClickException where it has no place for the table."""
    text = table.path.with_suffix(".md").read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise click.ClickException(f"{table.path.with_suffix('.md')}: no {BEGIN} and {END}")
    return f"{text.partition(BEGIN)[0]}{BEGIN}\n\n{markdown(table)}\n\n{END}{text.partition(END)[2]}"


@click.command()
@click.argument("description", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--page", "page_alone", is_flag=True, help="Run nothing.")
@click.option("--runs", type=click.Path(path_type=Path), default=Path("build/tables"), show_default=True)
def main(description: Path, page_alone: bool, runs: Path) -> None:
    """Do the runs of DESCRIPTION that are missing and write its page."""
    table = read(description)
    if not page_alone:
        check(table)
        run_missing(table, runs)
    description.with_suffix(".md").write_text(page(table))


if __name__ == "__main__":
    main()
