"""What a profile says, field by field as `profile.json` has it; None stands for what was not measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Spread:
    """Of one figure over `windows` windows."""

    median: float
    least: float
    most: float
    windows: int


@dataclass(frozen=True)
class Phase:
    """What a phase of the loader takes for one image of the epoch's stream, the other streams' share included."""

    cpu_s_per_image: float
    wall_s_per_image: float  # of a thread
    images_per_s_per_core: float | None


@dataclass(frozen=True)
class LoaderFigures:
    """The loader by itself, of all ranks together; `stages` holds its phases, of all streams and by stream."""

    images_per_s: Spread
    one_thread_images_per_s: Spread | None
    cold_images_per_s: Spread | None
    cold: str  # in words, how cold
    threads: int
    cpu_s_per_image: float
    stages: Mapping[str, Phase]
    by_stream: Mapping[str, Mapping[str, float]]  # CPU seconds for an image, by stream and phase


@dataclass(frozen=True)
class StepFigures:
    """The step by itself and with the loader: times of the slowest rank, counts of the first."""

    how: str
    synthetic_s: float
    cached_s: float | None
    full_s: float | None
    first_step_s: float | None
    percentiles_s: Mapping[str, float]
    num_steps_timed: int
    straggler_spread: float
    cpu_s: float
    images_per_s: float
    batch_global: int
    image_equivalents: float | None
    image_equivalents_per_s: float | None
    flop_s: float | None
    peak_flop_s: float
    share_of_peak: float | None
    traffic_bytes_s: float | None
    copy_bytes_s: float
    share_of_memory_roofline: float | None
    dispatches: int | None
    launches: int | None
    host_syncs: int | None


@dataclass(frozen=True)
class Stall:
    """The share of a step's time that it waits for data, and of which phase it is."""

    share: float
    spread: float
    prepare: float
    fetch: float
    copy: float
    by_stage: Mapping[str, float]
    waited_share: float


@dataclass(frozen=True)
class Binding:
    """The resource that limits the rate, the loader's dearest phase, the cores that would do, and all in a sentence."""

    resource: str | None
    stage: str | None
    cores_needed: int | None
    sentence: str


@dataclass(frozen=True)
class Sent:
    """Of one class, of a rank and step; how much longer the step is for them."""

    messages: int | None = None
    bytes: float | None = None
    exposed_s: Spread | None = None


@dataclass(frozen=True)
class Memory:
    peak_bytes: int | None
    resident_bytes: int | None


@dataclass(frozen=True)
class Machine:
    """How much of the machine was ours while it was measured."""

    waited_for_core_share: float | None
    quiet: bool
    rounds: int


@dataclass(frozen=True)
class Noise:
    """What a later profile is compared with, window by window."""

    speed: Sequence[float]
    cpu: Mapping[str, Sequence[float]]
    counts: Mapping[str, int]
    wall: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Figures:
    """A profile. Tables of `fastssl.costs.whatif`: `here`, other cores, caches and renderers on this machine, and
    `projection`, the 64-GPU job."""

    format: int
    complete: bool
    identity: Mapping[str, Any]
    unlabelled_images_per_s: float | None
    image_equivalents_per_s: float | None
    stall_share: float | None
    stall: Stall | None
    binding: Binding
    loader: LoaderFigures | None
    step: StepFigures | None
    communication: Mapping[str, Sent] | None
    memory: Memory
    overhead_share: float | None
    machine: Machine
    here: Mapping[str, Any] | None
    projection: Mapping[str, Any]
    noise: Noise
    notes: Sequence[str]
