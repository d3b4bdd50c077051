"""Checkpoints: `checkpoints/step-XXXXXXXX/` written whole or not at all, and `latest`, which names the newest.

A checkpoint holds tensors and plain types only and is read with `weights_only=True`. Its digest is stored beside it, so
that a damaged file is recognised before anything is loaded from it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fastssl import dist
from fastssl.errors import FastsslError
from fastssl.weights.tensor_files import WeightsError, read_tensors
from loaders.files import drop_folder, sha256_of, whole_folder, write_file

STATE, DIGEST, LATEST = "state.pt", "digest.json", "latest"


class CheckpointError(FastsslError):
    """A checkpoint that cannot be read or written."""


@contextmanager
def failing_together() -> Iterator[None]:
    """Where one rank's CheckpointError within the context is raised on all of them; every rank must enter it."""
    problem = ""
    try:
        yield
    except CheckpointError as error:
        problem = str(error)
    if problem := next(filter(None, dist.gather_objects(problem)), ""):
        raise CheckpointError(problem)


class Checkpoints:
    """The checkpoints of one stage. One rank saves; every rank may load.

    The newest `keep` stay, and for ever those of every `milestone_every`th step.
    """

    def __init__(self, folder: Path, keep: int = 2, milestone_every: int | None = None):
        self.folder, self.keep, self.milestone_every = folder, keep, milestone_every

    def steps(self) -> list[int]:
        """Steps with a finished checkpoint, ascending."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-" + "[0-9]" * 8))

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write `state` as the checkpoint of `step`, then the pointer to it; then drop what need not stay. Raises
        CheckpointError where the disk refuses; what was there before stays whole."""
        final = self.path(step)
        try:
            self._drop_remains()
            with whole_folder(final) as folder:
                (folder / DIGEST).write_text(json.dumps(_write_state(folder / STATE, state)))
            write_file(self.folder / LATEST, final.name + "\n")
            for old in self.steps()[: -self.keep]:
                if self.milestone_every is None or old % self.milestone_every:
                    drop_folder(self.path(old))
        except OSError as error:
            raise CheckpointError(f"cannot write checkpoint {final}: {error}") from error
        return final

    def _drop_remains(self) -> None:
        """Remove what a kill left of others."""
        for path in self.folder.glob(".step-*"):
            shutil.rmtree(path)

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

    def newest_whole(self, warn: Callable[[str], None]) -> Path:
        """The folder of the newest one whose bytes are those that were written; `warn` is told of others passed over.
        Raises CheckpointError where there is none."""
        for step in reversed(self.steps()):
            try:
                verified_sha256(self.path(step))
                return self.path(step)
            except CheckpointError as error:
                warn(f"{error}; passed over")
        raise CheckpointError(f"{self.folder} holds no checkpoint that is whole")

    def newest(self) -> Path:
        """The newest one's folder. Raises CheckpointError where there is none."""
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.folder} holds no checkpoint")
        return self.path(steps[-1])

    def load(self, step: int) -> dict[str, Any]:
        """The checkpoint of `step`. Raises CheckpointError where its bytes are not those that were written."""
        verified_sha256(self.path(step))
        try:
            return read_tensors(self.path(step) / STATE)[0]
        except WeightsError as error:
            raise CheckpointError(str(error)) from error


class _Hashing:
    """A file whose digest is ready when it is written."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256, self.num_bytes = file, hashlib.sha256(), 0
        self.refused: OSError | None = None

    def write(self, content: bytes) -> int:
        try:
            self.file.write(content)
        except OSError as error:  # torch.save makes of it a RuntimeError about positions
            self.refused = error
            raise
        self.sha256.update(content)
        self.num_bytes += len(content)
        return len(content)

    def flush(self) -> None:
        self.file.flush()


def _write_state(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Write the file; what its digest file says. Raises OSError."""
    with path.open("wb") as file:
        hashing = _Hashing(file)
        try:
            torch.save(state, hashing)  # type: ignore[arg-type]  # it asks for no more of a file
        except RuntimeError:
            if hashing.refused is None:
                raise
            raise hashing.refused from None
    return {"sha256": hashing.sha256.hexdigest(), "bytes": hashing.num_bytes}


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
