"""The cost model against the published step's figures, closed formulas, and counters in a real step. About 20 s."""

from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastssl import dist
from fastssl.costs import orders
from fastssl.costs.cost import authors, ours, ring_bytes
from fastssl.costs.trace import Untraceable, trace_step
from fastssl.methods.base import Facts
from fastssl.recipes.resolve import resolve
from loaders.batch import Batch, Part
from tests.ranks.pool import run_ranks
from tests.support import fakes

IMAGENET = Facts(num_classes=1000, channels=3, seed=0)
HEADLINE = "paws.rn50_100ep"
REDUCED = (  # the same network and loss at a size that a CPU runs: 2 + 4 images a rank, of 32 and 16 pixels
    "global_view.size=32", "small_view.size=16", "small_view.copies=2", "batch_global=4", "classes_global=4",
    "images_per_class=2",
)  # fmt: skip


def close(value, rel=0.01):
    return pytest.approx(value, rel=rel)


@cache
def headline(world):
    (stage,) = resolve(HEADLINE)
    return trace_step(stage, IMAGENET, world)


# ------------------------------------------------------------------------------------------- the authors', published


def test_authors_step_is_the_published_one():
    """The figures of PAWS's published code on 64 GPUs. Catches a forward pass counted for forward and backward, a first
    layer with an input gradient, a crop weighed by its side, a gather counted once a rank instead of once."""
    cost = authors(headline(64))
    assert cost.image_equivalents == close(19_426, 1e-4)
    assert sum(cost.flops.values()) == close(479e12)
    assert cost.flops["convolutions"] == close(471.8e12)
    assert cost.flops["linear layers"] == close(3.48e12)
    assert cost.flops["similarities"] == close(3.88e12)
    assert cost.num_parameters == 38_210_112
    assert cost.gradient_bytes == close(152.8e6)
    assert cost.gradient_ring_bytes == close(301e6)
    assert cost.num_statistics_messages == 228
    assert cost.statistics["all_gather_into_tensor"] == (114, close(34e6))
    assert cost.rows_moved_bytes == close(218e6)
    assert cost.decodes == 10_816
    assert cost.crops == 39_488
    assert cost.traffic_bytes * 64 == close(460e6 * cost.image_equivalents)
    assert cost.activation_bytes * 64 == close(44e6 * cost.image_equivalents, 0.015)


def test_our_similarities_go_without_label_products():
    """0.95 of the authors' 3.88 TFLOP: labels are sums over class segments. Catches a product that torch's own counter
    has no formula for, and similarities computed again where a shard is small enough to keep them."""
    trace = headline(64)
    theirs, label_products = authors(trace).flops["similarities"], 2 * 6_720 * 960 * (2 * 32_768 + 8_192)
    assert label_products == close(0.95e12)
    assert ours(trace).flops["similarities"] == close(theirs - label_products, 1e-3)


# ------------------------------------------------------------------------------------------------------ ours, counted


def test_our_step_sends_half_the_messages_and_a_third_of_the_rows():
    """114 batch-norm messages of 2.13 MB in all, both ways, and 83 MB of supports: one gather of two bf16 embeddings a
    support, one reduce-scatter of the gradient of one. Catches resolutions that no longer share a message, statistics
    in another type, embeddings that travel in float32, labels that travel at all."""
    cost = ours(headline(64))
    layers, channels = 57, 33_216
    assert cost.statistics == {"all_reduce": (2 * layers, (4 * 2 * channels + 2 * layers) * 8)}
    assert cost.statistics["all_reduce"][1] == close(2.13e6)
    embedding_bytes = 6_720 * 2_048 * 2
    assert cost.rows["all_gather_into_tensor"] == (1, 2 * embedding_bytes)
    assert cost.rows["reduce_scatter_tensor"] == (1, embedding_bytes)
    assert cost.rows_moved_bytes == close(83e6)
    assert cost.traffic_bytes * 64 == close(342e6 * cost.image_equivalents)


def test_images_arithmetic_and_messages_do_not_depend_on_the_number_of_ranks():
    few, many = ours(headline(8)), ours(headline(64))
    assert (few.image_equivalents, few.decodes, few.crops) == (many.image_equivalents, many.decodes, many.crops)
    assert sum(few.flops.values()) == close(sum(many.flops.values()))  # larger shards compute similarities again
    assert few.statistics == many.statistics
    assert few.gradient_ring_bytes == 7 / 8 * 2 * few.gradient_bytes


def test_one_rank_sends_nothing():
    (stage,) = resolve(HEADLINE, REDUCED)
    trace = trace_step(stage, IMAGENET, 1)
    for cost in (ours(trace), authors(trace)):
        assert cost.num_statistics_messages == cost.rows_moved_bytes == cost.gradient_ring_bytes == 0


