"""The arrows between the rooms, and what holds for every file: read from the sources, nothing is imported.

A module that no rule covers fails: say here what it may import before it is written.
"""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# room -> (rooms of ours, libraries) that it may import; the longest matching name rules; a room may import itself
CONTRACT = {"fastssl.config", "fastssl.dist", "fastssl.methods.base", "fastssl.weights.read", "loaders"}
PIXELS = {"loaders.plan", "loaders.store", "loaders.errors", "loaders.timing"}
RULES: dict[str, tuple[set[str], set[str]]] = {
    "loaders.errors": (set(), set()),
    "loaders.plan": ({"loaders.errors"}, {"numpy"}),
    "loaders.timing": (set(), {"numpy"}),
    "loaders.store": ({"loaders.plan", "loaders.errors"}, {"numpy", "PIL", "sklearn"}),
    "loaders.labels": ({"loaders.plan", "loaders.store", "loaders.errors"}, {"numpy"}),
    "loaders.convert": ({"loaders.store", "loaders.labels", "loaders.errors"}, {"numpy", "PIL"}),
    "loaders.published": ({"loaders.plan", "loaders.store", "loaders.labels", "loaders.errors"}, {"numpy", "PIL"}),
    "loaders.renderers": (PIXELS, {"numpy", "PIL", "numba", "llvmlite"}),
    "loaders.renderers.ffcv": (PIXELS | {"loaders.renderers"}, {"numpy", "numba", "llvmlite"}),
    "loaders.renderers.dali": (PIXELS | {"loaders.renderers"}, {"numpy", "nvidia"}),
    "loaders.finish": ({"loaders.plan"}, {"numpy", "numba", "llvmlite"}),
    "loaders.finish.triton_cuda": ({"loaders.plan", "loaders.finish"}, {"numpy", "torch", "triton"}),
    "loaders.batch": (set(), {"torch"}),
    "loaders.loader": ({"loaders"}, {"numpy", "torch"}),
    "loaders.__init__": ({"loaders"}, set()),
    "fastssl.config": (set(), set()),
    "fastssl.weights.tensor_files": ({"fastssl.config"}, {"torch", "safetensors"}),
    "fastssl.weights.unpickle": (set(), {"torch", "safetensors"}),
    "fastssl.weights.layouts": (set(), {"torch"}),
    "fastssl.weights.read": ({"fastssl.weights.layouts", "fastssl.weights.tensor_files"}, {"torch"}),
    "fastssl.export.architecture": ({"fastssl.config", "fastssl.nn", "fastssl.weights.read"}, {"torch"}),
    "fastssl.export.folder": (
        {
            "fastssl.config",
            "fastssl.engine",
            "fastssl.evaluation.summary",
            "fastssl.export.architecture",
            "fastssl.weights.layouts",
        }
        | {"fastssl.nn.encoders", "fastssl.weights.read"},
        {"torch", "safetensors"},
    ),
    "fastssl.datasets": (set(), set()),
    "fastssl.record.clock": (set(), set()),
    "fastssl.converting": ({"fastssl.config", "loaders"}, {"rich"}),
    "fastssl.record.trackers": ({"fastssl.config"}, {"torch", "tensorboard", "wandb"}),
    "fastssl.record.recorder": ({"fastssl.config", "fastssl.record.trackers"}, {"rich"}),
    "fastssl.devices": (set(), {"torch"}),
    "fastssl.dist": (set(), {"torch"}),
    "fastssl.launch": (
        {"fastssl.config", "fastssl.dist", "fastssl.engine", "fastssl.costs.memory", "loaders"},
        {"torch"},
    ),
    "fastssl.doctor": (set(), {"rich"}),
    "fastssl.sweep": (
        CONTRACT | {"fastssl.engine", "fastssl.evaluation", "fastssl.recipes", "fastssl.record.trackers"},
        {"numpy"},
    ),
    "fastssl.submit": ({"fastssl.config", "fastssl.engine.job", "fastssl.launch"}, {"submitit"}),
    "fastssl.nn": ({"fastssl.devices", "fastssl.dist"}, {"torch"}),
    "fastssl.nn.norm.triton_kernels": (set(), {"torch", "triton"}),
    "fastssl.optim": ({"fastssl.devices"}, {"torch"}),
    "fastssl.optim.lars_triton": (set(), {"torch", "triton"}),
    "fastssl.methods": (
        {"fastssl.nn", "fastssl.optim", "fastssl.dist", "fastssl.config", "fastssl.weights.read"}
        | {"loaders.plan", "loaders.batch"},
        {"torch"},
    ),
    "fastssl.recipes": ({"fastssl.config", "fastssl.methods"}, set()),
    "fastssl.evaluation": (CONTRACT, {"torch", "numpy", "sklearn"}),
    "fastssl.engine": (
        CONTRACT
        | {
            "fastssl.nn.recompute",
            "fastssl.record.clock",
            "fastssl.record.recorder",
            "fastssl.evaluation",
            "fastssl.recipes",
        }
        | {"fastssl.datasets", "fastssl.record.trackers", "fastssl.weights.read", "fastssl.weights.tensor_files"},
        {"torch", "numpy"},
    ),
    "fastssl.profiling": (
        CONTRACT | {"fastssl.engine", "fastssl.datasets", "fastssl.recipes"},
        {"torch", "numpy", "PIL", "rich"},
    ),
    "fastssl.profiling.page": ({"fastssl.html.page", "fastssl.html.charts"}, {"rich"}),
    "fastssl.report": (
        CONTRACT | {"fastssl.engine", "fastssl.evaluation", "fastssl.record.recorder"},
        {"torch", "numpy", "PIL", "sklearn"},
    ),
    "fastssl.html.page": (set(), set()),
    "fastssl.html.charts": ({"fastssl.html.page"}, set()),
    "fastssl.dry_run": (
        CONTRACT | {"fastssl.engine", "fastssl.datasets", "fastssl.recipes", "fastssl.profiling", "fastssl.launch"},
        {"torch"},
    ),
    "fastssl.__main__": ({"fastssl.cli"}, set()),
    "fastssl.cli": ({"fastssl", "loaders"}, {"click", "rich", "torch", "numpy"}),
}
DISTRIBUTIONS = {  # where import and project differ
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "llvmlite": "numba",
    "nvidia": "nvidia-dali-cuda130",
}


