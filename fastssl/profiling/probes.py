"""Small pieces of work of known size: what this machine can do at most, and how much of it is ours right now."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from loaders.renderers.resample import resize_boxes

_GEMM = {"cpu": 1024, "cuda": 8192}  # rows, columns and depth
_COPY_BYTES = {"cpu": 1 << 27, "cuda": 1 << 30}
_REPEATS = 3


def gemm_flop_s(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product, the best of a few: the measured peak."""
    n = _GEMM[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty(n, n, device=device, dtype=dtype)
    return 2 * n**3 / _best_s(lambda: torch.mm(a, b, out=out), device)


def copy_bytes_s(device: torch.device) -> float:
    """Bytes read and written a second by copying memory, the best of a few: the measured bandwidth."""
    source = torch.zeros(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    out = torch.zeros_like(source)
    return 2 * len(source) / _best_s(lambda: out.copy_(source), device)


def _best_s(work: object, device: torch.device) -> float:
    assert callable(work)
    work()
    found = []
    for _ in range(_REPEATS):
        _wait(device)
        begin = time.perf_counter()
        work()
        _wait(device)
        found.append(time.perf_counter() - begin)
    return min(found)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Speed:
    """What `cores` threads got done of the loader's kind of work: crops cut from a photograph's worth of pixels."""

    calls_per_s: float
    cpu_s_per_call: float
    waited_share: float  # of the threads' time, that they had no core


class CoreProbe:
    """Crops of 224 pixels from a fixed image: compiled code without the GIL, as the loader's own."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._image = rng.integers(0, 256, (1, 406, 467, 3), np.uint8)
        self._boxes = np.array([[13.0, 7.0, 401.0, 395.0]])
        self.run(1, 0.0)

    def run(self, threads: int, seconds: float) -> Speed:
        """`threads` at once for about so long."""
        with ThreadPoolExecutor(threads) as pool:
            begin = time.perf_counter()
            done = list(pool.map(lambda _: self._work(begin + seconds), range(threads)))
            wall_s = time.perf_counter() - begin
        calls, cpu_s = sum(count for count, _ in done), sum(cpu_s for _, cpu_s in done)
        return Speed(calls / wall_s, cpu_s / calls, max(0.0, 1 - cpu_s / (threads * wall_s)))

    def _work(self, until: float) -> tuple[int, float]:
        out, only = np.empty((1, 224, 224, 3), np.uint8), np.zeros(1, np.int64)
        begin, count = time.thread_time(), 0
        while count == 0 or time.perf_counter() < until:
            resize_boxes(self._image, only, self._boxes, True, 0, out)
            count += 1
        return count, time.thread_time() - begin


def most_resident_bytes() -> int:
    """The most memory that this process has held."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["VmHWM"].split()[0]) * 1024


def let_go(paths: list[Path]) -> float | None:
    """Ask the system to drop what it keeps of these files; the share it still has of them (of a sample of pages), None
    where the file system does not tell."""
    shares = []
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            shares.append(_kept_share(file, os.fstat(file).st_size))
        except OSError:
            return None
        finally:
            os.close(file)
    return sum(shares) / len(shares) if shares else None


def _kept_share(file: int, size: int) -> float:
    offsets, page, kept = [size * i // 8 for i in range(8)], bytearray(1), 0
    for offset in offsets:
        try:
            os.preadv(file, [page], offset, os.RWF_NOWAIT)
            kept += 1
        except BlockingIOError:
            pass
    return kept / len(offsets)
