"""OpenMP's waiting threads sleep. Looked at from outside, since OpenMP reads its settings once in a process's life."""

import os
import subprocess
import sys


def test_the_command_line_sets_the_policy_before_torch_loads():
    """Too late a setting, such as after an import of torch at the top of the command line, changes nothing."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    shown = subprocess.run(
        [sys.executable, "-m", "fastssl", "recipes"],
        env={**inherited, "OMP_DISPLAY_ENV": "TRUE"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in shown.stderr
