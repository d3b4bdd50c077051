"""Whether training is right with other versions: environments, a chosen subset of checks in each, one table.

    python -m tools.versions FOLDER [--only 2.11.0 ...] [--checks [train "unit nn" ...]] [--drop] [--table FILE]

The unit tests are a check for each of their rooms: those that touch torch most come first, and one that was cut off
costs no other.

Each environment lies in FOLDER/torch-VERSION with its results beside it, so that the same command goes on where it was
stopped; what passed at this commit is not done again, and `--checks` alone shows what is known. `--drop` removes an
environment after its checks: with its CUDA libraries a torch takes 5.5 GB. A version that cannot be had is a row that
says why. Ends with code 1 where a check failed or an environment could not be made.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.machine import commit, cpu_model

ROOT = Path(__file__).parents[1]
UNIT, LOOSE = ROOT / "tests" / "unit", "files"
FIRST = ("nn", "optim", "losses", "engine", "methods", "weights", "export", "evaluation", "run_dir", "costs")
SCRATCH = "run"  # in an environment's folder: where its checks work
CHECK_S = 3600.0
ONE_PROCESS = ("-p", "no:xdist", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers")


@dataclass(frozen=True)
class Environment:
    """What is installed: the newest of the libraries that are not named, as constraints.txt pins them.

    torch   version, which names the environment
    python  minor version
    numpy   version
    beside  further requirements
    """

    torch: str
    python: str
    numpy: str
    beside: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"torch-{self.torch}"


# The oldest that setup.cfg declares, the pinned, the newest, and those between. NumPy 2.5 asks for Python 3.12.
ENVIRONMENTS = (
    Environment("2.10.0", "3.11", "2.3.5"),
    Environment("2.11.0", "3.12", "2.5.5", ("torchvision==0.26.0", "timm")),
    Environment("2.12.1", "3.13", "2.5.5"),
    Environment("2.13.0", "3.11", "2.4.6"),
    Environment("2.14.1", "3.11", "2.4.6", ("torchvision==0.29.1", "timm")),
)


class Missing(Exception):
    """An environment that cannot be had, and why."""


# ------------------------------------------------------------------------------------------------ environments


def make(environment: Environment, folder: Path) -> Path:
    """The environment's Python; made where it is not whole, brought up to date where something else is asked for by
    now. Raises Missing."""
    home = folder / environment.name
    python, whole = home / "bin" / "python", home / "whole"
    asked = f"{ROOT}\n{(ROOT / 'setup.cfg').read_text()}\n{_constraints(environment)}"
    if whole.exists() and whole.read_text() == asked:
        return python
    if not whole.exists():
        shutil.rmtree(home, ignore_errors=True)
        _succeed([_interpreter(environment.python), "-m", "venv", str(home)])
    constraints = home / "constraints.txt"
    constraints.write_text(_constraints(environment))
    wanted = [f"torch=={environment.torch}", f"numpy=={environment.numpy}", *environment.beside, "-e", f"{ROOT}[test]"]
    _succeed([str(python), "-m", "pip", "install", "-q", "--no-cache-dir", "-c", str(constraints), *wanted])
    whole.write_text(asked)
    return python


def _constraints(environment: Environment) -> str:
    """constraints.txt with this torch, this NumPy and what is named beside them; Triton and torchvision are those that
    this torch asks for."""
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [line for line in pinned if not re.match(r"(torch|numpy|triton|torchvision)==", line)]
    if environment.torch == _version_pinned("torch"):
        kept += [f"{project}=={_version_pinned(project)}" for project in ("triton", "torchvision")]
    return "\n".join([*kept, f"torch=={environment.torch}", f"numpy=={environment.numpy}", ""])


def _version_pinned(project: str) -> str:
    found = re.search(rf"^{project}==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found, f"constraints.txt pins no {project}"
    return found[1]


def _interpreter(minor: str) -> str:
    """A Python of this version: this one, on the PATH, or pyenv's. Raises Missing."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [
        sys.executable,
        shutil.which(f"python{minor}"),
        *sorted(map(str, pyenv.glob(f"{minor}.*/bin/python"))),
    ]
    for candidate in filter(None, candidates):
        asked = [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        if subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip() == minor:
            return candidate
    raise Missing(f"no Python {minor} here")


def _succeed(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise Missing((errors or [f"{command[0]} ended with {done.returncode}"])[0])


def installed(python: Path) -> dict[str, str]:
    """The versions that an environment has, of what decides here."""
    code = (
        "import json, platform; from importlib.metadata import distributions as d;"
        "print(json.dumps({'python': platform.python_version()} | {x.name.lower(): x.version for x in d()}))"
    )
    found = json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
    return {name: found[name] for name in ("python", "torch", "numpy", "triton", "numba") if name in found}


# ------------------------------------------------------------------------------------------------------ checks


def _fastssl(python: Path, out: Path, *arguments: str) -> str:
    """The output of a command that must succeed."""
    command = [str(python), "-m", "fastssl", *arguments]
    done = subprocess.run(command, cwd=out, env=_environment(), capture_output=True, text=True, timeout=CHECK_S)
    if done.returncode:
        raise AssertionError((done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or ["?"])[-1])
    return done.stdout


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


def train(python: Path, out: Path) -> str:
    """The default training; its accuracy."""
    _fastssl(python, out, "train", "--out", "train", "--resume", "never")
    return _accuracy(out / "train")


def two_ranks(python: Path, out: Path) -> str:
    """... on two ranks."""
    _fastssl(python, out, "train", "--out", "ranks", "--cpu-ranks", "2", "--resume", "never")
    return _accuracy(out / "ranks")


def _accuracy(run: Path) -> str:
    result = json.loads((run / "result.json").read_text())
    return ", ".join(f"{name} {value:.4f}" for name, value in result.items() if name.endswith("top1"))


def dry_run(python: Path, out: Path) -> str:
    """The documented dry run for 64 GPUs."""
    (line,) = re.findall(r"^fastssl (train .* --gpus 64 --dry-run)", (ROOT / "docs/running.md").read_text(), re.M)
    said = _fastssl(python, out, *shlex.split(line))
    return f"{len(said.splitlines())} lines"


def compiled(python: Path, out: Path) -> str:
    """Gradients of compiled steps against eager ones in float64: the largest difference."""
    report = _pytest(python, out, "tests/ranks/test_step.py", "-k", "compiled")
    differences = [float(p.get("value", "nan")) for p in report.iter("property") if p.get("name") == "difference"]
    assert differences, "no gradients were compared"
    return f"{max(differences):.1e}"


def unit(python: Path, out: Path, room: str) -> str:
    """A room's unit tests: how many passed and were skipped."""
    files = sorted(UNIT.glob("test_*.py")) if room == LOOSE else [UNIT / room]
    return _counted(_pytest(python, out, *map(str, files)))


def rooms() -> list[str]:
    """Those of the unit tests, and LOOSE for the files beside them; what computes with torch first."""
    there = sorted(path.name for path in UNIT.iterdir() if any(path.glob("test_*.py"))) + [LOOSE]
    return sorted(there, key=lambda room: FIRST.index(room) if room in FIRST else len(FIRST))


def touching(python: Path, out: Path) -> str:
    """Tests of what torch, torchvision and timm do for us: the unit and parity tests that import one of them, compiled
    steps, and exports; in as many processes as there are CPUs."""
    folders = (ROOT / "tests" / "unit", ROOT / "tests" / "parity")
    imports = re.compile(r"^(?:import|from) torch|importorskip\(.(?:torch|timm)", re.MULTILINE)
    files = [f for folder in folders for f in sorted(folder.glob("test_*.py")) if imports.search(f.read_text())]
    files += [ROOT / "tests" / "ranks" / "test_step.py", ROOT / "tests" / "end_to_end" / "test_export.py"]
    return _counted(_pytest(python, out, *map(str, files), how=("-n", str(len(os.sched_getaffinity(0))))))


def _counted(report: ET.Element) -> str:
    (suite,) = report.iter("testsuite")
    skipped = int(suite.get("skipped", "0"))
    return f"{int(suite.get('tests', '0')) - skipped} passed, {skipped} skipped"


def _pytest(python: Path, out: Path, *arguments: str, how: Sequence[str] = ONE_PROCESS) -> ET.Element:
    """What pytest reports of tests that must pass."""
    file = out / "report.xml"
    command = [str(python), "-m", "pytest", "-q", *how, f"--junitxml={file}", *arguments]
    with (out / "pytest.log").open("w") as log:
        done = subprocess.run(command, cwd=ROOT, env=_environment(), stdout=log, stderr=log, timeout=CHECK_S)
    if done.returncode:
        text = (out / "pytest.log").read_text()
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
        print(text[-20_000:], file=sys.stderr)
        raise AssertionError(f"{len(failed)} failed: {', '.join(failed[:5])}" if failed else f"see {out}/pytest.log")
    return ET.parse(file).getroot()


CHECKS: dict[str, Callable[[Path, Path], str]] = {
    "train": train,
    "two ranks": two_ranks,
    "64 GPUs": dry_run,
    "compiled": compiled,
    **{f"unit {room}": partial(unit, room=room) for room in rooms()},
    "touching torch": touching,
}
DEFAULT = [name for name in CHECKS if name != "touching torch"]  # whose larger part the unit tests are


# ----------------------------------------------------------------------------------------------------- results


def examine(environment: Environment, folder: Path, checks: Sequence[str]) -> dict:
    """What was found, which is also kept in FOLDER/torch-VERSION.json: versions, each check's answer, or why there is
    no such environment. Several may run at once, with other checks each."""
    file, at = folder / f"{environment.name}.json", commit()
    found = _known(file, environment)
    try:
        python = make(environment, folder)
        found["versions"] = installed(python)
    except Missing as why:
        found["missing"] = str(why)
        checks = ()
    file.write_text(json.dumps(found, indent=2))
    for name in checks:
        known = found["checks"].get(name, {})
        if not (known.get("ok") and known["commit"] == at and not at.endswith("-dirty")):
            out = folder / SCRATCH / environment.name / name.replace(" ", "-")
            answer = _checked(name, python, out) | {"commit": at}
            found["checks"] = _known(file, environment)["checks"] | {name: answer}
            file.write_text(json.dumps(found, indent=2))
    return found


def _known(file: Path, environment: Environment) -> dict:
    kept = json.loads(file.read_text())["checks"] if file.exists() else {}
    return {"asked": environment.torch, "checks": kept}


def _checked(name: str, python: Path, out: Path) -> dict:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    start_s = time.monotonic()
    try:
        ok, text = True, CHECKS[name](python, out)
    except (AssertionError, subprocess.TimeoutExpired) as error:
        ok, text = False, str(error)
    answer = {"ok": ok, "text": text, "wall_s": round(time.monotonic() - start_s, 1)}
    print(f"{python.parts[-3]:14} {name:10} {'ok' if ok else 'FAILED':7} {answer['wall_s']:7.1f} s  {text}", flush=True)
    return answer


def as_table(found: Sequence[dict]) -> str:
    """Markdown: a row for each environment, a column for each check; the rooms of the unit tests are one."""
    found = [each | {"checks": _rooms_as_one(each["checks"])} for each in found]
    order = [*(name for name in CHECKS if not name.startswith("unit ")), "unit"]
    names = [name for name in order if any(name in each["checks"] for each in found)]
    lines = ["| torch | Python | NumPy | Triton | " + " | ".join(names) + " |", "|---" * (4 + len(names)) + "|"]
    for each in found:
        if "missing" in each:
            lines.append(f"| {each['asked']} | cannot be had here: {each['missing']} |" + " |" * (2 + len(names)))
            continue
        versions = [each["versions"].get(name, "none") for name in ("torch", "python", "numpy", "triton")]
        answers = [each["checks"].get(name) for name in names]
        cells = ["not run" if a is None else a["text"] if a["ok"] else f"**failed**: {a['text']}" for a in answers]
        lines.append("| " + " | ".join(versions + cells) + " |")
    return "\n".join(lines)


def _rooms_as_one(checks: dict) -> dict:
    """The checks, `unit` in place of those of its rooms: how many passed in all, which failed, which were not seen."""
    seen = {room: checks[f"unit {room}"] for room in rooms() if f"unit {room}" in checks}
    others = {name: check for name, check in checks.items() if not name.startswith("unit ")}
    if not seen:
        return others
    counts = [re.match(r"(\d+) passed, (\d+) skipped", check["text"]) for check in seen.values() if check["ok"]]
    passed, skipped = (sum(int(count[k]) for count in counts if count) for k in (1, 2))
    text = f"{passed} passed, {skipped} skipped"
    if failed := [f"{room}: {check['text']}" for room, check in seen.items() if not check["ok"]]:
        text += f"; **failed** in {'; '.join(failed)}"
    if missing := [room for room in rooms() if room not in seen]:
        text += f"; not seen: {', '.join(missing)}"
    return others | {"unit": {"ok": True, "text": text}}


def wrong(found: Sequence[dict]) -> bool:
    """Whether something failed or is missing."""
    return any("missing" in each or not all(c["ok"] for c in each["checks"].values()) for each in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=[e.torch for e in ENVIRONMENTS], help="versions of torch")
    parser.add_argument("--checks", nargs="*", choices=list(CHECKS), default=DEFAULT)
    parser.add_argument("--drop", action="store_true", help="remove an environment when its checks are done")
    parser.add_argument("--table", type=Path, help="write the table here, too")
    given = parser.parse_args()
    folder = given.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for environment in ENVIRONMENTS:
        if given.only is None or environment.torch in given.only:
            found.append(examine(environment, folder, given.checks))
            if given.drop:
                shutil.rmtree(folder / environment.name, ignore_errors=True)
    commits = sorted({check["commit"] for each in found for check in each["checks"].values()})
    table = f"Of {', '.join(commits)}, on {cpu_model()}.\n\n{as_table(found)}\n"
    print(f"\n{table}")
    if given.table:
        given.table.write_text(table)
    sys.exit(wrong(found))


if __name__ == "__main__":
    main()
