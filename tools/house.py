"""Whether functions and files are short: `python -m tools.house`; exit code 1 where one is not.

A function's lines are those from `def` to its end, its docstring included, decorators not; nested ones count by
themselves and within the outer one. Functions are those of `fastssl` and `loaders`: the median is at most 7 lines, none
is over 80. Files are all of Python, blank lines included: at most 450 lines for one of `fastssl/methods`, 500 else.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from statistics import median

import click

ROOT = Path(__file__).parents[1]
PACKAGES = ("fastssl", "loaders")
MEDIAN_LINES, MOST_LINES = 7, 80  # of a function
METHOD_LINES, FILE_LINES = 450, 500
WHOLE = {Path("loaders/finish/numba_cpu.py")}  # numba's cache asks for one file


def sources() -> dict[Path, str]:
    """The text of every Python file of the repository by its path there, those not yet added included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return {Path(name): (ROOT / name).read_text() for name in listed if (ROOT / name).is_file()}


def functions(texts: dict[Path, str]) -> dict[str, int]:
    """Lines of every function of the two packages, by "PATH: NAME, line NUMBER"."""
    found = {}
    for path, text in texts.items():
        if path.parts[0] in PACKAGES:
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    found[f"{path}: {node.name}, line {node.lineno}"] = (node.end_lineno or 0) - node.lineno + 1
    return found


def faults(texts: dict[Path, str]) -> list[str]:
    """A line for each file and function that is too long, and one where the median function is."""
    found, lengths = [], functions(texts)
    for path, text in texts.items():
        most = METHOD_LINES if path.is_relative_to("fastssl/methods") else FILE_LINES
        if (num_lines := len(text.splitlines())) > most and path not in WHOLE:
            found.append(f"{path}: {num_lines} lines, at most {most}")
    found += [f"{name}: {n} lines, at most {MOST_LINES}" for name, n in lengths.items() if n > MOST_LINES]
    if lengths and median(lengths.values()) > MEDIAN_LINES:
        found.append(f"the median function has {median(lengths.values()):g} lines, at most {MEDIAN_LINES}")
    return found


@click.command()
def main() -> None:
    """Print how long functions are, and what is too long."""
    texts = sources()
    lengths, found = functions(texts).values(), faults(texts)
    click.echo(f"{len(lengths):,} functions, median {median(lengths):g} lines, longest {max(lengths)}")
    click.echo("\n".join(found) or "nothing is too long")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
