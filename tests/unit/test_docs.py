"""What the documentation names exists: files, links, commands with their options, recipes, protocols, exit codes."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import click
import pytest

import fastssl
from fastssl import errors
from fastssl.commands.help import EXAMPLES
from fastssl.commands.main import main
from fastssl.evaluation import load_protocol, protocol_names
from fastssl.evaluation.predict import Predictions
from fastssl.recipes.resolve import recipes, resolve
from fastssl.run_dir import files

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md")) + [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist(page):
    named = re.findall(
        r"(?<![\w./-])((?:fastssl|loaders|tests|tools|benchmarks|docs|examples)/[\w./-]*)", page.read_text()
    )
    of_yours = re.compile(r"\bX\.py|test_X")  # stands for a file that a reader will write
    assert [name for name in named if not (ROOT / name.rstrip(".")).exists() and not of_yours.search(name)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_the_rooms_of_the_architecture_are_those_of_the_house():
    from tests.test_import_rules import FLOORS

    rows = re.findall(r"^\| (\d) \| (.*?) \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE)
    told = {(int(floor), Path(name).stem) for floor, names in rows for name in re.findall(r"`([\w./]+?)/?`", names)}
    assert told == {(floor, room) for floor, rooms in enumerate(FLOORS) for room in rooms}


# ---------------------------------------------------------------------------------------------------------- commands

OTHER_PROGRAMS = {"python3", ".venv/bin/fastssl"}  # the two set-up commands have tests of their own
OTHERS_OPTIONS = {"--signals-to-handle", "--signal"}  # torchrun's, scancel's


def commands(page: Path) -> list[list[str]]:
    """Every line of the page's shell blocks, as its words, comments left out."""
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_can_be_typed(page, monkeypatch):
    """An option that is gone, a recipe or a setting renamed, a protocol or a module that there is not."""
    monkeypatch.setattr(click.Path, "convert", lambda self, value, param, ctx: Path(value))  # RUN need not exist
    monkeypatch.chdir(ROOT)
    for program, *words in commands(page):
        if program == "fastssl":
            check_dry(words)
        elif program in ("python", ".venv/bin/python") and words[0] == "-m":
            assert importlib.util.find_spec(words[1]), words
        else:
            assert program in OTHER_PROGRAMS or program.startswith(".venv/bin/ruff"), program


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_examples_in_help_can_be_typed(line, monkeypatch):
    monkeypatch.setattr(click.Path, "convert", lambda self, value, param, ctx: Path(value))
    check_dry(shlex.split(line)[1:])


def check_dry(words: list[str]) -> None:
    """Parse a `fastssl` command, and what its values name; nothing is run."""
    name, *rest = words
    given = main.commands[name].make_context(name, rest).params
    if (recipe := given.get("recipe")) not in (None, "RECIPE"):
        swept = tuple(each.partition(",")[0] for each in given.get("swept", ()))
        resolve(recipe, (*given.get("changes", ()), *swept))
    for protocol in given.get("protocols", ()):
        load_protocol(protocol)


def test_a_command_that_cannot_be_typed_would_be_noticed(monkeypatch):
    for wrong in (["train", "--epochs", "3"], ["train", "paws.digits", "--set", "colour=3"], ["eval", "RUN"]):
        with pytest.raises((click.ClickException, errors.FastsslError, KeyError)):
            check_dry(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_options_recipes_and_protocols_in_running_text_are_those_of_the_code(page):
    text = page.read_text()
    options = {o for c in main.commands.values() for p in c.params for o in p.opts} | {"--help", "--version"}
    of_tools = {
        option
        for module in re.findall(r"python -m ((?:tools|benchmarks)[\w.]*)", text)
        for source in [importlib.util.find_spec(module).origin]
        for option in re.findall(r'"(--[a-z][a-z-]+)"', Path(source).read_text())
    }
    pip_and_pytest = {"--only-binary"}
    named = set(re.findall(r"`[^`\n]*?(--[a-z][a-z-]+)", text))
    assert named - options - of_tools - OTHERS_OPTIONS - pip_and_pytest == set()
    methods = "|".join({name.partition(".")[0] for name in recipes()})
    said = set(re.findall(rf"`((?:{methods})\.[a-z0-9_]+)`", text)) - {"supervised.py"}
    assert {name for name in said if not name.endswith((".py", ".md"))} - recipes().keys() == set()
    assert set(re.findall(r"--protocol ([a-z-]+)", text)) - {"name"} <= set(protocol_names())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_of_a_page_names_what_there_is(page):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                kind = {"fastssl": fastssl, "run": fastssl.Run, "found": Predictions}.get(node.value.id)
                own = hasattr(kind, node.attr) or node.attr in getattr(kind, "__annotations__", ())
                assert kind is None or own, f"{node.value.id}.{node.attr}"


def test_every_protocol_is_told_of():
    page = (ROOT / "docs/evaluating.md").read_text()
    assert set(re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE)) >= set(protocol_names())


def test_exit_codes_and_files_of_a_run_are_the_codes():
    page = (ROOT / "docs/running.md").read_text()
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert codes == {0, 1, 2, errors.EXIT_STOPPED, errors.EXIT_HUNG}
    told = re.findall(r"^\| `([^|]*)` \|", page.partition("## What a run leaves")[2], re.MULTILINE)
    assert {files.RESOLVED, files.RESULT, f"{files.CHECKPOINTS}/", "metrics.jsonl"} <= set(told)
