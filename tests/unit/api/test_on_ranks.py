"""What is looked at before a job's ranks are started."""

import shutil
from pathlib import Path

import pytest

from fastssl.api import on_ranks
from fastssl.errors import FastsslError
from tests.support import fakes


def test_no_room_for_compiled_kernels_is_said_at_the_door(monkeypatch, tmp_path):
    """Catches ranks that wait for one which could not write its kernels."""
    job, usage = fakes.job(fakes.stages("paws"), Path("run"), device="cuda"), shutil.disk_usage(tmp_path)
    asked = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "not" / "there"))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage._replace(free=(3 << 20) if path == tmp_path else 1 << 40)
    )
    monkeypatch.setattr(on_ranks.memory_model, "refuse_job", lambda *given: asked.append(given))
    with pytest.raises(FastsslError, match="there, which keeps compiled code, has 3 MiB left: free some, or set TR"):
        on_ranks._check_room(job)
    assert asked == []
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    on_ranks._check_room(job)
    assert len(asked) == 1
