"""What the README and the pages of recipes promise: tables, commands and ten lines of code."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastssl.evaluation.linear import LARGEST_FOR_LBFGS
from fastssl.recipes.measured import MEASURED
from fastssl.recipes.published import cells
from fastssl.recipes.resolve import recipes
from loaders.published.transfer import TRANSFERS
from tools import recipe_page

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_readme_is_a_page_or_two():
    assert len(README.splitlines()) <= 150


def test_the_page_of_recipes_is_what_the_recipes_say():
    """A recipe added, or a number changed, without the page: `python -m tools.recipe_page` writes it."""
    page = recipe_page.page()
    assert recipe_page.PAGE.read_text() == page
    assert recipe_page.with_results(README) == README
    for name in recipes():
        assert f"| `{name}` |" in page


def test_what_was_measured_is_of_recipes_that_there_are_and_in_the_files_named():
    """A number without its evidence, a recipe renamed."""
    assert MEASURED.keys() <= recipes().keys()
    for name, measured in MEASURED.items():
        evidence = (ROOT / "benchmarks/results" / measured.results).read_text()
        assert f"{measured.top1}" in evidence and measured.commit in evidence, name
    assert set(recipe_page.IN_README) <= MEASURED.keys()


def test_paper_numbers_are_those_of_the_recipes():
    said = {name: cells(recipe) for name, recipe in recipes().items()}
    assert said["paws.rn50_100ep"] == ("71.0", "73.9") and said["paws.cifar10"] == ("–", "–")
    assert said["suncet.cifar10"] == ("96.0 ± 0.2", "–")  # which is after its 180 steps: PAWS's appendix C
    assert said["paws.rn50_100ep_1pct"] == ("62.6 / 61.5", "63.8")  # table 1, and the authors' README
    assert said["relicv2.rn50_300ep"] == ("–", "58.1 (1,000 ep.) / 72.4 (1,000 ep.)")
    assert said["s4l.supervised_1pct"] == ("–", "25.4 / 25.1")  # section 4.1, and the release
    assert said["supervised.paws_rn50_finetune_1pct"] == ("–", "63.8 / 66.1 / 66.5")
    assert sum(numbers != ("–", "–") for numbers in said.values()) >= 60


def test_sets_said_to_be_learnt_by_sgd_are_those_too_large_for_l_bfgs():
    """A limit moved, or a set added, without the sentence."""
    num_classes = {
        "food101": 101, "cifar10": 10, "cifar100": 100, "birdsnap": 500, "sun397": 397, "cars": 196, "aircraft": 100,
        "dtd": 47, "pets": 37, "caltech101": 102, "flowers": 102,
    }  # fmt: skip
    large = {k for k, t in TRANSFERS.items() if t.num_learn * 2048 * num_classes[k] > LARGEST_FOR_LBFGS}
    page = (ROOT / "docs/evaluating.md").read_text()
    (said,) = re.findall(r"With 2,048 features, SGD learns (.*?);", " ".join(page.split()))
    assert set(re.findall(r"`(.*?)`", said)) == large


def test_two_set_up_commands_each_make_their_own_environment():
    """A second command that leans on the first, or a stranger's package from PyPI."""
    commands = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    assert len(commands) == 2
    train, test = (command.split(" && ")[1:] for command in commands)
    assert train == [".venv/bin/pip install -c constraints.txt -e .", ".venv/bin/fastssl train"]
    assert test == [".venv/bin/pip install -c constraints.txt -e '.[test]'", ".venv/bin/python -m pytest -n 2"]
    assert not re.search(r"pip install fastssl", README)


def test_the_ten_lines_of_the_loaders_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "/data/images" in code]
    assert code in (ROOT / "docs/loaders.md").read_text()
    rng = np.random.default_rng(0)
    for i in range(64):
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})  # one thread
    names: dict = {}
    exec(code.replace("/data/images", str(tmp_path)), names)
    crops = names["crops"]
    assert tuple(crops.shape) == (128, 3, 96, 96) and crops.isfinite().all()
    assert not crops[:64].equal(crops[64:])
