"""Checkpoints that do not hold training up: the state is copied at once, and the copy is written by a thread."""

from __future__ import annotations

import copy
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastssl.run_dir.checkpoint import Checkpoints


class Saver:
    """Saves one stage's checkpoints, one in flight: a save waits for the one before. Close it: that waits, too.

    What the disk refuses is raised by the next `save` or `finish`; `failed` tells of it without waiting.
    """

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fastssl-save")
        self._writing: Future[Path] | None = None
        self._copies: dict[str, Tensor] = {}  # reused: fresh memory costs more than the copy

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Take a copy of `state`, tensors and plain types, and begin to write it. The device is not waited for."""
        self.finish()
        copied = self._copied(state)
        ready = torch.cuda.current_stream().record_event() if self._copies_from_gpu() else None
        self._writing = self._thread.submit(self._write, step, copied, ready)

    @property
    def failed(self) -> bool:
        """Whether the last save has ended in an error."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def finish(self) -> None:
        """Return once what was saved is on disk. Raises CheckpointError where it is not."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def close(self) -> None:
        """As `finish`, and ends the thread; of an error says nothing."""
        self._thread.shutdown()

    def _write(self, step: int, state: dict[str, Any], ready: torch.cuda.Event | None) -> Path:
        if ready is not None:
            ready.synchronize()
        return self.checkpoints.save(step, state)

    def _copies_from_gpu(self) -> bool:
        return any(kept.is_pinned() for kept in self._copies.values())

    def _copied(self, value: Any, path: str = "") -> Any:
        """`value` with every tensor copied to the host; copies from a GPU are queued on its current stream, so that
        what changes the tensors next comes after."""
        if isinstance(value, Tensor):
            kept = self._copies.get(path)
            if kept is None or kept.shape != value.shape or kept.dtype != value.dtype:
                kept = self._copies[path] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            return kept.copy_(value.detach(), non_blocking=True)
        if isinstance(value, dict):
            copied = copy.copy(value)  # a module's state carries versions beside its entries
            copied.update((key, self._copied(entry, f"{path}.{key}")) for key, entry in value.items())
            return copied
        if isinstance(value, list | tuple):
            return type(value)(self._copied(entry, f"{path}.{i}") for i, entry in enumerate(value))
        return value
