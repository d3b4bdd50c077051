"""Which image stands at which position of a stream: keyed permutations and the three orders.

A permutation is evaluated only at the indices asked for, so planning a step costs the same for ten thousand images and
for a billion.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loaders.plan.draws import Key, mix, mixed_on, tag

_ROUNDS = 8
_MIN_BITS = 5  # narrower networks permute very small sets unevenly (chi-square of pairs in its test)


def permute(index: np.ndarray, size: Key, key: Key) -> np.ndarray:
    """A keyed permutation of range(size), evaluated at `index`; all three broadcast.

    A Feistel network on the smallest even number of bits that holds `size`, applied again to any value that falls
    outside (cycle-walking), as in format-preserving encryption (Black and Rogaway, CT-RSA 2002). int64 in, int64 out.
    """
    index, size, key = np.broadcast_arrays(
        np.asarray(index, np.int64), np.asarray(size, np.int64), np.asarray(key, np.uint64)
    )
    assert np.all((index >= 0) & (index < size))
    bits = np.maximum(_bit_length(size - 1), _MIN_BITS)
    low_bits = bits // 2
    value = _feistel(index.astype(np.uint64), low_bits.astype(np.uint64), bits.astype(np.uint64), key)
    outside = value >= size.astype(np.uint64)
    while outside.any():
        value[outside] = _feistel(
            value[outside], low_bits[outside].astype(np.uint64), bits[outside].astype(np.uint64), key[outside]
        )
        outside = value >= size.astype(np.uint64)
    return value.astype(np.int64)


def _feistel(value: np.ndarray, low_bits: np.ndarray, bits: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Halves of possibly unequal width change in turn, each by a hash of the other: invertible round by round."""
    one = np.uint64(1)
    low_mask = (one << low_bits) - one
    high_mask = (one << (bits - low_bits)) - one
    low, high = value & low_mask, value >> low_bits
    round_keys = mix(key, np.arange(_ROUNDS).reshape(-1, *[1] * value.ndim))
    for round_, round_key in enumerate(round_keys):
        if round_ % 2:
            low = low ^ (mixed_on(round_key, high) & low_mask)
        else:
            high = high ^ (mixed_on(round_key, low) & high_mask)
    joined: np.ndarray = (high << low_bits) | low
    return joined


def _bit_length(x: np.ndarray) -> np.ndarray:
    """Bits needed to write non-negative int64 `x` below 2**52, exactly."""
    return np.frexp(x.astype(np.float64))[1].astype(np.int64)


@dataclass(frozen=True)
class ClassIndex:
    """Images grouped by label: class c owns ids[starts[c] : starts[c] + counts[c]]."""

    ids: np.ndarray
    starts: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, ids: np.ndarray, labels: np.ndarray, num_classes: int) -> ClassIndex:
        known = labels >= 0
        ids, labels = ids[known], labels[known]
        counts = np.bincount(labels, minlength=num_classes)
        starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
        return cls(ids[np.argsort(labels, kind="stable")], starts, counts)


def shuffled(positions: np.ndarray, num_images: int, batch_global: int, key: Key) -> np.ndarray:
    """Index in range(num_images) at each stream position; every epoch leaves out its last partial batch."""
    epoch_length = num_images // batch_global * batch_global
    epoch, place = np.divmod(positions, epoch_length)
    return permute(place, num_images, mix(key, tag("epoch"), epoch))


def balanced_classes(step: int, num_classes: int, classes_global: int, key: Key) -> tuple[int, np.ndarray]:
    """(pass over the classes, the classes of this step in column order)."""
    blocks = num_classes // classes_global
    pass_, block = divmod(step, blocks)
    places = block * classes_global + np.arange(classes_global)
    return pass_, permute(places, num_classes, mix(key, tag("classes"), pass_))


def balanced(
    rows: np.ndarray, step: int, index: ClassIndex, classes_global: int, per_class: int, key: Key
) -> tuple[np.ndarray, np.ndarray]:
    """Global row numbers of one step's class-major batch -> (image ids, class columns), int64 each. A class of fewer
    than `per_class` images is gone through again and again, in a new order each time."""
    pass_, classes = balanced_classes(step, len(index.counts), classes_global, key)
    columns, member = np.divmod(rows, per_class)
    of_class = classes[columns]
    count, image_key = index.counts[of_class], mix(key, tag("images"), pass_, of_class)
    turn, place = np.divmod(member, count)
    chosen = permute(place, count, np.where(turn > 0, mix(image_key, turn), image_key))
    return index.ids[index.starts[of_class] + chosen], columns
