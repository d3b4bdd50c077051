"""Run `fastssl` command lines one after the other in one process: `python run_commands.py ASKED.json TOLD.json`.

What `tools/old_runs.py` starts beside the code of another commit: one start-up for dozens of commands, each through the
same `main` that `python -m fastssl` calls. ASKED holds {name: [argument, ...]}; TOLD then {name: {"exit_code",
"stdout", "stderr"}}. A command that fails does not keep the later ones from running.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from click.testing import CliRunner


def told_by(main: Any, arguments: list[str]) -> dict[str, Any]:
    """What became of one command line; a traceback that a user would have seen is part of `stderr`."""
    sys.argv = ["fastssl", *arguments]
    result = CliRunner().invoke(main, arguments)
    raised = "" if isinstance(result.exception, SystemExit | None) else traceback.format_exception(result.exception)
    return {"exit_code": result.exit_code, "stdout": result.stdout, "stderr": result.stderr + "".join(raised)}


def run_all(asked: Path, told: Path) -> None:
    """Run every command of the file `asked`; the file `told` says what became of each."""
    main = importlib.import_module("fastssl.cli").main
    assert Path(sys.modules["fastssl"].__file__ or "").is_relative_to(Path.cwd()), "fastssl is not this tree's"
    commands = json.loads(asked.read_text())
    told.write_text(json.dumps({name: told_by(main, arguments) for name, arguments in commands.items()}))


if __name__ == "__main__":
    run_all(Path(sys.argv[1]), Path(sys.argv[2]))
