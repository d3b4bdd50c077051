"""Blocks that are computed again for backward: the same values, no message twice, and the memory that they promise."""

import copy

import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastssl.nn.recompute import recompute_blocks
from fastssl.nn.resnet import resnet
from fastssl.nn.wide_resnet import wide_resnet
from tests.memory import LiveMemory
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


def megabytes_per_image(recompute):
    """What one more 224 image adds to a ResNet-50 trunk in bfloat16: kept after forward, and at most in backward."""
    measured = []
    for num_images in (32, 64):
        with FakeTensorMode(allow_non_fake_inputs=True):
            net = resnet(50)
            if recompute:
                recompute_blocks(net)
            x = torch.empty(num_images, 3, 224, 224).to(memory_format=torch.channels_last)
            with LiveMemory() as memory:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    y = net(x)
                kept = memory.now
                y.float().square().mean().backward()
            measured.append((kept, memory.peak))
    return [(large - small) / 32e6 for small, large in zip(*measured, strict=True)]


def test_recomputing_halves_the_memory_of_an_image():
    """Catches normalised tensors kept beside the raw ones (44 MB an image, which is what is kept without)."""
    kept, peak = megabytes_per_image(recompute=False)
    assert 43 < kept < 45 and peak < 46
    kept, peak = megabytes_per_image(recompute=True)
    assert kept < 24 and peak < 28
