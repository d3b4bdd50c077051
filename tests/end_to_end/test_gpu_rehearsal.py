"""A call of the GPU run that is lost in the middle, by SIGKILL, and given again, as `tools.rehearse` does with all."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks.gpu.__main__ import PARTS
from tests.end_to_end.command import ROOT
from tools.rehearse import Wrong, call, found_in, holds, lonely


@pytest.fixture
def machine(tmp_path):
    """Where a call works once all that must pass has, and what it finds in its environment."""
    passed = {name: {"state": "done", "found": {}} for name, part in PARTS.items() if part.must_pass}
    (tmp_path / "gpu.json").write_text(json.dumps({"parts": passed}))
    return tmp_path, lonely(tmp_path / "bin") | {"PYTHONPATH": str(ROOT)}


def test_a_killed_call_goes_on_and_ends(machine):
    """Catches a part that is measured anew, or never, after the machine was lost, and one that needs git."""
    tree, environment = machine
    called = call(
        [sys.executable, "-m", "benchmarks.gpu", "loader", "--dry-run"], ("loader",), tree, environment, 200.0
    )
    assert called.killed_in == ["loader"] and called.times == 2
    found = found_in(tree)["loader"]["found"]
    assert found["raw, memory"]["images_per_s"] > 0 and "need a card" in found["left out"]
    assert called.said.startswith("next, call 1 of 4: python -m benchmarks.gpu --json gpu.json --dry-run lars")


def test_what_a_rehearsal_must_notice(machine):
    """Catches a rehearsal that passes whatever the calls do."""
    tree, environment = machine
    forgets = """
import json, os, time
first = not json.load(open("gpu.json"))["parts"].get("loader")
found = {"one": 1} if first else {"two": 2}
def put(state):
    json.dump({"parts": {"loader": {"state": state, "found": found}}}, open("writing", "w"))
    os.replace("writing", "gpu.json")
put("begun")
time.sleep(5 if first else 0)
put("done")
"""
    with pytest.raises(Wrong, match="loader was killed, and lost one"):
        call([sys.executable, "-c", forgets], ("loader",), tree, environment, 100.0)
    with pytest.raises(Wrong, match=r"accuracy ended with 3:\nno card"):
        call([sys.executable, "-c", "print('no card'); raise SystemExit(3)"], ("accuracy",), tree, environment, 100.0)
    with pytest.raises(Wrong, match="did not end within its budget"):
        call([sys.executable, "-c", "import time; time.sleep(90)"], ("accuracy",), tree, environment, -29.0)
    assert holds({"windows": [1, 2], "more": 0}, {"windows": [1]}) and not holds({"windows": [2]}, {"windows": [1]})
