"""Files and folders written whole: a kill, a full disk or a power cut leaves the old or the new, never a part.

What is written lies beside its place under a hidden name, `.NAME.partial`. Once it is on the disk it is renamed, and
the name is brought to the disk too. What a kill leaves under the hidden name, the next writer replaces.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

Progress = Callable[[str, int, int], None]
"""Is told how far something that takes long is: (what it is, done, in all)."""


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """An empty file to write, which becomes `path` when the block ends well; else what is there stays. Processes that
    write the same file take turns, where the file system keeps locks. Raises OSError."""
    partial = partial_of(path)
    with _alone(partial) as file:
        try:
            yield file
            file.flush()
            put(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def write_file(path: Path, content: bytes | str) -> None:
    """`content`, text as UTF-8, as `path`, whole. Raises OSError."""
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` when the block ends well, instead of the folder there; else that
    one stays. A kill between the two renames leaves the old one aside, where the next writer finds it. Raises
    OSError."""
    path = path.absolute()
    partial, old = partial_of(path), _dropped(path)
    _put_back(old, path)
    for remains in (partial, old):
        shutil.rmtree(remains, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            sync(file)
        if path.exists():
            path.rename(old)
        put(partial, path)
    except BaseException:
        _put_back(old, path)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def drop_folder(path: Path) -> None:
    """Remove a folder such that at no moment a part of it looks like the whole. Raises OSError."""
    dying = _dropped(path)
    path.rename(dying)
    shutil.rmtree(dying)


def partial_of(path: Path) -> Path:
    """Where what becomes `path` is written. Writers that continue what a kill left write there themselves, then
    `put`."""
    return path.with_name(f".{path.name}.partial")


def put(partial: Path, path: Path) -> None:
    """Give what is written its name, in the place of a file there, such that both survive a power cut."""
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _dropped(path: Path) -> Path:
    return path.with_name(f".{path.name}.dropped")


def _put_back(old: Path, path: Path) -> None:
    if old.exists() and not path.exists():
        old.rename(path)


def _alone(partial: Path) -> BinaryIO:
    """The file `partial`, open, empty, and until it is closed nobody else's who asks here: they are waited for."""
    while True:
        file = os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if _names(partial, file):
                file.truncate()
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # who was waited for has renamed it


def _names(path: Path, file: BinaryIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
