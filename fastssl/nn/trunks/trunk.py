"""What every trunk is."""

from __future__ import annotations

from fastssl.nn.norm.lockstep import Lockstep


class Trunk(Lockstep):
    """Images [N, C, H, W] -> [N, num_features], several resolutions in lockstep.

    undecayed   names of its parameters that no optimiser decays although they have several axes: tokens, positions
    """

    num_features: int
    undecayed: frozenset[str] = frozenset()
