"""What one training step costs: arithmetic, traffic and messages, in our code or in the authors'.

Ours is counted: `fastssl.costs.trace` runs the method's own loss on fake tensors. The authors' (PAWS's published
code, facebookresearch/suncet at 731547d, on NVIDIA apex's synchronised batch norm) is the same networks and images with
closed formulas where that code goes about it differently; for a method without a class-balanced stream only batch norm
differs.

Modelled, not measured; what it must reproduce is held in tests/unit/costs/test_cost.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastssl.costs.trace import Trace, num_rows
from loaders.plan.plan import Plan
from loaders.plan.views import Balanced

FP32 = 4  # bytes

# Passes over the convolutions' outputs that a step makes beside the convolutions themselves, each tensor counted once a
# kernel, for ResNet-50, whose block outputs are about half of its convolutions' outputs and its ReLUs' 0.86 of them.
# In bf16 with 22.2 MB of convolution outputs and 130.4 MB of convolution traffic for a 224-pixel image:
PASSES_EAGER = 14.8  # batch norm 7 (3 forward, 4 backward), ReLU 5 x .86, shortcut additions 3: 460 MB
PASSES_FUSED = 9.5  # batch norm, addition and ReLU in one kernel each way: 342 MB
PASSES_IDEAL = 3.0  # statistics at the end of a convolution, normalisation at the beginning of the next: 197 MB

# The same for a transformer's blocks, of whose products' outputs (10 widths a token: 3 of qkv, 1 of attention, 1, 4
# and 1 of linear layers): two norms 10 widths (2 forward, 3 backward each), GELU 20, two additions 12.
PASSES_TOKENS = 4.2


@dataclass(frozen=True)
class StepCost:
    """One step: `flops`, images and crops of all ranks together, everything else of one rank.

    flops              by part, as in `Trace`
    image_equivalents  images of the largest view, forward and backward once; smaller crops count by their area
    gradient_bytes     what the ranks average
    statistics, rows   collectives of batch norm and of the loss, (op -> count, bytes); bytes as `Message` has them
    decodes, crops     images read, views cut from them
    traffic_bytes      the trunk's memory traffic
    activation_bytes   kept for the backward pass by a step that recomputes nothing
    """

    world: int
    flops: Mapping[str, int]
    image_equivalents: float
    num_parameters: int
    gradient_bytes: int
    statistics: Mapping[str, tuple[int, int]]
    rows: Mapping[str, tuple[int, int]]
    decodes: int
    crops: int
    traffic_bytes: float
    activation_bytes: int

    @property
    def gradient_ring_bytes(self) -> float:
        """Sent by a rank to average the gradients in a ring."""
        return ring_bytes("all_reduce", self.gradient_bytes, self.world)

    @property
    def rows_moved_bytes(self) -> float:
        """Received by a rank for the loss's exchange of rows."""
        return sum(ring_bytes(op, num_bytes, self.world) for op, (_, num_bytes) in self.rows.items())

    @property
    def num_statistics_messages(self) -> int:
        return sum(count for count, _ in self.statistics.values())


def ours(trace: Trace) -> StepCost:
    """What our code does: all of it counted, but for memory traffic on a GPU, where its kernels are fused."""
    statistics, rows = _tallied(trace, "statistics"), _tallied(trace, "rows")
    return _cost(trace, trace.flops, statistics, rows, trace.gradient_bytes, PASSES_FUSED)


