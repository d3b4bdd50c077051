"""The files of a run directory by name, and how those in JSON are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastssl.errors import FastsslError

RESOLVED, RESULT, PRODUCED, CHECKPOINTS = "resolved.json", "result.json", "produced.pt", "checkpoints"


def read_json(path: Path) -> Any:
    """What a run wrote at `path`, as JSON. Raises FastsslError where it is not whole."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise FastsslError(f"{path} cannot be read ({error}): remove it or choose another --out") from error
