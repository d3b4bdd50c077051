"""Keyed randomness: every draw is a hash of what it is for, so nothing depends on what was drawn before it.

A key is built by `mix` from integers (seed, stream, position, view, op, ...); `uniforms` turns an array of keys into
rows of uniform numbers by counting (SplitMix64: Steele, Lea and Flood, OOPSLA 2014). Both are vectorised over keys and
give the same bits on every machine.
"""

from __future__ import annotations

import hashlib
from functools import cache, lru_cache

import numpy as np

Key = np.ndarray | np.uint64 | int

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S11 = (np.uint64(s) for s in (27, 30, 31, 11))


@cache
def tag(name: str) -> int:
    """A stable 64-bit number for a name (of a stream, a view, an op)."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _scramble(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: a bijection on 64 bits in which every input bit moves every output bit."""
    x = (x ^ (x >> _S30)) * _MULTIPLY_1
    x = (x ^ (x >> _S27)) * _MULTIPLY_2
    mixed: np.ndarray = x ^ (x >> _S31)
    return mixed


def mix(*parts: Key) -> np.ndarray:
    """Integers or integer arrays (broadcast together) -> uint64 keys. The order of the parts matters."""
    return mixed_on(np.zeros((), np.uint64), *parts)


def mixed_on(key: np.ndarray, *parts: Key) -> np.ndarray:
    """mix(*first, *parts), given mix(*first)."""
    with np.errstate(over="ignore"):
        for part in parts:
            hashed = _hash_of_int(part) if isinstance(part, int) else _hash(part)
            key = _scramble((key + _GOLDEN) ^ hashed)
    return key


def _hash(part: np.ndarray | np.uint64) -> np.ndarray:
    return _scramble(np.asarray(part).astype(np.uint64) + _GOLDEN)


@lru_cache(4096)  # tags and small counts, which come again every step
def _hash_of_int(part: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        return _hash(np.array(part & 0xFFFFFFFFFFFFFFFF, np.uint64))


def uniforms(keys: np.ndarray, count: int, first: int = 0) -> np.ndarray:
    """Keys uint64 [M] -> float64 [M, count] uniform in [0, 1): draws number first .. first + count - 1 of each key."""
    with np.errstate(over="ignore"):
        counters = np.arange(first + 1, first + count + 1, dtype=np.uint64) * _GOLDEN
        bits = _scramble(keys[:, None] + counters)
    return (bits >> _S11).astype(np.float64) * 2.0**-53
