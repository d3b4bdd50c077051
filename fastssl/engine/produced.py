"""What a stage produces, kept on the way: a stage that was stopped continues after the last rows that it kept."""

from __future__ import annotations

import shutil
from typing import Any

import torch
from torch import Tensor

from fastssl import dist
from fastssl.run_dir.checkpoint import CheckpointError, Checkpoints, failing_together


class RowsSoFar:
    """What a stage has produced in its first steps: tensors by name, with the rows of all ranks in the stream's order.

    The first rank alone holds, keeps and reads them, as checkpoints of the stage; all ranks must call all methods but
    `tensors`. `origin` says, in plain values, of what the rows are made and by what: rows of another are not continued.
    """

    def __init__(self, checkpoints: Checkpoints, origin: dict[str, Any]):
        self.checkpoints, self.origin = checkpoints, origin
        self._found: dict[str, list[Tensor]] = {}

    def resume(self) -> int:
        """Take up the last rows that were kept and are whole; how many steps they are of. Other ones are removed, and a
        line says why."""
        return dist.broadcast_object(self._resumed() if dist.is_main() else 0)

    def _resumed(self) -> int:
        for step in reversed(self.checkpoints.steps()):
            try:
                state = self.checkpoints.load(step)
                if state.get("origin") == self.origin:
                    self._found = {name: [rows] for name, rows in state["rows"].items()}
                    return step
                problem = f"{self.checkpoints.path(step)} was made by other networks, of other images or settings"
            except CheckpointError as error:
                problem = str(error)
            print(f"note: {problem}; passed over", flush=True)
            shutil.rmtree(self.checkpoints.path(step))
        return 0

    def add(self, rows: dict[str, Tensor]) -> None:
        """Append a step's rows, of each rank its own."""
        for name, values in rows.items():
            gathered = dist.gather_ragged(values)
            if dist.is_main():
                self._found.setdefault(name, []).append(gathered.cpu())

    def keep(self, step: int) -> None:
        """Write the rows of the first `step` steps. Raises CheckpointError, on every rank, where the disk refuses."""
        with failing_together():
            if dist.is_main():
                self.checkpoints.save(step, {"origin": self.origin, "rows": self.tensors()})

    def tensors(self) -> dict[str, Tensor]:
        """All rows so far, on the CPU."""
        self._found = {name: [torch.cat(values)] for name, values in self._found.items()}
        return {name: rows for name, (rows,) in self._found.items()}
