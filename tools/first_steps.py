"""Train the first steps of paths of `tests/test_every_method.py`: `python first_steps.py OUT [PATH ...]`.

What `tools/same_as.py` starts beside the code of each commit, which need not be this one's: of the code around it, it
asks no more than `paths()` and `job(path, out)` of that test file, and what runs a job. Each path's run directory is
OUT/PATH; OUT/paths.json says which paths there are, OUT/refused.json what became of those that raised.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

NUM_STEPS = 5
RUNNERS = ("fastssl.engine.stages", "fastssl.engine.run")  # modules whose `run` does a job, in whichever commit


def runner() -> Callable[[Any], Any]:
    """What runs a job. Raises ImportError where no place has it."""
    for name in RUNNERS:
        try:
            return importlib.import_module(name).run
        except (ModuleNotFoundError, AttributeError):
            pass
    raise ImportError(f"none of {', '.join(RUNNERS)} has `run`: name the place in RUNNERS of {__file__}")


def shortened(job: Any) -> Any:
    """`job` with every stage that trains `NUM_STEPS` long."""
    stages = (replace(each, length=type(each.length)(NUM_STEPS)) for each in job.stages)
    return replace(job, stages=tuple(stages))


def main(out: Path, chosen: list[str]) -> None:
    """Train the `chosen` paths, all where none is named; those that this commit lacks are left out."""
    every, run = importlib.import_module("tests.test_every_method"), runner()
    for module in (every, sys.modules["fastssl"], sys.modules["loaders"]):
        assert Path(module.__file__ or "").is_relative_to(Path.cwd()), f"{module} is not this tree's"
    known = list(every.paths())
    (out / "paths.json").write_text(json.dumps(known))
    refused = {}
    for path in known:
        if not chosen or path in chosen:
            try:
                run(shortened(every.job(path, out / path)))
            except Exception as error:
                traceback.print_exc()
                refused[path] = f"{type(error).__name__}: {error}"
    (out / "refused.json").write_text(json.dumps(refused))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
