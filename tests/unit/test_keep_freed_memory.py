"""CPU training keeps the memory it frees. Held in a process of its own, as the setting lasts as long as the process."""

import subprocess
import sys

_FAULTS_OF_TEN_LARGE_TENSORS = """
import resource, sys, torch
import fastssl.engine.stages  # as a run has it
from fastssl.machine import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    keep_freed_memory()
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(mode: str) -> int:
    command = [sys.executable, "-c", _FAULTS_OF_TEN_LARGE_TENSORS, mode]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_a_freed_block_is_used_again_without_page_faults():
    """A wrong constant or a refused setting would fault on every page of every tensor anew."""
    assert _faults("keep") < _faults("leave") / 4
