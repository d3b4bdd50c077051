"""What is too long is named, one line past the limit and not at it."""

import subprocess
from pathlib import Path

import pytest

from tools.house import faults, sources


def function(name, num_lines):
    return f"def {name}():\n" + "    pass\n" * (num_lines - 1)


def test_a_function_counts_from_def_to_its_end():
    file = Path("loaders/one.py")
    short = "".join(function(f"short_{i}", 2) for i in range(3))
    assert faults({file: short + "@decorated(\n\n)\n" + function("long", 80)}) == []
    assert faults({file: function("long", 81) + short}) == ["loaders/one.py: long, line 1: 81 lines, at most 80"]
    nested = function("outer", 2) + "    async def inner():\n" + "        pass\n" * 80
    assert faults({file: short + nested}) == [
        "loaders/one.py: outer, line 7: 83 lines, at most 80",
        "loaders/one.py: inner, line 9: 81 lines, at most 80",
    ]


def test_the_median_is_that_of_both_packages_together():
    texts = {Path("fastssl/a.py"): function("f", 7) + function("g", 7), Path("loaders/b.py"): function("h", 8)}
    assert faults(texts) == []
    texts[Path("tools/c.py")] = function("i", 80) + function("j", 200)
    assert faults(texts) == []
    texts[Path("loaders/b.py")] += function("k", 8)
    assert faults(texts) == ["the median function has 7.5 lines, at most 7"]


def test_a_file_has_the_limit_of_its_room():
    names = {"fastssl/methods/a.py": 450, "fastssl/engine/a.py": 500, "tests/unit/a.py": 500, "tools/a.py": 500}
    assert faults({Path(name): "#\n" * most for name, most in names.items()}) == []
    assert faults({Path(name): "#\n" * (most + 1) for name, most in names.items()}) == [
        f"{name}: {most + 1} lines, at most {most}" for name, most in names.items()
    ]
    assert faults({Path("loaders/finish/numba_cpu.py"): "#\n" * 900}) == []


def test_nothing_here_is_too_long():
    try:
        texts = sources()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout: which files belong to the project is not known")
    assert len(texts) > 300 and faults(texts) == []
