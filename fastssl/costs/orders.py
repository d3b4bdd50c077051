"""Two orders of a step over several resolutions, and how long each leaves the GPUs waiting for messages.

lockstep             all resolutions layer by layer together: one batch-norm message a layer each way for all of them,
                     but the exchange of supports finds nothing to hide behind
large, then small    a pass a resolution: a message a layer, a way and a resolution; the exchange travels while the
                     small crops are computed, forward and backward

Every batch-norm message is waited for: the layer behind it needs the statistics. Modelled, not measured: latencies are
published ones, bandwidths and the V100 cluster's latency are estimates. The table is in
benchmarks/results/step_model_202611.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastssl.costs.cost import StepCost


@dataclass(frozen=True)
class Machine:
    """GPUs and what joins them.

    message_s    one small all-reduce, from call to result
    bus_bytes_s  what a ring moves past each rank; across hosts, what a host's network cards carry
    step_s       a step of paws.rn50_100ep at the rate aimed at
    """

    name: str
    ranks: int
    message_s: float
    bus_bytes_s: float
    step_s: float
    source: str


MACHINES = (
    Machine("8 A100, NVLink", 8, 33.7e-6, 200e9, 0.849, "latency: nccl-tests#123, ring"),
    Machine("8 H200, NVLink", 8, 33.7e-6, 350e9, 0.382, "latency: as 8 A100's"),
    Machine("8 H200, NVLink, captured", 8, 6e-6, 350e9, 0.382, "latency: nccl#1259, 2 H100, NVLS in a CUDA graph"),
    Machine("64 H100, 400 Gb/s a GPU", 64, 47e-6, 300e9, 0.077, "latency: nccl#1244, 16 H20 on 2 hosts, NVLS tree"),
    Machine("64 V100, 100 Gb/s a host", 64, 300e-6, 11e9, 0.271, "latency: estimated for a ring, an upper bound"),
    Machine("64 V100, 100 Gb/s a host, tree", 64, 50e-6, 11e9, 0.271, "latency: estimated, a lower bound"),
)


@dataclass(frozen=True)
class Waits:
    """Seconds a step that a rank waits: for batch norm's messages, and for what is not hidden of the exchange."""

    statistics_s: float
    exchange_s: float

    @property
    def total_s(self) -> float:
        return self.statistics_s + self.exchange_s


def lockstep(cost: StepCost, machine: Machine) -> Waits:
    """Waits where the resolutions go together; `cost` is that of our code on as many ranks."""
    return Waits(cost.num_statistics_messages * machine.message_s, cost.rows_moved_bytes / machine.bus_bytes_s)


def large_then_small(cost: StepCost, machine: Machine, resolutions: int, small_share: float) -> Waits:
    """Waits where the small crops come after the large ones; they take `small_share` of the step, during which the
    exchange travels, in the forward pass as in the backward pass."""
    hidden_s = small_share * machine.step_s
    exchange_s = cost.rows_moved_bytes / machine.bus_bytes_s
    return Waits(resolutions * cost.num_statistics_messages * machine.message_s, max(0.0, exchange_s - hidden_s))


def break_even_bytes_s(cost: StepCost, machine: Machine, resolutions: int) -> float:
    """The bus bandwidth below which large-then-small would wait less, were all of its exchange hidden."""
    return cost.rows_moved_bytes / ((resolutions - 1) * cost.num_statistics_messages * machine.message_s)
