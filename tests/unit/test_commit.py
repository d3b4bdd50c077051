"""Which commit a run says that it is: this code's, never that of a repository it is installed in."""

import shutil
import subprocess

import pytest

from benchmarks import machine
from fastssl import machine as ours

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="no git")


def test_no_git_is_no_error(monkeypatch, tmp_path):
    """Catches the FileNotFoundError with which training ended where no git is on the PATH, as in slim containers."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ours.versions()["commit"] == machine.commit() == "unknown"


@needs_git
def test_a_copy_inside_a_repository_has_no_commit_until_it_is_tracked(monkeypatch, tmp_path):
    """An environment usually lies in the repository of whoever uses it: that commit says nothing of our code."""

    def git(*words):
        who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    (tmp_path / "mine.py").write_text("")
    (copy := tmp_path / "machine.py").write_text("")
    git("init", "-q")
    git("add", "mine.py")
    git("commit", "-q", "-m", "mine")
    monkeypatch.setattr(ours, "__file__", str(copy))
    assert ours.commit() == "unknown"
    git("add", "machine.py")
    git("commit", "-q", "-m", "a copy")
    assert ours.commit() == git("rev-parse", "HEAD").strip()
