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

# The rooms of the house by floor, from the ground: a room stands one floor above the highest that it imports.
# `loaders` is the ground that the house stands on; benchmarks and tools stand beside it and nothing imports them.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"loaders"}),
    frozenset({"errors", "dist", "machine", "html"}),
    frozenset({"config", "weights", "launch", "nn", "optim", "losses"}),
    frozenset({"record", "methods"}),
    frozenset({"run_dir", "recipes", "evaluation"}),
    frozenset({"engine", "export"}),
    frozenset({"costs", "report"}),
    frozenset({"profiling", "api"}),
    frozenset({"commands"}),
)
MOST_FLOORS, MOST_ROOMS = 10, 26

# room -> (rooms of ours, libraries) that it may import; the longest matching name rules; a room may import itself
GROUND = {"fastssl.errors", "fastssl.config", "fastssl.dist", "fastssl.machine"}
CONTRACT = GROUND | {"fastssl.methods.base", "fastssl.weights.read", "loaders"}
DISK = {"loaders.files", "loaders.errors"}
PIXELS = {"loaders.plan", "loaders.store", "loaders.errors", "loaders.timing"}
RULES: dict[str, tuple[set[str], set[str]]] = {
    "loaders.errors": (set(), set()),
    "loaders.files": (set(), set()),
    "loaders.plan": ({"loaders.errors"}, {"numpy"}),
    "loaders.timing": (set(), {"numpy"}),
    "loaders.store": (DISK | {"loaders.plan"}, {"numpy", "PIL"}),
    "loaders.store.parquet": ({"loaders.errors", "loaders.store"}, {"numpy", "pyarrow"}),
    "loaders.store.crc32c": (set(), {"numpy", "numba"}),
    "loaders.labels": (DISK | {"loaders.plan", "loaders.store"}, {"numpy"}),
    "loaders.convert": (DISK | {"loaders.store", "loaders.labels"}, {"numpy", "PIL"}),
    "loaders.published": ({"loaders.plan", "loaders.store", "loaders.labels", "loaders.errors"}, {"numpy", "PIL"}),
    "loaders.renderers": (PIXELS, {"numpy", "PIL", "numba", "llvmlite"}),
    "loaders.renderers.turbo": (PIXELS | {"loaders.renderers"}, {"numpy", "simplejpeg"}),
    "loaders.renderers.ffcv": (PIXELS | {"loaders.renderers"}, {"numpy", "numba", "llvmlite"}),
    "loaders.renderers.dali": (PIXELS | {"loaders.renderers"}, {"numpy", "torch", "nvidia"}),
    "loaders.finish": ({"loaders.plan"}, {"numpy", "numba", "llvmlite"}),
    "loaders.finish.triton": ({"loaders.plan", "loaders.finish"}, {"numpy", "torch", "triton"}),
    "loaders.batch": (set(), {"torch"}),
    "loaders.device": (set(), {"torch"}),
    "loaders.loader": ({"loaders"}, {"numpy", "torch"}),
    "loaders.__init__": ({"loaders"}, set()),
    "fastssl.errors": (set(), set()),
    "fastssl.dist": (set(), {"torch"}),
    "fastssl.machine": (set(), {"numpy", "torch"}),
    "fastssl.html": (set(), set()),
    "fastssl.config": ({"fastssl.errors"}, set()),
    "fastssl.weights": ({"fastssl.errors", "loaders.files"}, {"torch", "safetensors"}),
    "fastssl.weights.unpickle": (set(), {"torch", "safetensors", "numpy"}),
    "fastssl.launch": ({"fastssl.errors", "fastssl.dist", "loaders.errors"}, {"torch", "submitit"}),
    "fastssl.record": (
        {"fastssl.errors", "fastssl.config", "loaders.files"},
        {"rich", "torch", "tensorboard", "wandb"},
    ),
    "fastssl.record.clock": (set(), set()),
    "fastssl.run_dir": (
        {"fastssl.errors", "fastssl.config", "fastssl.dist", "fastssl.machine", "fastssl.weights"}
        | {"fastssl.methods.base", "loaders.files"},
        {"torch"},
    ),
    "fastssl.nn": ({"fastssl.dist", "fastssl.machine"}, {"torch"}),
    "fastssl.nn.encoders.timm_models": ({"fastssl.nn", "fastssl.errors"}, {"torch", "timm"}),
    "fastssl.nn.norm.triton_kernels": (set(), {"torch", "triton"}),
    "fastssl.optim": ({"fastssl.errors", "fastssl.machine"}, {"torch"}),
    "fastssl.optim.lars_triton": (set(), {"torch", "triton"}),
    "fastssl.losses": ({"fastssl.dist"}, {"torch"}),
    "fastssl.methods": (
        GROUND | {"fastssl.nn", "fastssl.optim", "fastssl.losses", "fastssl.weights", "loaders.plan", "loaders.batch"},
        {"torch"},
    ),
    "fastssl.recipes": (
        GROUND | {"fastssl.methods", "fastssl.nn", "fastssl.optim", "fastssl.losses", "loaders.plan"},
        set(),
    ),
    "fastssl.recipes.resolve": (GROUND | {"fastssl.methods.base", "fastssl.optim.horizon", "fastssl.recipes"}, set()),
    "fastssl.recipes.datasets": (set(), set()),
    "fastssl.evaluation": (CONTRACT | {"fastssl.optim.rates"}, {"torch", "numpy", "scipy"}),
    "fastssl.engine": (
        CONTRACT
        | {"fastssl.nn", "fastssl.optim.fused", "fastssl.record", "fastssl.evaluation", "fastssl.run_dir"}
        | {"fastssl.weights"},
        {"torch", "numpy"},
    ),
    "fastssl.export": (
        CONTRACT | {"fastssl.evaluation.accuracies", "fastssl.nn", "fastssl.run_dir", "fastssl.weights"},
        {"torch", "safetensors", "onnxruntime"},
    ),
    "fastssl.costs": (CONTRACT | {"fastssl.engine", "fastssl.nn.recompute", "fastssl.recipes"}, {"torch"}),
    "fastssl.report": (
        CONTRACT | {"fastssl.engine", "fastssl.evaluation", "fastssl.html", "fastssl.record", "fastssl.run_dir"},
        {"torch", "numpy", "PIL", "sklearn"},
    ),
    "fastssl.profiling": (
        CONTRACT | {"fastssl.costs", "fastssl.engine", "fastssl.html", "fastssl.recipes", "fastssl.run_dir"},
        {"torch", "numpy", "PIL", "rich"},
    ),
    "fastssl.api": (
        CONTRACT
        | {"fastssl.costs", "fastssl.engine", "fastssl.evaluation", "fastssl.export", "fastssl.launch"}
        | {"fastssl.recipes", "fastssl.record", "fastssl.report", "fastssl.run_dir"},
        {"torch", "numpy", "PIL"},
    ),
    "fastssl.__init__": ({"fastssl.api"}, set()),
    "fastssl.commands": ({"fastssl", "loaders"}, {"click", "rich", "torch", "numpy"}),
    "fastssl.__main__": ({"fastssl.commands"}, set()),
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

    assert told("loaders.loader", "fastssl.errors.ConfigError", "torch") == ["fastssl.errors.ConfigError"]
    assert told("fastssl.engine.train", "fastssl.methods.paws", "fastssl.dist") == ["fastssl.methods.paws"]
    assert told("fastssl.nn.heads", "numpy", "torch.nn", "fastssl.nn.trunks.resnet") == ["numpy"]
    assert told("fastssl.config", "tests.conftest", "json") == ["tests.conftest"]
    assert told("fastssl.newcomer") == ["fastssl.newcomer stands in no room"]


def room_of(name: str) -> str:
    """The room of a module: the second part of a name in fastssl, or the loaders."""
    top, _, rest = name.partition(".")
    return top if top == "loaders" else rest.partition(".")[0]


def arrows() -> dict[str, set[str]]:
    """Room -> the rooms that its files import."""
    found: dict[str, set[str]] = {}
    for module, tree in sources("fastssl", "loaders").items():
        names = {name for name in imports(tree) if name.partition(".")[0] in ("fastssl", "loaders")}
        found.setdefault(room_of(module), set()).update(room_of(name) for name in names)
    return {room: others - {room} for room, others in found.items() if not room.startswith("__")}


def misplaced(floors: tuple[frozenset[str], ...], found: dict[str, set[str]]) -> list[str]:
    """Rooms without a floor, arrows that do not run down, and rooms higher than what they stand on."""
    floor_of = {room: floor for floor, rooms in enumerate(floors) for room in rooms}
    faults = [f"{room} has no floor" for room in sorted(found.keys() - floor_of.keys())]
    for room, others in sorted(found.items()):
        known = {other: floor_of[other] for other in others if other in floor_of}
        faults += [f"{room} -> {other}" for other in sorted(known) if known[other] >= floor_of.get(room, len(floors))]
        if room in floor_of and not faults and floor_of[room] > max([*known.values(), 0]) + (room != "loaders"):
            faults.append(f"{room} floats")
    return faults


def test_every_arrow_runs_down_and_no_room_floats():
    assert misplaced(FLOORS, arrows()) == []
    assert len(FLOORS) <= MOST_FLOORS
    assert sum(map(len, FLOORS)) + len({"benchmarks", "tools"}) <= MOST_ROOMS


def test_the_floors_would_notice():
    """An arrow up, a circle, a room nobody placed, and one that is drawn higher than it stands."""
    floors = (frozenset({"loaders"}), frozenset({"errors", "dist"}), frozenset({"nn"}))
    assert misplaced(floors, {"nn": {"dist"}, "dist": {"loaders"}}) == []
    assert misplaced(floors, {"dist": {"nn"}}) == ["dist -> nn"]
    assert misplaced(floors, {"dist": {"errors"}, "errors": {"dist"}}) == ["dist -> errors", "errors -> dist"]
    assert misplaced(floors, {"attic": {"nn"}}) == ["attic has no floor"]
    assert misplaced(floors, {"nn": {"loaders"}}) == ["nn floats"]


def test_only_methods_and_recipes_name_a_concrete_method():
    """A command or engine that names a method has a branch that the contract should carry."""
    found = []
    for module, tree in sources("fastssl", "loaders").items():
        if not within(module, {"fastssl.methods", "fastssl.recipes"} - {"fastssl.recipes.resolve"}):
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