@cache
def tracked() -> tuple[Path, ...]:
    """The repository's files, those not yet added included."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: which files belong to the project is not known")
    return tuple(ROOT / name for name in listed.splitlines() if (ROOT / name).is_file())


def sources(*folders: str) -> dict[str, ast.Module]:
    """Module name -> parsed source of every non-empty .py file in `folders`."""
    found = {}
    for path in tracked():
        parts = path.relative_to(ROOT).with_suffix("").parts
        if path.suffix == ".py" and parts[0] in folders and (text := path.read_text()):
            found[".".join(parts)] = ast.parse(text, str(path))
    return found


def imports(tree: ast.Module) -> set[str]:
    """Dotted names imported anywhere in a file, in functions too; `from a import b` counts as a.b."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, rooms: set[str]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def faults(module: str, names: set[str]) -> list[str]:
    """Which of `names` the module may not import."""
    room = max((r for r in RULES if within(module, {r})), key=len, default=None)
    if room is None:
        return [f"{module} stands in no room"]
    ours, libraries = RULES[room]
    found = []
    for name in sorted(names):
        top = name.partition(".")[0]
        if top in ("fastssl", "loaders"):
            allowed = within(name, ours | {room})
        else:
            allowed = top in libraries or top in sys.stdlib_module_names
        if not allowed:
            found.append(f"{module} imports {name}")
    return found


def test_the_arrows_between_rooms_hold():
    found = [f for module, tree in sources("fastssl", "loaders").items() for f in faults(module, imports(tree))]
    assert found == []


def test_the_rules_would_notice():
    def told(module: str, *names: str) -> list[str]:
        return [f.removeprefix(f"{module} imports ") for f in faults(module, set(names))]

    assert told("loaders.loader", "fastssl.config.ConfigError", "torch") == ["fastssl.config.ConfigError"]
    assert told("fastssl.engine.train", "fastssl.methods.paws", "fastssl.dist") == ["fastssl.methods.paws"]
    assert told("fastssl.nn.heads", "numpy", "torch.nn", "fastssl.nn.trunks.resnet") == ["numpy"]
    assert told("fastssl.config", "tests.conftest", "json") == ["tests.conftest"]
    assert told("fastssl.newcomer") == ["fastssl.newcomer stands in no room"]


def test_only_methods_and_tests_name_a_concrete_method():
    """A command or engine that names a method has a branch that the contract should carry."""
    found = []
    for module, tree in sources("fastssl", "loaders").items():
        if not within(module, {"fastssl.methods"}):
            concrete = {n for n in imports(tree) if within(n, {"fastssl.methods"}) and n != "fastssl.methods"}
            found += [f"{module} imports {n}" for n in sorted(concrete) if not within(n, {"fastssl.methods.base"})]
    assert found == []


def test_every_library_is_declared():
    """An import that works only because something else happened to install the library."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    declared = {re.split(r"[<>=]", line)[0].strip() for text in lines for line in text.splitlines() if line.strip()}
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    tops = {n.partition(".")[0] for tree in sources("fastssl", "loaders").values() for n in imports(tree)}
    third_party = tops - set(sys.stdlib_module_names) - {"fastssl", "loaders"}
    assert {DISTRIBUTIONS.get(top, top) for top in third_party} - declared == set()
    assert declared - pinned == set()


def test_every_file_says_what_it_is_for():
    trees = sources("fastssl", "loaders", "tests", "tools", "benchmarks")
    assert [module for module, tree in trees.items() if not ast.get_docstring(tree)] == []


def test_no_file_holds_a_path_of_one_machine():
    """A path that works on the author's machine only."""
    one_machine = re.compile(rb"(?<![\w.$}])/(?:work|root|home/[a-z]+)/")
    assert one_machine.search(b"see /" + b"work/x") and not one_machine.search(b"../" + b"work/x")
    files = [path for path in tracked() if b"\0" not in path.read_bytes()[:8192]]
    assert [str(p.relative_to(ROOT)) for p in files if one_machine.search(p.read_bytes())] == []


def test_no_text_is_read_as_markup():
    """Rich takes `[...]` for a style and `:name:` for a picture, in paths and extras as well."""
    wrong = []
    for module, tree in sources("fastssl", "loaders", "benchmarks", "tools").items():
        for node in ast.walk(tree):
            name = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            off = {k.arg for k in node.keywords if not getattr(k.value, "value", True)} if name else set()
            if {"Console": {"markup", "emoji"}, "TextColumn": {"markup"}}.get(name, set()) - off:
                wrong.append(f"{module}:{node.lineno}")
        if imports(tree) & {"rich.print", "rich.markup.render", "rich.prompt.Prompt"}:
            wrong.append(module)
    assert wrong == []
