"""What the documentation names exists: files, folders and links."""

import re
from pathlib import Path

import pytest

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
