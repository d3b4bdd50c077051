"""`python -m tools.faults [--kind KIND] [--times N] [--json FILE]`: do faults to real training, and compare.

A repetition trains a small job on two ranks, does a fault to it at a random moment, runs the same command again until
it finishes, and compares the last checkpoint and every line of metrics bitwise with a run that nothing was done to. The
folder of one that fails is kept. What this machine cannot do (not root, no SLURM) is named and left out.
"""

from __future__ import annotations

import json
import secrets
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import click

from benchmarks.machine import commit, cpu_model
from tools.faults.kinds import KINDS, missing
from tools.faults.repetition import repetition, whole_run


@click.command(help=__doc__)
@click.option("--kind", "kinds", multiple=True, type=click.Choice(list(KINDS)), help="[all]")
@click.option("--times", default=1, show_default=True, help="Repetitions of each kind.")
@click.option("--in-a-row", default=1, show_default=True, help="Faults of a repetition, each to the run so continued.")
@click.option("--seed", type=int, help="Of the moments [another each time].")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Where every repetition is noted.")
def main(kinds: tuple[str, ...], times: int, in_a_row: int, seed: int | None, file: Path | None) -> None:
    left_out = {kind: why for kind in kinds or KINDS if (why := missing(kind))}
    for kind, why in left_out.items():
        click.echo(f"{kind}: left out: {why}")
    seed = secrets.randbits(32) if seed is None else seed
    repetitions: list[dict[str, Any]] = []
    notes = {"commit": commit(), "cpu": cpu_model(), "seed": seed, "in_a_row": in_a_row, "repetitions": repetitions}
    num_failed = 0
    with tempfile.TemporaryDirectory(prefix="fastssl-whole-") as folder:
        whole = whole_run(Path(folder))
        for number, kind in product(range(times), [kind for kind in kinds or KINDS if kind not in left_out]):
            start_s = time.monotonic()
            try:
                what, failed = repetition(kind, whole, f"{seed} {kind} {number}", in_a_row), False
            except AssertionError as error:
                what, failed = [str(error)], True
            took_s = time.monotonic() - start_s
            num_failed += failed
            verdict = "FAILED" if failed else "the same"
            click.echo(f"{kind} {number + 1}/{times}, {took_s:.0f} s, {verdict}: {'; '.join(what)}")
            repetitions.append({"kind": kind, "failed": failed, "what": what, "s": round(took_s, 1)})
            if file is not None:
                file.write_text(json.dumps(notes, indent=1) + "\n")
    raise SystemExit(num_failed > 0)


if __name__ == "__main__":
    main()
