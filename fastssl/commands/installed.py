"""Which libraries are installed, read from what pip wrote down: nothing is imported.

`refuse_torch` is asked before every command; the rows are `fastssl doctor`'s.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sysconfig
from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions, version
from pathlib import Path

from fastssl.commands.row import Row
from fastssl.errors import FastsslError

# As setup.cfg declares it: what was seen to train right (benchmarks/results/versions_cpu_202611.md).
TORCH_FROM, TORCH_BELOW = (2, 10), (2, 15)
TORCH = "torch>=2.10,<2.15"

# Libraries that must fit each other; each declares which of the others it takes.
_FITTING = "torch", "triton", "numpy", "numba", "llvmlite", "scikit-learn", "nvidia-dali-cuda130", "nvidia-dali-cuda120"
# What they do not declare, as seen: (library, release, other, its first release that does not fit, what happens)
_KNOWN = (
    ("triton", (3, 6), "numpy", (2, 4), "Triton's interpreter fails, which only the tests use; GPUs are not affected"),
)
_CODECS = "nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12"  # which DALI brings
_BROKEN_CODEC = (0, 9, 0)  # NVIDIA/nvImageCodec 55


def refuse_torch() -> None:
    """Raise FastsslError where the torch that is installed is none that this was seen to work with, or two."""
    builds = _builds("torch")
    if not builds:
        if importlib.util.find_spec("torch") is None:
            raise FastsslError(f"torch is not installed: pip install '{TORCH}'")
        return  # built by hand, it has no version to read
    if (twice := _two_in_one_folder(builds)) is not None:
        raise FastsslError(f"two builds of torch lie in {twice}: pip uninstall torch twice, then pip install '{TORCH}'")
    found = builds[0].version
    if not TORCH_FROM <= release(found) < TORCH_BELOW:
        raise FastsslError(f"torch {found} is {_why_not(found)}: pip install '{TORCH}'")


def _why_not(found: str) -> str:
    if release(found) < TORCH_FROM:
        return f"older than {'.'.join(map(str, TORCH_FROM))}, the first that works here"
    return f"newer than any that this was seen to train right with (below {'.'.join(map(str, TORCH_BELOW))})"


def release(text: str) -> tuple[int, ...]:
    """`2.14.1+cu130` -> (2, 14, 1); `2.15.0.dev1` -> (2, 15, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _builds(project: str) -> list[Distribution]:
    """Those that Python finds, the one that it imports first; each once, however often its folder is on the path."""
    by_place = {(str(_folder(found)), found.version): found for found in distributions(name=project)}
    return list(by_place.values())


def _folder(found: Distribution) -> Path:
    return Path(str(found.locate_file(""))).resolve()


def _two_in_one_folder(builds: list[Distribution]) -> Path | None:
    """A folder in which one build was laid over another: files of both are there."""
    folders = [_folder(build) for build in builds]
    return next((folder for folder in folders if folders.count(folder) > 1), None)


def torch_row(imported: Mapping[str, object]) -> Row:
    """Of the torch that says of itself what `imported` holds (`version`, or `error`)."""
    if "error" in imported:
        return Row("torch", str(imported["error"]), "broken", f"pip install '{TORCH}'")
    found = str(imported["version"])
    try:
        refuse_torch()
    except FastsslError as error:
        return Row("torch", found, "broken", str(error))
    builds = _builds("torch")
    if builds and release(builds[0].version) != release(found):
        remedy = (
            f"pip says {builds[0].version}: files of two builds lie in one folder; uninstall torch, install it again"
        )
        return Row("torch", found, "broken", remedy)
    if len(builds) > 1:
        listed = " and ".join(f"{build.version} in {_folder(build)}" for build in builds)
        return Row("torch", found, "look", f"several builds: {listed}; the first is used: uninstall the others")
    return Row("torch", found, "ok")


def pairs() -> Iterator[Row]:
    """A row for each two libraries that do not fit; one where all do."""
    found = {project: release(version(project)) for project in _FITTING if _there(project)}
    wrong = [*_undeclared(found), *_declared(found)]
    yield from wrong
    if not wrong:
        yield Row("pairs", "libraries fit each other", "ok")


def _there(project: str) -> bool:
    try:
        return bool(version(project))
    except PackageNotFoundError:
        return False


def _undeclared(found: Mapping[str, tuple[int, ...]]) -> Iterator[Row]:
    for project, at, other, first_wrong, what in _KNOWN:
        if found.get(project, ())[: len(at)] == at and found.get(other, ()) >= first_wrong:
            least = ".".join(map(str, first_wrong))
            yield Row(
                "pairs", f"{project} {version(project)}, {other} {version(other)}", "look", f"{what}: {other}<{least}"
            )


def _declared(found: Mapping[str, tuple[int, ...]]) -> Iterator[Row]:
    for project in found:
        for line in distribution(project).requires or ():
            parsed = re.match(r"([\w.-]+)(?:\[[^]]*\])?\s*\(?([^;)]*)\)?\s*(;.*)?$", line)
            if parsed is None or "extra" in (parsed[3] or "") or parsed[1] not in found:
                continue
            if not satisfies(found[parsed[1]], parsed[2]):
                what = f"{project} {version(project)}, {parsed[1]} {version(parsed[1])}"
                yield Row("pairs", what, "look", f"{project} asks for it: pip install '{parsed[1]}{parsed[2].strip()}'")


def satisfies(found: tuple[int, ...], asked: str) -> bool:
    """Whether a release is what a requirement asks for: `>=1.22,<2.6`, `==3.6.0`, `~=3.8.0`."""
    return all(_one(found, *parsed) for parsed in re.findall(r"(~=|==|!=|<=|>=|<|>)\s*([\w.*+]+)", asked))


def _one(found: tuple[int, ...], sign: str, text: str) -> bool:
    asked = release(text)
    size = max(len(found), len(asked))
    own, theirs = ((*r, *(0,) * (size - len(r))) for r in (found, asked))
    same = found[: len(asked)] == asked if text.endswith(".*") else own == theirs
    if sign == "~=":
        return own >= theirs and found[: len(asked) - 1] == asked[:-1]
    return {"==": same, "!=": not same, "<": own < theirs, "<=": own <= theirs, ">": own > theirs, ">=": own >= theirs}[
        sign
    ]


def codec() -> tuple[str, str]:
    """(which nvImageCodec DALI has, what is wrong with it); empty where there is none, or nothing."""
    for project in filter(_there, _CODECS):
        found = version(project)
        wrong = "it decodes regions of JPEGs on a GPU wrongly; training here decodes whole images and is right"
        return f"nvImageCodec {found}", wrong if release(found)[:3] == _BROKEN_CODEC else ""
    return "", ""


def compiler_row(num_gpus: int) -> Row:
    """What `--step compiled` compiles with: C++ on a CPU; on a GPU Triton asks for C, and for Python's headers."""
    cxx, cc = (os.environ.get(name) or name for name in ("CXX", "CC"))
    names = (cc, "gcc", "clang") if num_gpus else (cxx, "g++", "clang++")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        remedy = "--step compiled needs one, and is eager without: install gcc and g++, or set CC and CXX"
        return Row("compiler", "none", "look", remedy)
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not headers.exists():
        remedy = "--step compiled needs Python's headers, and is eager without: install python3-dev"
        return Row("compiler", f"{found}, but no {headers}", "look", remedy)
    return Row("compiler", found, "ok")
