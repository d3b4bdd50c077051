"""Global batch norm in a compiled network: one graph, the eager gradients, as many messages."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.profiler import profile

from fastssl.nn.heads import projection_head
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.nn.trunks.resnet import BasicBlock, ResNetTrunk
from tests.ranks.pool import run_ranks
from tests.ranks.test_global_batch_norm import CHANNELS_LAST, _normal, _shard


class SmallEncoder(nn.Module):
    """A stem, a block with projection shortcut, a head: six layers of batch norm."""

    def __init__(self):
        super().__init__()
        self.trunk = ResNetTrunk(BasicBlock, (0, 1, 0, 0), 4, "cifar", 3, GlobalBatchNorm)
        self.projection = projection_head(8, 8)

    def forward(self, xs):
        return self.projection.lockstep(self.trunk.lockstep(xs))


@pytest.mark.parametrize("world", (1, 2))
def test_compiled_is_one_graph_and_equals_eager(world):
    """Catches a graph break, a message that the compiler drops, doubles or leaves outside, and gradients recomputed
    from running statistics updated meanwhile (which aot_eager, unlike inductor, may get right)."""
    ranks = run_ranks(world, _compiled_and_eager, timeout_s=300) if world > 1 else [_compiled_and_eager()]
    for compiled, eager, graphs, breaks, messages in ranks:
        for name, expected in eager.items():
            assert (compiled[name] - expected).norm() < 1e-9 * max(expected.norm(), 0.1), name
        assert (graphs, breaks) == (1, 0)
        assert messages == (0 if world == 1 else 12)


def _compiled_and_eager():
    torch.manual_seed(0)
    eager = SmallEncoder().double().to(memory_format=CHANNELS_LAST)
    compiled = SmallEncoder().double().to(memory_format=CHANNELS_LAST)
    compiled.load_state_dict(eager.state_dict())
    counters.clear()
    with torch._inductor.config.patch(compile_threads=1):  # no pool of compilers, which would outlive the test
        compiled.compile(fullgraph=True)
        _step_of_two(compiled)
        with profile() as profiled:
            _step_of_two(compiled)
    for _ in range(2):
        _step_of_two(eager)
    messages = sum(event.name.startswith("_c10d_functional::all_reduce") for event in profiled.events())
    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    return *(_state(net) for net in (compiled, eager)), graphs, breaks, messages


def _step_of_two(net):
    xs = [
        _normal(seed, (10, 3, size, size))[_shard()].to(memory_format=CHANNELS_LAST) for seed, size in ((8, 8), (9, 6))
    ]
    sum(z.pow(3).mean() for z in net(xs)).backward()


def _state(net):
    gradients = {f"{name} gradient": parameter.grad for name, parameter in net.named_parameters()}
    return gradients | {name: buffer.double() for name, buffer in net.named_buffers()}
