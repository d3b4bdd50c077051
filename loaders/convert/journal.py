"""Which images of a conversion are done: appended while it runs, read when it continues after a kill.

A header that says which conversion this is, then one record of fixed size an image, each with its own checksum; what
a kill or a power cut tore is dropped. Records are written only after the bytes that they speak of are on the disk.
"""

from __future__ import annotations

import fcntl
import os
import weakref
import zlib
from pathlib import Path

import numpy as np

from loaders.errors import StoreError

_MAGIC = b"fastssl conversion journal 1\n".ljust(32)

RECORD = np.dtype(
    [
        ("index", "<u4"),
        ("outcome", "<u1"),  # judge.Outcome; 0 in memory: not done
        ("height", "<u2"),
        ("width", "<u2"),
        ("size", "<u8"),  # bytes of the image as it is stored
        ("spill_ptr", "<u8"),  # where they lie in the spill file, of images written anew
        ("sha256", "<u1", (32,)),  # of the image as it is stored, of what lies in the source if it is not in the set
        ("check", "<u4"),  # crc32 of the above
    ]
)
_CHECKED = RECORD.itemsize - 4


class Journal:
    """`records` [N], by image; `is_new`: there is nothing to continue. While open, nobody else can open it."""

    def __init__(self, path: Path, identity: bytes, num_images: int):
        """`identity`, 32 bytes: a journal of another conversion is started afresh."""
        assert len(identity) == 32
        self.path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.close = weakref.finalize(self, os.close, self._fd)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise StoreError(f"{path.parent}: another conversion is writing there") from None
        self._header = _MAGIC + identity
        self.records = np.zeros(num_images, RECORD)
        self._end = self._load()
        self.is_new = self._end == 0
        if self.is_new:
            self.restart()

    def restart(self) -> None:
        """Nothing is done."""
        self.records[:] = 0
        os.ftruncate(self._fd, 0)
        self._end = 0
        self._append(self._header)

    def append(self, records: np.ndarray) -> None:
        """Add `records` [n] of RECORD, whose bytes are on the disk; they are too when this returns."""
        for record in records:
            record["check"] = zlib.crc32(record.tobytes()[:_CHECKED])
        self._append(records.tobytes())
        self.records[records["index"]] = records

    def _append(self, data: bytes) -> None:
        write_all(self._fd, data, self._end)
        self._end += len(data)
        os.fdatasync(self._fd)

    def _load(self) -> int:
        """Fill `records`; the length of what is sound, 0 where the header is another's."""
        data, header = self.path.read_bytes(), self._header
        if data[: len(header)] != header:
            return 0
        body = np.frombuffer(data, RECORD, (len(data) - len(header)) // RECORD.itemsize, len(header))
        for n, record in enumerate(body):
            raw = record.tobytes()
            if zlib.crc32(raw[:_CHECKED]) != record["check"] or record["index"] >= len(self.records):
                body = body[:n]
                break
        self.records[body["index"]] = body
        return len(header) + body.nbytes


def write_all(fd: int, data: bytes, offset: int) -> None:
    """All of `data` at `offset`; a full disk may take a part of it before it is an error."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
