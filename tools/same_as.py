"""Whether this checkout trains bit for bit as another commit: `python -m tools.same_as [COMMIT] [--paths PATH,...]`.

Every path of `tests/test_every_method.py` is trained for its first five steps with the code of both, each with its own
test file, side by side on this machine: same environment, one thread each. Compared are every value logged at each step
but for those in APART, the weights of every stage at the end (online, target, state) and what stages produced. A table
says of each path where it first differs and by how much; exit code 1 where one does, raises, or is lost in this
checkout.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from tools.first_steps import NUM_STEPS
from tools.other_commit import ROOT, NoSuchCommit, git, start, tree_of

REFERENCE = "41f6bfd"
DRIVER = Path(__file__).with_name("first_steps.py")
LIBRARIES = ("torch", "numpy", "numba")
APART = {  # values that are not compared, with the reason
    "time": "clocks",
    "instance_discrimination": "a diagnostic that was redefined: NT-Xent's 2N - 1 candidates, as PAWS's figure 4b",
}
SAME, NEW, LOST = "same", "in this checkout only", "in the other commit only"


# ---------------------------------------------------------------------------------------------------------- comparing


def difference(one: Path, other: Path) -> str | None:
    """Where two run directories first differ, in words; None where they are the same bit for bit."""
    stages, others = _stages(one), _stages(other)
    if stages != others or not stages:
        return f"stages {sorted(stages)} against {sorted(others)}"
    for stage in sorted(stages, key=lambda name: (one / name).stat().st_ctime_ns):
        found = _logged(one / stage, other / stage) or _tensors(_made(one / stage), _made(other / stage))
        if found:
            return found if stage == "." else f"{stage}: {found}"
    return None


def _stages(run: Path) -> set[str]:
    """Folders, relative to the run's, in which a stage has trained or produced something."""
    left = [*run.rglob("metrics.jsonl"), *run.rglob("produced.pt")]
    return {str(path.parent.relative_to(run)) for path in left}


def _logged(one: Path, other: Path) -> str | None:
    """The first value logged by both, loss before its parts, that differs in any step."""
    lines, others = _lines(one), _lines(other)
    if [each["step"] for each in lines] != [each["step"] for each in others]:
        return f"{len(lines)} steps logged against {len(others)}"
    for ours, theirs in zip(lines, others, strict=True):
        for name in sorted(ours.keys() & theirs.keys(), key=lambda name: (name != "loss", name)):
            if name not in APART and ours[name] != theirs[name]:
                return f"step {ours['step']}: {name} {ours[name]!r} against {theirs[name]!r}"
    return None


def _lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if "loss" in line]


def _made(folder: Path) -> dict[str, Tensor]:
    """What a stage left for others: tensors it produced, or its networks' at the newest checkpoint."""
    if (folder / "produced.pt").exists():
        return torch.load(folder / "produced.pt", weights_only=True)
    newest = max(folder.glob("checkpoints/step-*"))
    nets = torch.load(newest / "state.pt", weights_only=True)["nets"]
    return {f"{net} {name}": tensor for net, state in nets.items() for name, tensor in state.items()}


def _tensors(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str | None:
    if missing := sorted(ours.keys() ^ theirs.keys()):
        return f"{len(missing)} tensors are in one only: {missing[0]} in {'ours' if missing[0] in ours else 'theirs'}"
    differing = [name for name, tensor in ours.items() if not _same_bits(tensor, theirs[name])]
    return f"{len(differing)} of {len(ours)} tensors: {_by_how_much(differing[0], ours, theirs)}" if differing else None


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(each.contiguous().flatten().view(torch.uint8) for each in (one, other)))


