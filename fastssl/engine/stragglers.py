"""Ranks whose data come late: each rank's pace side by side, every so often.

Ranks wait for each other in every collective, so all are as slow as the slowest, and a rank's own clock cannot tell
work from waiting for peers. What it can tell is how long it waited for its own batch: a rank that waits there makes
the others wait in their collectives, which they count as stepping. A rank whose device is slow is not told apart.
"""

from __future__ import annotations

import socket
from statistics import median, quantiles

from fastssl import dist
from fastssl.record.clock import Pace

EVERY = 10  # logging steps
SLOW_SHARE = 0.1  # of a step, that a rank waits for data longer than the others do


def side_by_side(paces: list[Pace]) -> tuple[dict[str, list[float]], str]:
    """Percentiles of stepping and of waiting for data over the last steps, a number a rank, on all ranks; and who is
    slow, if somebody is. Ranks alone have nobody beside them: nothing. All ranks must call it; no device is waited for.
    """
    if dist.world_size() == 1 or len(paces) < 2:
        return {}, ""
    own = {}
    for name in ("step_s", "wait_s"):
        deciles = quantiles((getattr(pace, name) for pace in paces), n=10, method="inclusive")
        own[f"{name}_p50"], own[f"{name}_p90"] = deciles[4], deciles[8]
    everyone = dist.gather_objects((socket.gethostname(), own))
    ranks = {name: [found[name] for _, found in everyone] for name in own}
    return ranks, slowest([host for host, _ in everyone], ranks)


def slowest(hosts: list[str], ranks: dict[str, list[float]]) -> str:
    """The rank whose data come late, or nothing."""
    waits_s = ranks["wait_s_p50"]
    late = max(range(len(waits_s)), key=waits_s.__getitem__)
    others_s = median(wait_s for rank, wait_s in enumerate(waits_s) if rank != late)
    length_s = ranks["step_s_p50"][late] + waits_s[late]
    if waits_s[late] - others_s <= SLOW_SHARE * length_s:
        return ""
    return (
        f"rank {late} on {hosts[late]} is slow: it waits {waits_s[late]:.3g} s a step for data "
        f"(one in ten {ranks['wait_s_p90'][late]:.3g} s), the others {others_s:.3g} s"
    )
