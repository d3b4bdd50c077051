"""CRC-32C (Castagnoli), masked as TFRecord files store it.

Source: RFC 3720, appendix B.4, for the sum; TensorFlow's `tsl/lib/hash/crc32c.h` for the mask.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_POLYNOMIAL = 0x82F63B78  # its bits reversed, as the sum's are
_MASK = 0xA282EAD8


def _table() -> np.ndarray:
    """uint32 [256]: what each byte does to the sum."""
    entries = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        entries = np.where(entries & 1, (entries >> 1) ^ np.uint32(_POLYNOMIAL), entries >> 1).astype(np.uint32)
    return entries


_TABLE = _table()


@njit(nogil=True, cache=True)
def _crc32c(data, table):
    crc = np.uint32(0xFFFFFFFF)
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> np.uint32(8))
    return crc ^ np.uint32(0xFFFFFFFF)


def masked_crc32c(data: bytes) -> int:
    """The sum over `data`, rotated by 15 bits and shifted by a constant, so that sums of sums do not repeat."""
    crc = int(_crc32c(np.frombuffer(data, np.uint8), _TABLE))
    return ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF
