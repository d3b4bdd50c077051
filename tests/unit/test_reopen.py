"""A run opened again, as `fastssl evaluate` and `fastssl embed` do."""

import pytest

from fastssl.engine import reopen
from fastssl.engine.stages import run
from tests import fakes


@pytest.fixture(autouse=True)
def fake_recipe(monkeypatch):
    monkeypatch.setattr(reopen, "resolve", lambda name, changes: fakes.stages("paws"))


def test_a_damaged_checkpoint_is_passed_over_and_named_on_stderr(tmp_path, capsys):
    """Catches numbers of an earlier step that pass for the last one's; stdout is JSON, so it is no place to say it."""
    run(fakes.job(fakes.stages("paws"), tmp_path))
    assert reopen.open_run(tmp_path, ())[1] == 6
    capsys.readouterr()
    newest = tmp_path / "checkpoints" / "step-00000006" / "state.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    assert reopen.open_run(tmp_path, ())[1] == 3
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"warning: checkpoint {newest.parent} is damaged") and "to step 3" in err
