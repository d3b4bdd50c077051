"""Checkpoints: `checkpoints/step-XXXXXXXX/` written whole or not at all, and `latest`, which names the newest.

A checkpoint holds tensors and plain types only and is read with `weights_only=True`. Its digest is stored beside it, so
that a damaged file is recognised before anything is loaded from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastssl.config import FastsslError

STATE, DIGEST, LATEST = "state.pt", "digest.json", "latest"


class CheckpointError(FastsslError):
    """A checkpoint that cannot be read or written."""


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Checkpoints:
    """The checkpoints of one stage. One rank saves; every rank may load."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, ascending."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-" + "[0-9]" * 8))

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write `state` as the checkpoint of `step`: temporary folder, fsync, rename, then the pointer; drop all but
        the newest `keep`. Raises CheckpointError where the disk refuses; what was there before stays whole."""
        final, partial = self.path(step), self.folder / f".step-{step:08d}.partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            torch.save(state, partial / STATE)
            digest = {"sha256": sha256_of(partial / STATE), "bytes": (partial / STATE).stat().st_size}
            (partial / DIGEST).write_text(json.dumps(digest))
            for path in (partial / STATE, partial / DIGEST, partial):
                _sync(path)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _sync(self.folder)
            write_atomically(self.folder / LATEST, final.name + "\n")
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(f"cannot write checkpoint {final}: {error}") from error
        for old in self.steps()[: -self.keep]:
            shutil.rmtree(self.path(old))
        return final

    def load_newest(self, warn: Callable[[str], None]) -> dict[str, Any] | None:
        """The newest checkpoint that is whole; damaged ones are passed over with a warning. None where there is none.

        Raises CheckpointError where checkpoints exist and none can be read.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.load(step)
            except CheckpointError as error:
                earlier = [s for s in steps if s < step]
                warn(f"{error}; " + (f"going back to step {max(earlier)}" if earlier else "there is none before it"))
        if steps:
            raise CheckpointError(f"no checkpoint in {self.folder} can be read; start afresh in another --out")
        return None

    def newest(self) -> Path:
        """The newest one's folder. Raises CheckpointError where there is none."""
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.folder} holds no checkpoint")
        return self.path(steps[-1])

    def load(self, step: int) -> dict[str, Any]:
        """The checkpoint of `step`. Raises CheckpointError where its bytes are not those that were written."""
        verified_sha256(self.path(step))
        return read_state(self.path(step) / STATE)


def verified_sha256(path: Path) -> str:
    """The digest of the checkpoint in the folder `path`. Raises CheckpointError where its bytes are not those that were
    written."""
    try:
        expected, found = json.loads((path / DIGEST).read_text())["sha256"], sha256_of(path / STATE)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged ({error})") from error
    if found != expected:
        raise CheckpointError(f"checkpoint {path} is damaged (its digest differs)")
    return found


def read_state(path: Path) -> dict[str, Any]:
    """The state stored in the file `path`, on the CPU. Raises CheckpointError where it is none."""
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} is {'no checkpoint' if path.exists() else 'not there'}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is no checkpoint that can be read") from error
    if not isinstance(state, dict) or "nets" not in state:
        raise CheckpointError(f"{path} is no checkpoint of fastssl")
    return state


def read_json(path: Path) -> Any:
    """What `write_atomically` left at `path`, as JSON. Raises FastsslError where it is not whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FastsslError(f"{path} cannot be read ({error}): remove it or choose another --out") from error


def write_atomically(path: Path, content: str | dict[str, Any]) -> None:
    """Replace `path` by text, or by tensors and plain values for `torch.load`, in one step that survives a crash."""
    temporary = path.with_name(f".{path.name}.partial")
    if isinstance(content, str):
        temporary.write_text(content)
    else:
        torch.save(content, temporary)
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