def test_half_precision_gradients_are_half_as_many_bytes():
    (stage,) = resolve(HEADLINE, (*REDUCED, "gradients=bf16"))
    trace = trace_step(stage, IMAGENET, 2)
    assert ours(trace).gradient_bytes == 2 * 38_210_112
    assert authors(trace).gradient_bytes == 4 * 38_210_112


def test_a_ring_sends_an_all_reduce_twice():
    assert ring_bytes("all_reduce", 100, 4) == 150
    assert ring_bytes("all_gather_into_tensor", 100, 4) == 100


# -------------------------------------------------------------------------------------------------- against the real


def resnet50_macs(size):
    """(multiply-adds of a forward pass, those of the first convolution), from the table of layers."""
    side = size // 2
    first = total = 7 * 7 * 3 * 64 * side**2
    side, channels = side // 2, 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            out = side // stride if block == 0 else side
            total += channels * width * side**2 + 9 * width * width * out**2 + width * 4 * width * out**2
            total += channels * 4 * width * out**2 if block == 0 else 0
            side, channels = out, 4 * width
    return total, first


def test_convolutions_equal_the_table_of_layers():
    """Three products a layer, forward and two gradients, but for the gradient of the pixels."""
    assert resnet50_macs(224)[0] == close(4.0871e9, 1e-4)
    assert resnet50_macs(96)[0] == close(0.7507e9, 1e-4)
    expected = sum(
        images * 2 * (3 * macs - first)
        for images, (macs, first) in ((14_912, resnet50_macs(224)), (24_576, resnet50_macs(96)))
    )
    assert ours(headline(64)).flops["convolutions"] == close(expected, 1e-6)


