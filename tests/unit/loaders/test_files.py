"""Files and folders are whole, the old or the new, whatever happens while they are written."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from loaders.files import drop_folder, partial_of, put, sha256_of, whole_file, whole_folder, write_file
from tests.end_to_end.command import ROOT, kill, wait_until


class Asked(Exception):
    """What ends a writer's block."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(Asked), whole_file(path) as file:
        file.write(b"a part")
        raise Asked
    assert names(tmp_path) == []
    write_file(path, "the old, with ümlaut")
    with pytest.raises(Asked), whole_file(path) as file:
        file.write(b"a part")
        assert path.read_text("utf-8") == "the old, with ümlaut"
        raise Asked
    assert path.read_text("utf-8") == "the old, with ümlaut" and names(tmp_path) == ["x.json"]
    assert sha256_of(path) == hashlib.sha256("the old, with ümlaut".encode()).hexdigest()


def test_a_writer_that_fails_leaves_the_old_folder_and_nothing_else(tmp_path):
    place = tmp_path / "deep" / "folder"
    for content in ("old", "new"):
        with whole_folder(place) as folder:
            (folder / "inner").mkdir()
            (folder / "inner" / content).write_text(content)
            with pytest.raises(Asked), whole_folder(place.parent / "other") as other:
                (other / "a part").touch()
                raise Asked
    assert names(place.parent) == ["folder"] and names(place / "inner") == ["new"]
    drop_folder(place)
    assert names(place.parent) == []


def test_the_new_folder_that_gets_no_name_leaves_the_old_one(tmp_path, monkeypatch):
    """Would catch a place that is empty because the old folder was moved aside and the new one could not come."""
    place = tmp_path / "folder"
    with whole_folder(place) as folder:
        (folder / "old").touch()
    monkeypatch.setattr("loaders.files.put", lambda partial, path: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"), whole_folder(place):
        pass
    assert names(tmp_path) == ["folder"] and names(place) == ["old"]


def test_a_folder_that_a_kill_left_aside_comes_back(tmp_path):
    """Between the two renames the old one is under a hidden name; the next writer, which fails too, finds it."""
    (tmp_path / ".folder.dropped" / "old").mkdir(parents=True)
    with pytest.raises(Asked), whole_folder(tmp_path / "folder"):
        raise Asked
    assert names(tmp_path) == ["folder"] and names(tmp_path / "folder") == ["old"]


def test_what_a_kill_left_is_replaced_or_continued(tmp_path):
    path = tmp_path / "x"
    partial_of(path).write_text("much longer than what comes")
    write_file(path, b"short")
    assert path.read_bytes() == b"short" and names(tmp_path) == ["x"]
    partial_of(path).write_text("continued")
    put(partial_of(path), path)
    assert path.read_text() == "continued" and names(tmp_path) == ["x"]


WRITES = """
import sys
from pathlib import Path
from loaders.files import write_file
path, letter = Path(sys.argv[1]), sys.argv[2]
for size in range(100_000, 100_150):
    write_file(path, letter * size)
"""


def writer(path: Path, letter: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", WRITES, path, letter], cwd=ROOT)


def whole(path: Path) -> bool:
    content = path.read_text()
    return len(content) >= 100_000 and len(set(content)) == 1


def test_several_that_write_one_file_never_mix(tmp_path):
    """Would catch processes that share the hidden file: one renames what another has emptied, or is still writing."""
    path = tmp_path / "x"
    write_file(path, "0" * 100_000)
    writers = [writer(path, letter) for letter in "abc"]
    while any(each.poll() is None for each in writers):
        assert whole(path)
    assert [each.returncode for each in writers] == [0, 0, 0] and names(tmp_path) == ["x"]


def test_a_killed_writer_leaves_a_whole_file_and_does_not_hold_up_the_next(tmp_path):
    path = tmp_path / "x"
    for letter in "abcde":
        process = writer(path, letter)
        wait_until(lambda letter=letter: path.exists() and path.read_text()[:1] == letter, timeout_s=60)
        kill(process.pid)
        process.wait()
        assert whole(path)
    write_file(path, "z")
    assert names(tmp_path) == ["x"]
