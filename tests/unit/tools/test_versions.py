"""The environments that other versions are tried in, and the table of what was found."""

from __future__ import annotations

import pytest

from tools.versions import CHECKS, ENVIRONMENTS, UNIT, Missing, _constraints, _succeed, as_table, rooms, wrong


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda e: e.name)
def test_what_an_environment_asks_for_is_not_held_back_by_what_is_pinned(environment):
    """Catches constraints that name another version than the environment does: no installer can meet both, and the
    version would pass for one that cannot be had."""
    asked = dict(line.split("==") for line in environment.beside if "==" in line) | {
        "torch": environment.torch,
        "numpy": environment.numpy,
    }
    lines = (line.partition("#")[0].strip() for line in _constraints(environment).splitlines())
    held = dict(line.split("==") for line in lines if line)
    assert {project: held.get(project, version) for project, version in asked.items()} == asked


def test_why_an_environment_cannot_be_had_is_said():
    with pytest.raises(Missing, match="Cannot install"):
        _succeed(["sh", "-c", "echo 'ERROR: Cannot install a==1' >&2; echo 'ERROR: ResolutionImpossible' >&2; exit 1"])


def test_a_failed_check_is_in_the_table_and_ends_with_an_error():
    found = {"versions": {"torch": "2.0.0"}, "checks": {"train": {"ok": False, "text": "no gradient", "commit": "a"}}}
    assert "**failed**: no gradient" in as_table([found])
    assert wrong([found])
    assert not wrong([found | {"checks": {"train": {"ok": True, "text": "0.97", "commit": "a"}}}])


def test_every_unit_test_is_in_one_room_and_the_table_says_which_rooms_were_not_seen():
    """Catches a room that no check runs, and a row that counts one room and passes for all."""
    files = {path for path in UNIT.rglob("test_*.py")}
    assert {path.relative_to(UNIT).parts[0] for path in files if path.parent != UNIT} | {"files"} == set(rooms())
    found = {
        "versions": {"torch": "2.0.0"},
        "checks": {
            "unit nn": {"ok": True, "text": "7 passed, 1 skipped"},
            "unit optim": {"ok": True, "text": "4 passed, 0 skipped"},
            "unit engine": {"ok": False, "text": "1 failed: test_a"},
        },
    }
    table = as_table([found])
    assert "| unit |" in table and "11 passed, 1 skipped; **failed** in engine: 1 failed: test_a; not seen: " in table
    assert "methods" in table and wrong([found])
    whole = {"checks": {f"unit {room}": {"ok": True, "text": "1 passed, 0 skipped"} for room in rooms()}}
    assert f"| {len(rooms())} passed, 0 skipped |" in as_table([found | whole])
    assert len([name for name in CHECKS if name.startswith("unit ")]) == len(rooms())
