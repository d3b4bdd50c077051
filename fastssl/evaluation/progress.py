"""What a protocol that measures on several sets says on its way: a later one may fail, and its answer with it."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from fastssl import dist


def tell(scores: Mapping[str, float]) -> None:
    """A line on stderr for each score, from rank 0; any rank may call it."""
    if dist.is_main():
        for name, score in scores.items():
            print(f"{name}: {score:.4f}", file=sys.stderr, flush=True)
