"""Run `fastssl` command lines one after the other in one process: `python run_commands.py ASKED.json TOLD.json`.

What `tools/old_runs.py` starts beside the code of another commit: one start-up for dozens of commands, each what
`python -m fastssl` would do. ASKED holds {name: [argument, ...]}; TOLD then {name: {"exit_code", "stdout", "stderr"}}.
A command that fails does not keep the later ones from running.
"""

from __future__ import annotations

import importlib
import io
import json
import runpy
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any


def told_by(arguments: list[str]) -> dict[str, Any]:
    """What became of one command line; a traceback that a user would have seen is part of `stderr`."""
    sys.argv = ["fastssl", *arguments]
    code: Any = 0
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            runpy.run_module("fastssl", run_name="__main__")
        except SystemExit as leaving:
            code = leaving.code or 0
        except Exception:
            traceback.print_exc()
            code = 1
    return {"exit_code": code, "stdout": out.getvalue(), "stderr": err.getvalue()}


def run_all(asked: Path, told: Path) -> None:
    """Run every command of the file `asked`; the file `told` says what became of each."""
    where = Path(importlib.import_module("fastssl").__file__ or "")
    assert where.is_relative_to(Path.cwd()), f"{where} is not this tree's"
    commands = json.loads(asked.read_text())
    told.write_text(json.dumps({name: told_by(arguments) for name, arguments in commands.items()}))


if __name__ == "__main__":
    run_all(Path(sys.argv[1]), Path(sys.argv[2]))
