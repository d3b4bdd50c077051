"""Learning rates as pure functions of the step."""

import math
from collections.abc import Sequence


def warmup_cosine(step: int, *, start: float, peak: float, final: float, warmup_steps: int, total_steps: int) -> float:
    """A straight line from `start` to `peak` over `warmup_steps`, then half a cosine down to `final`.

    Step 0 gives `start` (`peak` when there is no warm-up), `total_steps` and everything after it `final`.
    Source: PAWS's released schedule; SimCLR's and BYOL's are this with ``start=0, final=0``.

    Raises ValueError if the warm-up is longer than the run or a count is negative.
    """
    if step < 0 or not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"need 0 <= step and 0 <= warm-up <= total, got {step=}, {warmup_steps=}, {total_steps=}")
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    if step >= total_steps:
        return final
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def warmup_stairs(step: int, *, peak: float, factor: float, at_steps: Sequence[int], warmup_steps: int) -> float:
    """A straight line from 0 to `peak` over `warmup_steps`, then `peak` times `factor` for each of `at_steps` that has
    been reached."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    return peak * factor ** sum(step >= at for at in at_steps)
