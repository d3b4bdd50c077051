"""What the compiler makes of a Triton kernel for a GPU that is not there: registers, spills, memory, width of moves.

    table(code, architecture) -> a row of tests/golden/kernels.json, from triton.compile's result

Registers, spills and shared memory are `ptxas`'s own count (the one that Triton brings along); global loads and stores
are counted in the PTX by the bytes that one thread moves with one of them; occupancy is the share of a
multiprocessor's warps that registers and shared memory let live at once.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton

# per multiprocessor: registers, warps, blocks, bytes of shared memory (CUDA's programming guide, compute capabilities)
LIMITS = {80: (65536, 64, 32, 164 << 10), 90: (65536, 64, 32, 228 << 10), 100: (65536, 64, 32, 228 << 10)}
BLOCK_SHARED = 1 << 10  # that CUDA takes of each block for itself
_MOVES = re.compile(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bfus](\d+)\b")
_COPIES = re.compile(r"\bcp\.async\S*\.global\S* +\[[^]]*\], *\[[^]]*\], *(0x[0-9a-f]+|\d+)")


def table(code: Any, architecture: int) -> dict[str, Any]:
    """The row of one compiled kernel."""
    said = _ptxas(code.asm["ptx"], architecture)
    registers = int(_number(r"Used (\d+) registers", said))
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
    shared, warps = int(code.metadata.shared), int(code.metadata.num_warps)
    moves = widths(code.asm["ptx"])
    return {
        "registers": registers,
        "spills": spills,
        "shared": shared,
        "warps": warps,
        "loads": moves["ld"],
        "stores": moves["st"],
        "occupancy": round(occupancy(architecture, registers, warps, shared), 3),
    }


def widths(ptx: str) -> dict[str, dict[str, int]]:
    """How many global loads and stores there are, by the bytes that a thread moves with one of them."""
    found: dict[str, Counter] = {"ld": Counter(), "st": Counter()}
    for kind, vector, bits in _MOVES.findall(ptx):
        found[kind][int(vector or 1) * int(bits) // 8] += 1
    for num_bytes in _COPIES.findall(ptx):
        found["ld"][int(num_bytes, 0)] += 1
    return {kind: {str(n): count for n, count in sorted(counts.items())} for kind, counts in found.items()}


def occupancy(architecture: int, registers: int, warps: int, shared: int) -> float:
    """The share of a multiprocessor's warps that live at once, in blocks of `warps`."""
    all_registers, most_warps, most_blocks, all_shared = LIMITS[architecture]
    of_a_warp = -(-registers * 32 // 256) * 256
    blocks = min(most_blocks, most_warps // warps, all_registers // of_a_warp // warps)
    if shared:
        blocks = min(blocks, all_shared // (shared + BLOCK_SHARED))
    return blocks * warps / most_warps


def _ptxas(ptx: str, architecture: int) -> str:
    tool = (
        Path(triton.__file__).parent / "backends/nvidia/bin" / ("ptxas-blackwell" if architecture >= 100 else "ptxas")
    )
    suffix = "a" if architecture >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [str(tool), "-v", f"-arch=sm_{architecture}{suffix}", str(source), "-o", f"{folder}/kernel.cubin"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _number(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found is not None, text
    return found[1]
