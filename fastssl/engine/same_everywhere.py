"""Whether all ranks run the same code, with the same settings, on the same data: looked at once, at the start."""

from __future__ import annotations

import hashlib
import json
import socket
from collections import Counter
from pathlib import Path

from fastssl import dist
from fastssl.config.plain import differences, to_plain
from fastssl.engine.job import Job
from fastssl.errors import FastsslError
from fastssl.machine import versions
from loaders.store.data import DataSets

_PACKAGES = ("fastssl", "loaders")


def check_same_everywhere(job: Job, data: DataSets) -> None:
    """Raise FastsslError, on every rank, where some ranks differ from most; it names the first of them, with its host.

    Ranks that differ would train together all the same: gradients are averaged, whatever they were computed from.
    """
    own = {"code": code_digest(), "settings": _settings(job), "data": _data(data), "versions": _versions()}
    hosts, found = zip(*dist.gather_objects((socket.gethostname(), own)), strict=True)
    for what in own:
        values = [each[what] for each in found]
        usual, count = Counter(values).most_common(1)[0]
        odd = [rank for rank, value in enumerate(values) if value != usual]
        if odd:
            raise FastsslError(
                f"rank {odd[0]} on {hosts[odd[0]]} has other {what} than {count} of {len(values)} ranks"
                f"{_how(usual, values[odd[0]])}{_others([f'{rank} on {hosts[rank]}' for rank in odd[1:]])}"
            )


def code_digest() -> str:
    """sha256 over the sources that this process runs."""
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for path in sorted(path for package in _PACKAGES for path in (root / package).rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _settings(job: Job) -> str:
    """All that decides what is computed; not paths, for hosts may mount folders elsewhere."""
    paths = ("data", "out", "stage_to", "init_from", "replay", "command")
    return json.dumps({key: value for key, value in to_plain(job).items() if key not in paths}, sort_keys=True)


def _data(data: DataSets) -> str:
    return json.dumps(data.fingerprints(), sort_keys=True)


def _versions() -> str:
    """Libraries alone: what a commit changes is in the code."""
    return json.dumps({name: version for name, version in versions().items() if name != "commit"}, sort_keys=True)


def _how(usual: str, other: str) -> str:
    """The first difference, where the values are more than digests."""
    if not usual.startswith("{"):
        return ""
    return f" ({differences(json.loads(usual), json.loads(other))[0]})"


def _others(odd: list[str]) -> str:
    return f"; so have ranks {', '.join(odd[:3])}{' and more' if len(odd) > 3 else ''}" if odd else ""
