"""Accuracy over training time of runs, as Markdown: `python tools/curves.py RUN ... --score soft_nn_top1`.

One row an evaluation. Minutes are those of training as the clock in metrics.jsonl counted them: without evaluation,
checkpoints and start-up, and over all pieces of a run that was stopped and continued.
"""

from __future__ import annotations

import json
from pathlib import Path

import click


def curve(run: Path) -> list[dict]:
    """Each evaluation's {"step", "epoch", "minutes", "scores"}, in order."""
    minutes, points = 0.0, []
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "evaluation" in record:
            scores = {name: value for name, value in record["evaluation"].items() if isinstance(value, float)}
            points.append({"step": record["step"], "epoch": record["epoch"], "minutes": minutes, "scores": scores})
        else:
            minutes += record["time"]["elapsed_s"] / 60
    return points


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--score", "names", multiple=True, required=True, help="Columns, such as soft_nn_top1.")
def main(runs: tuple[Path, ...], names: tuple[str, ...]) -> None:
    """Print the curves of RUNS one after the other."""
    for run in runs:
        click.echo(f"| {run.name}: step | epoch | minutes | {' | '.join(names)} |")
        click.echo("|---" * (3 + len(names)) + "|")
        for point in curve(run):
            scores = " | ".join(f"{100 * point['scores'][name]:.1f}" for name in names)
            click.echo(f"| {point['step']:,} | {point['epoch']:.0f} | {point['minutes']:.1f} | {scores} |")
        click.echo()


if __name__ == "__main__":
    main()
