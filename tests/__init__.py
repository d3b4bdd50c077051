"""Tests. Threads of OpenMP sleep while they wait, as they do under the command line (read when torch loads)."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
