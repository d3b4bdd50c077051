"""Where ranks meet, and how one ends: what it leaves for whoever watches to read."""

from __future__ import annotations

import os
import socket
import time
import traceback
from typing import Any

from torch.distributed import DistError

from fastssl import dist
from fastssl.errors import EXIT_STOPPED, FastsslError, Stopped
from fastssl.launch.ranks import Ranks, Work
from loaders.errors import LoaderError

HOST = "127.0.0.1"
CONTINUES = "the same command continues from the last checkpoint"
EXIT_REFUSED, _EXIT_BROKEN = 1, 70  # of a rank: an error that the user can put right, and any other
_BROKEN_WAIT_S = 1.0  # a rank that lost a peer ends this much after it, so that whoever watches sees who was first


def joined(ranks: Ranks, work: Work) -> Any:
    """The result of `work`, done once all ranks have met at MASTER_ADDR and MASTER_PORT."""
    master = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        dist.init("nccl" if ranks.device == "cuda" else "gloo", join_timeout_s=_join_s())
    except DistError as error:
        raise FastsslError(_why_not_joined(master, str(error))) from error
    except dist.SharedGpu as error:
        raise FastsslError(str(error)) from error
    result = work()
    dist.shutdown()
    return result


def _join_s() -> float:
    """Seconds in which all ranks must have come together."""
    return float(os.environ.get("FASTSSL_JOIN_S", "300"))


def _why_not_joined(master: str, error: str) -> str:
    who = f"rank {os.environ['RANK']} on {socket.gethostname()}"
    if "EADDRINUSE" in error or "address already in use" in error:
        return f"{who} cannot listen at {master}, the port is in use: set MASTER_PORT to another"
    within = f"within {_join_s():g} s (FASTSSL_JOIN_S)"
    if "waiting for clients" in error:
        return f"{who} waited at {master}, and not all {os.environ['WORLD_SIZE']} ranks came {within}"
    return (
        f"{who} did not reach the first rank at {master} {within}: is it running, and MASTER_ADDR right? Where hosts "
        "have several networks, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the one (ip -br addr) that they share"
    )


def exit_code(error: Exception) -> int:
    """How a rank ends after `error`. Where it may be that of a lost peer, a moment later, for whoever watches to see
    who was first."""
    if isinstance(error, Stopped):
        return EXIT_STOPPED
    if isinstance(error, FastsslError | LoaderError):
        return EXIT_REFUSED
    time.sleep(_BROKEN_WAIT_S)
    return _EXIT_BROKEN


def told_by(rank: int, words: str) -> str:
    """`words`, with the host and rank that say them."""
    return f"{socket.gethostname()}, rank {rank}: {words}"


def words(error: Exception) -> str:
    """The traceback of a bug; of a lost peer what the network says."""
    if isinstance(error, DistError) or "gloo/transport" in str(error):
        return f"lost another rank ({str(error).splitlines()[0]}); {CONTINUES}"
    return traceback.format_exc()
