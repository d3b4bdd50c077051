"""What this process computes on: its threads, its memory, its devices, and the versions of what it computes with."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

CODE_BYTES = 64 << 20  # of a disk, below which nothing is compiled
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def threads_per_rank() -> int:
    """CPU threads of this rank: an equal share of the CPUs that it may use, among the ranks of this host that may use
    the same: all of them, unless `share_cpus` was told."""
    return max(1, len(os.sched_getaffinity(0)) // (_sharers or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


_sharers = 0  # ranks that may use this one's CPUs; 0: not known


def own_cpus() -> tuple[str, tuple[int, ...]]:
    """This host and the CPUs of it that this process may use: all, or a part where whoever started it has bound it."""
    return socket.gethostname(), tuple(sorted(os.sched_getaffinity(0)))


def share_cpus(of_ranks: Sequence[tuple[str, tuple[int, ...]]]) -> None:
    """Tell this process the `own_cpus` of all ranks: those that a launcher has bound to parts of a host
    (`torchrun --numa-binding`, srun) share these parts, and not the host, among as many as got the same part."""
    global _sharers
    _sharers = sum(other == own_cpus() for other in of_ranks)


def compile_threads(num: int) -> None:
    """Let this process compile with `num` threads, and not with one for each CPU of the host, as each rank would; what
    the user has said stays."""
    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(num)
        if (compiler := sys.modules.get("torch._inductor.config")) is not None:  # it has read the environment
            compiler.compile_threads = num  # type: ignore[attr-defined]


def no_room_for_code(*variables: str) -> str:
    """Which of the folders that compiled code is kept in lies on a full disk, if one does: `variables` are the names by
    which users move them. To find it out in the middle of compiling would leave other ranks waiting."""
    for variable in variables:
        folder = Path(os.environ.get(variable) or _usual_place(variable)).absolute()
        there = next(place for place in (folder, *folder.parents) if place.exists())
        left = shutil.disk_usage(there).free
        if left < CODE_BYTES:
            return f"{folder}, which keeps compiled code, has {left >> 20} MiB left: free some, or set {variable}"
    return ""


def _usual_place(variable: str) -> str:
    """Where torch's compiler and Triton keep what they compile unless `variable` is set: below here."""
    if variable == "TORCHINDUCTOR_CACHE_DIR":
        return tempfile.gettempdir()
    return os.environ.get("TRITON_HOME") or str(Path.home())


def forget_compiled() -> None:
    """Drop what torch compiled for earlier runs of this process: each network is one more version of the same code, of
    which it allows eight."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def versions() -> dict[str, str]:
    """What this process computes with."""
    return {
        "fastssl": version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "commit": commit(),
    }


def version() -> str:
    """Of the fastssl that is installed; empty where none is, as in a bare checkout."""
    try:
        return metadata.version("fastssl-train")
    except metadata.PackageNotFoundError:
        return ""


def commit(*how: str) -> str:
    """The commit that this code is, as `git rev-parse HEAD` or, with `how`, another command of git's says; "unknown"
    where there is no git, or where no repository tracks this code: a copy that is installed inside somebody's."""
    file = Path(__file__).resolve()
    tracked = _git("ls-files", "--error-unmatch", file.name, folder=file.parent)
    return (tracked and _git(*(how or ("rev-parse", "HEAD")), folder=file.parent)) or "unknown"


def _git(*words: str, folder: Path) -> str:
    try:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def keep_freed_memory() -> None:
    """Let this process keep what it frees. glibc returns large blocks to the kernel, which hands them out again page
    by page, zeroed: a fifth to a quarter of a CPU training step. Where malloc is not glibc's, nothing changes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


@functools.cache  # an eager step asks hundreds of times
def runs_triton(device: torch.device) -> bool:
    """Whether it is a GPU of compute capability 8.0 or more, the least that Triton supports: not a V100."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
