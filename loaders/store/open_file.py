"""A file with tables, held open for reading: how `.beton` files and files of masks are opened, read and closed."""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np

from loaders.errors import StoreError


class OpenFile(ABC):
    """A file whose tables are read, and checked against its length, as it is opened.

    Reads with `pread`, so threads share it, and a file that shrinks while it is open is an error, not a SIGBUS. Raises
    StoreError where it cannot be opened, and whatever `_read_tables` raises; then it is closed.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise StoreError(f"{path}: cannot be read: {e.strerror}") from e
        self.close = weakref.finalize(self, os.close, self._fd)
        try:
            self._read_tables()
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _read_tables(self) -> None:
        """Read what says where everything else lies. Raises StoreError."""

    def _read(self, start: int, size: int) -> bytes:
        """`size` bytes, or what the file still has of them. Raises OSError. One call of the system reads at most 2 GiB,
        so long tables take several."""
        data = b""
        while len(data) < size:
            more = os.pread(self._fd, size - len(data), start + len(data))
            if not more:
                break
            data = data + more if data else more
        return data

    def _read_into(self, start: int, out: np.ndarray) -> int:
        """Fill `out`, uint8 [n], with what lies from `start` on; how much of it the file had. Raises OSError."""
        done = 0
        while done < len(out):
            more = os.preadv(self._fd, [out.data[done:]], start + done)
            if not more:
                break
            done += more
        return done