def authors(trace: Trace) -> StepCost:
    """What the authors' code does with the same networks and images.

    Batch norm, a layer and a resolution at a time: every rank gathers mean and variance of all ranks, and reduces two
    sums backward. Supports, targets' and anchors' apart: gathered in float32; backward all-reduces the anchors'.
    Labels are made on every rank and applied as one-hot products.
    """
    layers, channels = len(trace.norm_channels), sum(trace.norm_channels)
    passes = len({view.size for stream in trace.plan.streams for view in stream.views})
    sums_bytes = passes * 2 * channels * FP32
    statistics = {
        "all_gather_into_tensor": (passes * layers, trace.world * sums_bytes),
        "all_reduce": (passes * layers, sums_bytes),
    }
    flops, rows = dict(trace.flops), _tallied(trace, "rows")
    if (found := _soft_nearest_neighbours(trace.plan)) is not None:
        anchors, targets, supports, classes = found
        width = trace.embedding_width
        embeddings = 2 * supports * width  # FLOPs a query: its products with all supports
        labels = 2 * supports * classes
        # The anchors' similarities have two gradients (anchors, supports), their label products one (probabilities).
        all_ranks = anchors * (3 * embeddings + 2 * labels) + targets * (embeddings + labels)
        flops["similarities"] = all_ranks // trace.world
        gathered_bytes = supports * width * FP32
        rows = {"all_gather_into_tensor": (2, 2 * gathered_bytes), "all_reduce": (1, gathered_bytes)}
    if trace.world == 1:
        statistics = rows = {}
    return _cost(trace, flops, statistics, rows, trace.num_parameters * FP32, PASSES_EAGER)


def _cost(
    trace: Trace,
    flops: Mapping[str, int],
    statistics: Mapping[str, tuple[int, int]],
    rows: Mapping[str, tuple[int, int]],
    gradient_bytes: int,
    passes: float,
) -> StepCost:
    streams = trace.plan.streams
    views = [(view, num_rows(stream, view)) for stream in streams for view in stream.views]
    largest = max(view.size for view, _ in views)
    inputs_bytes, outputs_bytes = trace.conv_io_bytes
    return StepCost(
        world=trace.world,
        flops={part: count * trace.world for part, count in flops.items()},
        image_equivalents=sum(n * (view.size / largest) ** 2 for view, n in views),
        num_parameters=trace.num_parameters,
        gradient_bytes=gradient_bytes,
        statistics=statistics,
        rows=rows,
        decodes=sum(stream.batch_global for stream in streams),
        crops=sum(stream.batch_global * view.copies for stream in streams for view in stream.views),
        traffic_bytes=trace.conv_traffic_bytes
        + passes * outputs_bytes
        + trace.tokens.traffic
        + PASSES_TOKENS * trace.tokens.outputs,
        # A convolution keeps its input, the batch norm behind it the convolution's output.
        activation_bytes=inputs_bytes + outputs_bytes + trace.tokens.kept,
    )


def _soft_nearest_neighbours(plan: Plan) -> tuple[int, int, int, int] | None:
    """(anchors, targets, supports, classes) of all ranks where a class-balanced stream supports the others: anchors are
    all other crops, targets those of the largest size. None without such a stream."""
    balanced = [(s, s.order) for s in plan.streams if isinstance(s.order, Balanced)]
    others = [s for s in plan.streams if not isinstance(s.order, Balanced)]
    if not balanced or not others:
        return None
    largest = max(view.size for stream in others for view in stream.views)
    crops = [(view.size, num_rows(stream, view)) for stream in others for view in stream.views]
    return (
        sum(n for _, n in crops),
        sum(n for size, n in crops if size == largest),
        sum(num_rows(stream, view) for stream, _ in balanced for view in stream.views),
        balanced[0][1].classes_global,
    )


def _tallied(trace: Trace, about: str) -> dict[str, tuple[int, int]]:
    messages = [m for m in trace.messages if m.about == about]
    return {
        op: (sum(m.op == op for m in messages), sum(m.num_bytes for m in messages if m.op == op))
        for op in sorted({m.op for m in messages})
    }


def ring_bytes(op: str, num_bytes: int, world: int) -> float:
    """What a rank receives. A ring sends an all-reduce's bytes around twice, less its own share; of a gather's result
    and a reduce-scatter's argument the whole is counted, own share included, as those are the buffers that move."""
    return 2 * (world - 1) / world * num_bytes if op == "all_reduce" else float(num_bytes)
