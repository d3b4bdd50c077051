"""What `fastssl profile` measures on a rank: windows of a loader and of a step, by kind. Plain values that pickle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from fastssl.profiling.probes import Speed

Messages = Literal["statistics", "rows", "gradients"]  # batch norm's, the loss's, DDP's


@dataclass(frozen=True)
class Kind:
    """What the windows of a kind have in common: `how` they were measured, and with which renderer, or without which
    messages."""

    how: str
    renderer: str | None = None
    silenced: Messages | None = None


CLASSES: tuple[Messages, ...] = ("statistics", "rows", "gradients")

# Of a loader: by itself with all threads, with one, after the system dropped the files; and while a step is done.
WARM, ONE_THREAD, COLD, BESIDE_THE_STEP = map(Kind, ("warm", "one thread", "cold", "beside the step"))
# Of a step: on a batch that lies on the device, on one that is copied from the host, and from the loader.
READY, COPIED, LOADED = map(Kind, ("ready", "copied", "loaded"))


def rendered_by(renderer: str) -> Kind:
    """As WARM, with another renderer."""
    return Kind("rendered by another", renderer=renderer)


def without(messages: Messages) -> Kind:
    """As READY, without one class of messages."""
    return Kind("without messages", silenced=messages)


@dataclass(frozen=True)
class Spent:
    """What a loader's threads spent in one of its phases: seconds of all of them, and how many stamps that took."""

    wall_s: float
    cpu_s: float
    stamps: float


@dataclass(frozen=True)
class Window:
    """Some batches of a loader on one rank.

    images      of the epoch's stream; `by_stream`: of each
    prepare_s   of each batch
    by_phase_s  which add up to `wall_s`
    spent       stream -> phase -> what the threads spent
    probe       what the machine did of known work just before; None beside a step
    """

    images: int
    by_stream: dict[str, int]
    prepare_s: list[float]
    by_phase_s: dict[str, float]
    spent: dict[str, dict[str, Spent]]
    threads: int
    probe: Speed | None = None

    @property
    def wall_s(self) -> float:
        return sum(self.prepare_s)

    @property
    def images_per_s(self) -> float:
        return self.images / self.wall_s


@dataclass(frozen=True)
class StepWindow:
    """Some steps on one rank: how long each took and waited for its batch, and the process's CPU seconds of all."""

    step_s: list[float]
    wait_s: list[float]
    cpu_s: float

    @property
    def mean_s(self) -> float:
        return sum(self.step_s) / len(self.step_s)


@dataclass
class Probes:
    """What this machine can do: seconds a stamp, what it got done in each round, of how many files' pages the system
    kept when it was asked to drop them, and the most arithmetic and memory traffic."""

    stamp_s: float = 0.0
    rounds: list[Speed] = field(default_factory=list)
    still_cached: list[float | None] = field(default_factory=list)
    flop_s: float | None = None
    copy_bytes_s: float | None = None


@dataclass
class Counts:
    """Of one step, and memory; None where it was not counted."""

    how: str = ""
    first_step_s: float | None = None
    dispatches: int | None = None
    launches: int | None = None
    host_syncs: int | None = None
    peak_bytes: int | None = None
    most_resident_bytes: int | None = None


@dataclass
class Found:
    """All that a rank measured; kinds that were not measured are absent."""

    loader: dict[Kind, list[Window]] = field(default_factory=dict)
    steps: dict[Kind, list[StepWindow]] = field(default_factory=dict)
    probes: Probes = field(default_factory=Probes)
    counts: Counts = field(default_factory=Counts)
    notes: list[str] = field(default_factory=list)


def all_step_s(windows: Sequence[StepWindow]) -> list[float]:
    """Of every step in the windows."""
    return [seconds for window in windows for seconds in window.step_s]