def vits16_macs(size):
    """Multiply-adds of ViT-S/16's (patches, linear layers, attention) for an image, forward, by its layers."""
    tokens, width = (size // 16) ** 2 + 1, 384
    linear = 12 * tokens * (3 + 1 + 4 + 4) * width**2
    return (tokens - 1) * 3 * 16**2 * width, linear, 12 * 2 * tokens**2 * width


def test_a_transformer_s_arithmetic_equals_the_table_of_layers():
    """Three products a linear layer, but no gradient of the pixels; of attention's two, seven: two forward, four
    gradients and one that is computed again. Catches attention taken for similarities, and left out."""
    (stage,) = resolve("paws.vits16_100ep")
    trace = trace_step(stage, IMAGENET, 64)
    large, small = 2 * 1_024 + 6_720, 6 * 1_024
    patches, linear, attention = (
        large * of_large + small * of_small
        for of_large, of_small in zip(vits16_macs(224), vits16_macs(96), strict=True)
    )
    heads = (large + small) * (384 * 256 + 4 * 256 * 256)
    flops = ours(trace).flops
    assert 2 * sum(vits16_macs(224)) == close(2 * 4.58e9)  # as others count it
    assert flops["convolutions"] == 2 * 2 * patches
    assert flops["linear layers"] == 2 * 3 * (linear + heads)
    assert flops["attention"] == 2 * 3.5 * attention
    assert flops["similarities"] < 0.001 * sum(flops.values())
    assert sum(ours(trace).statistics["all_reduce"]) > 0 and ours(trace).num_statistics_messages == 8


def test_a_transformer_s_blocks_keep_what_their_layers_need():
    """In bfloat16, a token of a block: two norms keep their float32 input and its two statistics, linear layers their
    inputs (2 norms' outputs, attention's, GELU's of 4 widths), attention three widths, GELU its
    four. Catches memory of activations that is not seen, or seen twice."""
    (stage,) = resolve("paws.vits16_100ep", ("small_view.copies=1", "small_view.size=32"))
    few, many = (trace_step(replace(stage, config=replace(stage.config, images_per_class=n)), IMAGENET, 64)
                 for n in (1, 2))  # fmt: skip
    tokens = 960 / 64 * 197 * 12
    assert many.tokens.num == 12
    assert many.tokens.inputs - few.tokens.inputs == close(tokens * 384 * 4, 1e-6)
    outputs = tokens * (10 * 384 * 2 + 6 * 4)
    assert many.tokens.outputs - few.tokens.outputs == close(outputs, 0.01)
    kept = tokens * (2 * 384 * 4 + (2 + 1 + 4 + 3 + 4) * 384 * 2)
    assert many.tokens.kept - few.tokens.kept == close(kept, 0.01)


class Collectives(TorchDispatchMode):
    """(operation, by batch norm?) -> [calls, bytes]: a counter of its own, not the model's."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()
        self.norm_group = dist.statistics_group().group_name

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name().removeprefix("_c10d_functional::")
        if name != func.name() and name != "wait_tensor":
            moved = out if name.startswith("all_gather") else args[0]
            self.seen[name, args[-1] == self.norm_group, "calls"] += 1
            self.seen[name, args[-1] == self.norm_group, "bytes"] += moved.numel() * moved.element_size()
        return out


def real_step():
    """This rank's messages and FLOPs in a forward and backward pass on real tensors."""
    (stage,) = resolve(HEADLINE, REDUCED)
    method = stage.config.build(IMAGENET, {})
    nets, parts = method.nets(), {}
    for stream in method.plan().streams:
        images = stream.batch_global // dist.world_size()
        x = {v.name: torch.randn(images * v.copies, 3, v.size, v.size) for v in stream.views}
        columns = torch.arange(images) % 4
        parts[stream.name] = Part(x, columns, columns, columns, columns, columns)
    with FlopCounterMode(display=False) as flops, Collectives() as collectives:
        method.loss(nets, Batch(parts, torch.tensor(0)))["total"].backward()
    return {"flops": flops.get_total_flops(), "seen": [(*key, n) for key, n in collectives.seen.items()]}


def test_model_equals_counters_of_a_real_step_on_two_ranks():
    """Messages and their bytes exactly, FLOPs as torch's own counter has them."""
    (stage,) = resolve(HEADLINE, REDUCED)
    trace = trace_step(stage, IMAGENET, 2)
    modelled = Counter()
    for message in trace.messages:
        modelled[message.op, message.about == "statistics", "calls"] += 1
        modelled[message.op, message.about == "statistics", "bytes"] += message.num_bytes
    for rank in run_ranks(2, real_step):
        assert {tuple(key): n for *key, n in rank["seen"]} == dict(modelled)
        assert sum(trace.flops.values()) == close(rank["flops"])


# ------------------------------------------------------------------------------------------------- any other method


@pytest.mark.parametrize("family", ["paws", "simclrv2", "s4l"])
def test_any_method_is_traced_through_the_contract(family):
    for stage in fakes.stages(family):
        if stage.do == "train" and "labels" not in stage.needs:
            cost = ours(trace_step(stage, Facts(10, 1, 0), 2))
            backward_passes = 2 if family == "s4l" else 1  # its gradient of the input is one
            assert cost.statistics["all_reduce"][0] == 1 + backward_passes  # one layer, one resolution
            assert cost.flops["linear layers"] > 0


@pytest.mark.parametrize(
    ("family", "which", "why"),
    [("s4l", 2, "needs 'labels', which an earlier stage makes"), ("semppl", 0, "shapes alone")],
)
def test_what_cannot_be_traced_is_said_and_leaves_no_group_behind(family, which, why):
    with pytest.raises(Untraceable, match=why):
        trace_step(fakes.stages(family)[which], Facts(10, 1, 0), 2)
    assert dist.world_size() == 1


def test_a_trace_allocates_nothing_and_draws_nothing():
    """Catches an operation that runs on real zeros of full size, and a trace that shifts the seeds of a run."""
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    (stage,) = resolve(HEADLINE)
    trace = trace_step(stage, IMAGENET, 2)  # 427 GB of activations
    assert trace.saved_bytes == close(32 * headline(64).saved_bytes, 0.05)
    assert torch.equal(before, torch.random.get_rng_state())


# ------------------------------------------------------------------------------------------------ order of the step


def waits(machine):
    cost = ours(headline(machine.ranks))
    small_share = 1 - 14_912 / cost.image_equivalents
    return orders.lockstep(cost, machine), orders.large_then_small(cost, machine, 2, small_share)


def test_lockstep_halves_messages_and_shows_the_exchange():
    machine = orders.Machine("round numbers", 8, 100e-6, 1e9, 1.0, "")
    lockstep, apart = waits(machine)
    assert lockstep.statistics_s == pytest.approx(11.4e-3) and apart.statistics_s == pytest.approx(22.8e-3)
    assert lockstep.exchange_s == close(83e-3) and apart.exchange_s == 0.0


def test_lockstep_waits_less_on_every_machine_but_a_slow_network_of_fast_latency():
    """What the step is built on: benchmarks/results/step_model_202611.md."""
    gain_ms = {m.name: 1e3 * (waits(m)[1].total_s - waits(m)[0].total_s) for m in orders.MACHINES}
    assert [name for name, gain in gain_ms.items() if gain < 0] == ["64 V100, 100 Gb/s a host, tree"]
    assert gain_ms["8 H200, NVLink"] == pytest.approx(3.6, abs=0.1)
    assert gain_ms["64 H100, 400 Gb/s a GPU"] == pytest.approx(5.1, abs=0.1)
    assert min(gain_ms.values()) > -2.0