def _by_how_much(name: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str:
    one, other = ours[name], theirs[name]
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return f"{name} is {one.dtype} {tuple(one.shape)} against {other.dtype} {tuple(other.shape)}"
    apart = (one.double() - other.double()).abs()
    return f"{name} in {int((one != other).sum())} of {one.numel()} values, by {apart.max():.3g} at most"


# ----------------------------------------------------------------------------------------------------------- training


def trained(trees: Mapping[Path, Path], paths: list[str]) -> None:
    """Train with the code of each tree into its folder, all at once, each on a CPU of its own where there are enough.
    Raises click.ClickException with the end of what was said where one fails as a whole."""
    cpus = sorted(os.sched_getaffinity(0))
    started = []
    for number, (tree, out) in enumerate(trees.items()):
        out.mkdir()
        arguments = (str(DRIVER), str(out), *paths)
        started.append(start(tree, *arguments, cpu=cpus[number % len(cpus)], log=out / "log"))
    for process in started:
        process.wait()
    for process, (tree, out) in zip(started, trees.items(), strict=True):
        if process.returncode:
            raise click.ClickException(f"training with {tree} failed:\n{(out / 'log').read_text()[-2000:]}")


def verdicts(ours: Path, theirs: Path, paths: list[str]) -> dict[str, str]:
    """What is to be said of each path that was asked for (all where none was): SAME, NEW, or where it differs."""
    (known_here, refused_here), (known_there, refused_there) = _said(ours), _said(theirs)
    found = {}
    for path in paths or dict.fromkeys([*known_there, *known_here]):
        if path in known_here and path in known_there:
            raised = [f"this checkout raises {refused_here[path]}"] if path in refused_here else []
            raised += [f"the other commit raises {refused_there[path]}"] if path in refused_there else []
            found[path] = "; ".join(raised) or difference(ours / path, theirs / path) or SAME
        else:
            found[path] = NEW if path in known_here else LOST if path in known_there else "there is no such path"
    return found


def _said(out: Path) -> tuple[list[str], dict[str, str]]:
    """Which paths one side has, and of those that raised, what."""
    return json.loads((out / "paths.json").read_text()), json.loads((out / "refused.json").read_text())


def _here() -> str:
    """This checkout in words."""
    changed = git("status", "--porcelain").decode().splitlines()
    return git("rev-parse", "HEAD").decode().strip() + (f" with {len(changed)} files changed" if changed else "")


def _with(tree: Path, files: tuple[str, ...], copy: Path) -> Path:
    """A copy of this checkout in which `files` are those of `tree`."""
    for folder in ("fastssl", "loaders", "tests", "tools", "examples"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in files:
        if not ((tree / file).is_file() and (copy / file).is_file()):
            raise click.ClickException(f"--theirs {file}: not a file of both")
        shutil.copyfile(tree / file, copy / file)
    return copy


@click.command()
@click.argument("commit", default=REFERENCE)
@click.option("--paths", default="", metavar="PATH,...", help="Only these.")
@click.option(
    "--theirs", multiple=True, metavar="FILE", help="In this checkout's place use COMMIT's FILE: meant to differ."
)
def main(commit: str, paths: str, theirs: tuple[str, ...]) -> None:
    """Compare this checkout's training with COMMIT's [41f6bfd]."""
    chosen = [path for path in paths.split(",") if path]
    try:
        tree, here = tree_of(commit), _here()
    except NoSuchCommit as error:
        raise click.ClickException(str(error)) from None
    if theirs:
        here += f", with {', '.join(theirs)} of that commit"
    click.echo(f"this checkout, {here}, against {tree.name}: {NUM_STEPS} steps of each path, one thread each")
    with tempfile.TemporaryDirectory() as name:
        one, other = Path(name) / "ours", Path(name) / "theirs"
        trained({_with(tree, theirs, Path(name) / "checkout") if theirs else ROOT: one, tree: other}, chosen)
        results = verdicts(one, other, chosen)
    libraries = ", ".join(f"{library} {version(library)}" for library in LIBRARIES)
    click.echo(f"python {platform.python_version()}, {libraries}, {platform.machine()}\n\n| path | result |\n|---|---|")
    for path, said in results.items():
        click.echo(f"| {path} | {said if said in (SAME, NEW, LOST) else f'different: {said}'} |")
    counts = Counter(results.values())
    click.echo("\n" + "\n".join(f"not compared: {name} ({why})" for name, why in APART.items()))
    click.echo(f"\n{counts[SAME]} of {len(results)} paths are the same, {counts[NEW]} new")
    sys.exit(counts[SAME] + counts[NEW] < len(results))


if __name__ == "__main__":
    main()
