"""The finish: crops to what a network receives. One law, the reference's, on CPUs and under CUDA."""

from __future__ import annotations

# Counted up where some op gives other bits than before, within what the reference allows. A run that was begun with
# another count, and uses such an op, is not continued unasked: it would not end as if it had never been stopped.
ROUNDING = 2  # 2: CPU kernels that keep to the first-level cache
SAME_BITS = {1: frozenset({"Affine", "Equalize", "Flip", "Noise", "Solarise"})}  # count -> ops it has in common with us
