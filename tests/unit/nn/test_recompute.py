"""Blocks that are computed again for backward: the same values, no message twice, and the memory that they promise."""

import copy
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory import compiled, megabytes_per_image
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.nn.norm.group_batch_norm import GroupBatchNorm
from fastssl.nn.norm.running_stats import frozen_running_stats
from fastssl.nn.recompute import recompute_blocks
from fastssl.nn.trunks.resnet import resnet
from fastssl.nn.trunks.wide_resnet import wide_resnet
from tests.ranks.pool import run_ranks
from tests.ranks.test_global_batch_norm import MessageBytes


def step(net, xs):
    """Backward through two resolutions; every gradient and buffer, flat, and the products it took."""
    with FlopCounterMode(display=False) as flops:
        sum(y.square().mean() for y in net.lockstep(xs)).backward()
    flat = torch.cat([t.flatten().double() for t in (*(p.grad for p in net.parameters()), *net.buffers())])
    return flat, flops.get_total_flops()


def twice(net, dtype=torch.float64):
    """The same step kept and recomputed."""
    net, again = net.to(dtype), copy.deepcopy(net).to(dtype)
    assert recompute_blocks(again) > 0
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(n, 3, size, size, generator=generator, dtype=dtype) for n, size in ((4, 64), (6, 32))]
    return step(net, xs), step(again, xs)


def test_recomputed_blocks_give_the_very_same_gradients_and_statistics():
    """Catches running statistics that move twice, and values computed again from other statistics."""
    for net in (resnet(50, base_width=8), resnet(18, base_width=8), wide_resnet(10, 1)):
        (kept, _), (again, _) = twice(net)
        assert torch.equal(kept, again)


def test_a_pass_with_frozen_statistics_is_computed_again_with_frozen_statistics():
    """Beside one that counts, and backward after the context has ended, as in a step with VAT. Catches operations that
    are others the second time, which backward refuses, and running statistics that move or stay frozen for good."""

    def step(net):
        x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        counted = net(x)
        with frozen_running_stats(net):
            uncounted = net(x + 0.1)
        (counted.square().mean() + uncounted.square().mean()).backward()
        assert all(layer.update_running_stats for layer in net.modules() if isinstance(layer, GlobalBatchNorm))
        return [p.grad for p in net.parameters()], list(net.buffers())

    for norm in (GlobalBatchNorm, partial(GroupBatchNorm, num_groups=2)):
        net = resnet(10, base_width=8, norm=norm).double()
        again = copy.deepcopy(net)
        recompute_blocks(again)
        for kept, recomputed in zip(step(net), step(again), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def test_recomputing_costs_a_tenth_of_the_step():
    """Catches convolutions with large kernels, or all of them, computed again."""
    (_, kept), (_, again) = twice(resnet(50, base_width=8))
    assert kept < again < 1.10 * kept


def _two_ranks():
    torch.manual_seed(0)
    net = resnet(50, base_width=8)
    with MessageBytes() as messages:
        (kept, _), (again, _) = twice(net)
    return kept, again, len(messages.messages)


def test_two_ranks_send_no_message_twice():
    """Catches a message repeated in the second pass: ranks would answer each other's next layer."""
    for kept, again, num_messages in run_ranks(2, _two_ranks):
        assert torch.equal(kept, again)
        assert num_messages == 2 * 2 * 53  # two steps, each way, of 53 layers


def test_recomputing_halves_the_memory_of_an_image():
    """Catches normalised tensors kept beside the raw ones (44 MB an image, which is what is kept without)."""
    kept = megabytes_per_image("eager", 32, 64)
    assert 43 < kept["kept_mb"] < 45 and kept["peak_mb"] < 46 and kept["convolutions_again"] == 0
    again = megabytes_per_image("eager-recompute", 32, 64)
    assert again["kept_mb"] < 24 and again["peak_mb"] < 28 and again["convolutions_again"] == 16 + 4


def test_a_compiled_step_keeps_what_convolutions_gave_and_no_more():
    """Catches a normalised tensor kept beside the raw one, and a convolution computed again. (A ResNet-50's 22.5 MB an
    image, 24.9 at the peak, are in benchmarks/results: two minutes of tracing.)"""
    outputs = []

    def build():
        net = resnet(10, base_width=8)
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(lambda _module, _x, y: outputs.append(y[0].numel()))
        return net

    with torch.autocast("cpu", dtype=torch.bfloat16):
        build()(torch.ones(3, 3, 64, 64))
    one_image = 2 * (3 * 64 * 64 + sum(outputs))  # bfloat16: the image and every convolution's output
    measured = compiled(3, 64, lambda: resnet(10, base_width=8))
    assert measured.convolutions_again == 0
    assert measured.kept / 3 < 1.15 * one_image  # the max-pool's indices, the stem's ReLU
