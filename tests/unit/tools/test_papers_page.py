"""The page of the papers: nothing on it that there is not, nothing behind what recipes say."""

import re
import shlex

import pytest

from fastssl.recipes.published import published_of
from fastssl.recipes.resolve import recipes, resolve
from tools import papers_page

ROWS = [(paper.title, row) for paper in papers_page.PAPERS for row in paper.rows]
METHODS = {name.partition(".")[0] for name in recipes()}


def commands(row):
    """(recipe, its `--set` changes, its `--sweep` keys with their first value) of each recipe that the row names."""
    for code in re.findall(r"`([^`]+)`", row.how):
        name, *words = shlex.split(code)
        if name.partition(".")[0] in METHODS and not name.endswith(".py"):
            values = dict(zip(words[1::2], words[::2], strict=True))
            assert set(values.values()) <= {"--set", "--labels"}, code
            yield name, tuple(values)


def test_the_page_is_what_the_tool_writes():
    """A number changed, or a row added, without the page: `python -m tools.papers_page` writes it."""
    assert papers_page.PAGE.read_text() == papers_page.page()


@pytest.mark.parametrize("title, row", ROWS, ids=lambda value: getattr(value, "place", value)[:12])
def test_recipes_and_settings_of_a_row_are_there(title, row):
    """Catches a recipe renamed and a setting that is gone."""
    for name, changes in commands(row):
        assert name in recipes()
        resolve(name, changes)
    assert re.match(r"there|differs|missing", row.status)
    assert bool(row.how) != row.status.startswith("missing")


def test_rows_name_settings_at_all():
    """Else the test above would look at nothing."""
    found = [command for _, row in ROWS for command in commands(row)]
    assert len(found) > 80 and sum(bool(changes) for _, changes in found) > 30


def test_every_published_number_stands_on_the_page():
    """A paper's number that no section takes up."""
    page = papers_page.page()
    for name, recipe in recipes().items():
        for each in published_of(recipe):
            assert f"| `{name}` | {each} |" in page
