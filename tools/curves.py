"""Curves of runs over training, as Markdown: `python tools/curves.py RUN ... --score knn_top1 --logged loss`.

One row an evaluation; what training logs is averaged over the lines since the evaluation before. Minutes are those of
training as the clock in metrics.jsonl counted them: without evaluation, checkpoints and start-up, and over all pieces
of a run that was stopped and continued. Of a run of several stages give the stage's folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import click


def curve(run: Path) -> list[dict]:
    """Each evaluation's {"step", "epoch", "minutes", "scores", "logged"}, in order; by name, scores are shares and
    logged values means, of what every line since the evaluation before has."""
    minutes, points, lines = 0.0, [], []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "evaluation" not in record:
            minutes += record["time"]["elapsed_s"] / 60
            lines.append(record)
            continue
        scores = {name: value for name, value in record["evaluation"].items() if isinstance(value, float)}
        names = [
            name for name in (lines[0] if lines else {}) if all(isinstance(each.get(name), float) for each in lines)
        ]
        logged = {name: fmean(each[name] for each in lines) for name in names}
        points.append(
            {"step": record["step"], "epoch": record["epoch"], "minutes": minutes, "scores": scores, "logged": logged}
        )
        lines = []
    return points


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--score", "scores", multiple=True, help="Columns of evaluations, in %, such as soft_nn_top1.")
@click.option("--logged", multiple=True, help="Columns of what training logs, such as loss.")
def main(runs: tuple[Path, ...], scores: tuple[str, ...], logged: tuple[str, ...]) -> None:
    """Print the curves of RUNS one after the other."""
    for run in runs:
        click.echo(f"| {run.name}: step | epoch | minutes | {' | '.join((*scores, *logged))} |")
        click.echo("|---" * (3 + len(scores) + len(logged)) + "|")
        for point in curve(run):
            try:
                values = [f"{100 * point['scores'][name]:.1f}" for name in scores]
                values += [f"{point['logged'][name]:.4g}" for name in logged]
            except KeyError as error:
                raise click.ClickException(f"{run}: no {error} at step {point['step']}") from None
            click.echo(f"| {point['step']:,} | {point['epoch']:.0f} | {point['minutes']:.1f} | {' | '.join(values)} |")
        click.echo()


if __name__ == "__main__":
    main()
