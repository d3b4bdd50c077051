"""What every trunk is."""

from __future__ import annotations

from fastssl.nn.norm.lockstep import Lockstep


class Trunk(Lockstep):
    """Images [N, C, H, W] -> [N, num_features], several resolutions in lockstep."""

    num_features: int
