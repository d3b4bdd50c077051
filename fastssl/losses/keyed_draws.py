"""Keyed random numbers on the device: the same for an image whatever rank it is on, and nothing is sequenced.

The hash is `loaders.plan.draws`' (SplitMix64), bit for bit, in torch's signed arithmetic, which wraps around like the
unsigned one. No function here waits for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BITS = 31  # of a draw: its product with any size below 2**31 fits 63 bits


def random_bits(keys_B: Tensor, purpose: int, count: int) -> Tensor:
    """Keys int64 [B] (`loaders.batch.Part.keys`) -> int64 [B, count], uniform in [0, 2**31).

    `purpose` is a 64-bit number that tells apart what draws are for (`loaders.plan.draws.tag`).
    """
    key_B = _mixed(_mixed(torch.zeros_like(keys_B), keys_B), torch.full_like(keys_B, _signed(purpose)))
    counter_N = torch.arange(1, count + 1, device=keys_B.device) * _GOLDEN
    return _shifted(_scrambled(key_B[:, None] + counter_N), 64 - _BITS)


def below(bits: Tensor, size: int | Tensor) -> Tensor:
    """Draws of `random_bits` -> uniform in [0, size), but for a share of size / 2**31; 0 where size is 0. `size` is
    below 2**31 and broadcasts."""
    return (bits * size) >> _BITS


def distinct(bits_BN: Tensor, size: int) -> Tensor:
    """Draws of `random_bits` -> in each row N different numbers in [0, size), every set of N as likely as any other.

    Floyd's algorithm (Bentley & Floyd, CACM 1987): N steps, whatever `size`, which must be N at least.
    """
    count = bits_BN.shape[1]
    assert size >= count
    chosen_BN = torch.empty_like(bits_BN)
    for i, last in enumerate(range(size - count, size)):
        drawn_B = below(bits_BN[:, i], last + 1)
        taken_B = (chosen_BN[:, :i] == drawn_B[:, None]).any(dim=1)
        chosen_BN[:, i] = torch.where(taken_B, last, drawn_B)
    return chosen_BN


def normals(keys_B: Tensor, purpose: int, count: int) -> Tensor:
    """Keys int64 [B] -> float32 [B, count], standard normal (Box and Muller); arguments as in `random_bits`.

    Computed in float64: in float32, loops over rows of other lengths may round the last bit otherwise.
    """
    pairs = (count + 1) // 2
    first, second = ((random_bits(keys_B, purpose, 2 * pairs).double() + 0.5) / 2**_BITS).split(pairs, dim=1)
    radius, angle = (-2 * first.log()).sqrt(), 2 * math.pi * second
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count].float()


def _signed(bits: int) -> int:
    """The int64 of the same 64 bits."""
    return (bits & (2**64 - 1)) - (2**64 if bits >> 63 & 1 else 0)


_GOLDEN, _MULTIPLY_1, _MULTIPLY_2 = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mixed(key_B: Tensor, part_B: Tensor) -> Tensor:
    return _scrambled((key_B + _GOLDEN) ^ _scrambled(part_B + _GOLDEN))


def _scrambled(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _MULTIPLY_1
    x = (x ^ _shifted(x, 27)) * _MULTIPLY_2
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, places: int) -> Tensor:
    """Bits moved down, zeros coming in: int64's own shift would repeat the sign."""
    shifted: Tensor = (x >> places) & (2 ** (64 - places) - 1)
    return shifted
