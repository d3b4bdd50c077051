"""What an image costs the loader, from its windows; and what it would if images were stored otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import fmean

from fastssl.costs import whatif
from fastssl.profiling.before import Before
from fastssl.profiling.windows import Window
from loaders.timing import PHASES


def wall_s_of(windows: Sequence[Window], phase: str, stream: str) -> float:
    """Of a thread, for an image of `stream`."""
    return _over_images([w.spent[stream][phase].wall_s for w in windows], windows, stream)


def cpu_s_of(windows: Sequence[Window], phase: str, stream: str) -> float:
    """For an image of `stream`."""
    return _over_images([w.spent[stream][phase].cpu_s for w in windows], windows, stream)


def _over_images(spent_s: Sequence[float], windows: Sequence[Window], stream: str) -> float:
    images = sum(w.by_stream[stream] for w in windows)
    return sum(spent_s) / images if images else 0.0


def _spent_s(before: Before, windows: Sequence[Window], phases: Sequence[str], streams: Sequence[str]) -> float:
    """CPU seconds of `phases` on `streams` for one image of the epoch's."""
    seconds = (cpu_s_of(windows, phase, name) * before.streams[name] for phase in phases for name in streams)
    return sum(seconds) / before.streams[before.epoch_of]


def loader_cost(before: Before, windows: Sequence[Window]) -> whatif.LoaderCost:
    total, names = partial(_spent_s, before, windows), list(before.streams)
    recurring = sum(before.streams[name] for name in before.recurring) / before.streams[before.epoch_of]
    images = sum(before.streams.values()) / before.streams[before.epoch_of]
    files = before.files_bytes
    mean_bytes = sum(files) / len(files) if files else 0.0
    return whatif.LoaderCost(
        cpu_s=total(PHASES, names),
        serial_s=total(["plan"], names),
        bytes_read=images * mean_bytes,
        decode_s=total(["fetch", "decode"], before.recurring),
        cached_bytes_read=recurring * mean_bytes,
        finish_s=total(["finish"], names),
        batch=before.streams[before.epoch_of] // before.world,
        sizes=tuple(file / mean_bytes for file in files) or (1.0,),
    )


def stores_of(before: Before, windows: Sequence[Window], cost: whatif.LoaderCost) -> dict[str, whatif.Store]:
    """The images as they are stored and, where the loader can cut crops from decoded ones, stored decoded."""
    if not before.files_bytes:
        return {}
    mean, decoded = fmean(before.files_bytes), fmean(before.decoded_bytes)
    if mean == decoded:
        return {"as stored, decoded": whatif.Store(mean, cost)}
    found = {"as stored": whatif.Store(mean, cost)}
    if before.identity["loader"] in ("auto", "turbo"):
        found["decoded, by --pixels raw"] = whatif.Store(decoded, _decoded_cost(before, windows, cost))
    return found


def _decoded_cost(before: Before, windows: Sequence[Window], cost: whatif.LoaderCost) -> whatif.LoaderCost:
    """What the images would cost if they were stored decoded, at most: nothing is decoded, and to fetch them takes as
    much more as they have more bytes."""
    more = sum(before.decoded_bytes) / sum(before.files_bytes)
    decode_s, fetch_s = (_spent_s(before, windows, [phase], list(before.streams)) for phase in ("decode", "fetch"))
    return replace(
        cost,
        cpu_s=cost.cpu_s - decode_s + (more - 1) * fetch_s,
        bytes_read=more * cost.bytes_read,
        decode_s=more * _spent_s(before, windows, ["fetch"], before.recurring),
        cached_bytes_read=more * cost.cached_bytes_read,
        sizes=tuple(size / fmean(before.decoded_bytes) for size in before.decoded_bytes),
    )
