"""What one more image adds to the memory of a training step, in each way that a step can be done.

    python -m benchmarks.memory [--json FILE]

For the trunk of a ResNet-50 at 224 pixels in bfloat16: bytes kept between forward and backward, and the peak in
backward, as the slope between two batch sizes; weights and gradients drop out. Nothing is trained and no GPU is needed.

eager, eager-recompute   counted operator by operator on fake tensors
compiled                 kept: what the partitioner passes from the forward graph to the backward graph; peak: the
                         estimate of inductor's own scheduler for the backward graph, in the order it chooses
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import detect_fake_mode
from torch._inductor import lowering, memory  # noqa: F401  (lowering: the decompositions need it to have been imported)
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode

from benchmarks.machine import commit
from fastssl.engine.step import keep_what_is_dear
from fastssl.nn.recompute import recompute_blocks
from fastssl.nn.trunks.resnet import resnet
from fastssl.profiling.live_memory import LiveMemory


@dataclass
class Measured:
    """Bytes, and convolutions of the forward pass that the backward pass computes again."""

    kept: int
    peak: int
    convolutions_again: int


class _Enough(Exception):
    """What was to be known of a graph is known, and it need not run."""


def eager(num_images: int, size: int, build: Callable[[], nn.Module]) -> Measured:
    """One step on fake tensors."""
    again = 0
    with FakeTensorMode(allow_non_fake_inputs=True):
        net = build()
        x = torch.empty(num_images, 3, size, size).to(memory_format=torch.channels_last)
        with LiveMemory() as live:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = net(x)
            kept = live.now
            before = live.calls[torch.ops.aten.convolution.default]
            y.float().square().mean().backward()
            again = live.calls[torch.ops.aten.convolution.default] - before
    return Measured(kept, live.peak, again)


def compiled(num_images: int, size: int, build: Callable[[], nn.Module]) -> Measured:
    """One step, traced and partitioned as a compiled step is, up to where its backward graph would run."""
    keep_what_is_dear()
    found = Measured(0, 0, 0)

    def forward(graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
        (output,) = graph.graph.find_nodes(op="output")
        saved = {node for node in output.args[0] if isinstance(node, fx.Node)}
        found.kept = sum(_num_bytes(node, num_images) for node in saved)
        return make_boxed_func(graph.forward)

    def backward(graph: fx.GraphModule, inputs: list[Tensor]) -> Any:
        convolution = torch.ops.aten.convolution.default
        found.convolutions_again = len(graph.graph.find_nodes(op="call_function", target=convolution))
        found.peak = _scheduled_peak(graph)
        raise _Enough

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=backward,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    torch._dynamo.reset()
    net = torch.compile(build().to(memory_format=torch.channels_last), backend=backend, fullgraph=True)  # type: ignore[call-overload]
    x = torch.randn(num_images, 3, size, size).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(x)
    with suppress(_Enough):
        y.float().square().mean().backward()
    return found


def _num_bytes(node: fx.Node, num_images: int) -> int:
    """Of a tensor with a row for each image; weights and statistics count nothing."""
    value = node.meta.get("val")
    has_rows = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == num_images
    return value.numel() * value.element_size() if has_rows else 0


def _scheduled_peak(graph: fx.GraphModule) -> int:
    """Inductor's estimate for a backward graph, fused and ordered as it would be, without generating code."""
    inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
    mode = detect_fake_mode(inputs)
    assert mode is not None
    peaks: list[int] = []

    def reorder(nodes: Any, buffers: Any, fused: Any, graph_inputs: Any, graph_outputs: Any) -> Any:
        chosen = original(nodes, buffers, fused, graph_inputs, graph_outputs)
        freeable = memory.get_freeable_input_buf(nodes, graph_inputs)
        peaks.append(memory.estimate_peak_memory(chosen, freeable, graph_outputs)[0])
        return chosen

    original = memory.reorder_for_peak_memory
    lowered = GraphLowering(graph, example_inputs=inputs, shape_env=mode.shape_env, is_backward=True)
    with (
        V.set_graph_handler(lowered),
        V.set_fake_mode(mode),
        DebugContext(),
        patch.object(memory, "reorder_for_peak_memory", reorder),
    ):
        lowered.run(*inputs)
        lowered.init_wrapper_code()
        lowered._update_scheduler()
    return max(peaks)


def recomputing() -> nn.Module:
    net = resnet(50)
    recompute_blocks(net)
    return net


WAYS: dict[str, tuple[Callable[..., Measured], Callable[[], nn.Module]]] = {
    "eager": (eager, lambda: resnet(50)),
    "eager-recompute": (eager, recomputing),
    "compiled": (compiled, lambda: resnet(50)),
}


def megabytes_per_image(way: str, few: int = 8, many: int = 24) -> dict[str, float]:
    """The slope between two batch sizes."""
    measure, build = WAYS[way]
    small, large = (asdict(measure(num, 224, build)) for num in (few, many))
    slopes = {f"{name}_mb": (large[name] - small[name]) / (many - few) / 1e6 for name in ("kept", "peak")}
    if measure is compiled:  # counted for rows only, so there is nothing that drops out
        slopes["kept_mb"] = large["kept"] / many / 1e6
    return {**slopes, "convolutions_again": large["convolutions_again"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    measured = {way: megabytes_per_image(way, *((8, 24) if way == "compiled" else (32, 64))) for way in WAYS}
    for way, numbers in measured.items():
        print(f"{way:16}", "  ".join(f"{name} {value:.1f}" for name, value in numbers.items()))
    if arguments.json:
        versions = {"torch": torch.__version__, "commit": commit()}
        arguments.json.write_text(json.dumps({"per_image": measured, **versions}, indent=2) + "\n")


if __name__ == "__main__":
    main()
