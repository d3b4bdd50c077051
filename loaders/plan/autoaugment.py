"""AutoAugment's ImageNet policy, and how uniform draws become what is done to a copy.

Cubuk et al. 2019 (arXiv 1805.09501), table 9: one of 25 sub-policies, each with probability 1/25, is drawn for a copy;
its two operations, `(name, probability, level)`, are applied one after the other, each with its probability. Levels are
those of 0..9; :mod:`loaders.renderers.autoaugment` says what they mean. Some sub-policies stand there twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Step = tuple[str, float, int]  # name, probability, level

SUB_POLICIES: tuple[tuple[Step, Step], ...] = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 4), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 7)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 2)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 8), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("colour", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 2)),
    (("equalize", 0.0, 7), ("equalize", 0.8, 8)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("colour", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("colour", 1.0, 2)),
    (("colour", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 8)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, 9)),
    (("colour", 0.4, 0), ("equalize", 0.6, 3)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("colour", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
)
_PROBABILITIES = np.array([[p for _, p, _ in steps] for steps in SUB_POLICIES])


@dataclass(frozen=True)
class AutoAugment:
    """The policy, on uint8 crops of one or three channels. The papers flip before it, and a view's `Flip` comes after
    it: that is the same in distribution, since a mirrored rotation or shear is the one of the other sign, signs are
    even coins, and every other operation commutes with the mirror."""

    NUM_DRAWS = 5

    def chosen(self, u: np.ndarray) -> np.ndarray:
        """Uniform draws float64 [M, 5] in [0, 1) -> int8 [M, 3]: the sub-policy, then for each of its two operations 0
        where it is not applied, else the sign, 1 or -1, that it has where it goes in a direction."""
        sub_policies = np.floor(u[:, 0] * len(SUB_POLICIES)).astype(np.int8)
        applied, signs = u[:, 1:3] < _PROBABILITIES[sub_policies], np.where(u[:, 3:5] < 0.5, -1, 1)
        return np.column_stack([sub_policies, applied * signs]).astype(np.int8)
