"""The encoders of SimCLRv2, SemPPL and S4L against counts, laws and one another; their blocks: test_blocks."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastssl.nn import initialisers
from fastssl.nn.encoders.resnet import ByolResNet, ResNet, S4lResNet, SimclrResNet
from fastssl.nn.encoders.wide_resnet import WideResNet
from fastssl.nn.heads import byol_head, simclr_head
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.nn.recompute import recompute_blocks
from fastssl.nn.trunks import stem
from fastssl.nn.trunks.resnet import ResNetTrunk, resnet, sknext
from fastssl.nn.trunks.resnet_v2 import PreactivationBottleneck, ResNetV2Trunk
from fastssl.nn.trunks.selective_kernel import SelectiveKernelBottleneck, _select
from tests.support.definitions import (
    normal,
    one_thread,  # noqa: F401  (every test here uses it)
    shaken,
)

CHANNELS_LAST = torch.channels_last
NEW = {  # small ones of every kind
    "selective kernels": SimclrResNet(50, selective_kernel=True, base_width=8),
    "ResNet-D": SimclrResNet(18, selective_kernel=True, base_width=8),
    "SimCLRv2": SimclrResNet(18, base_width=8),
    "SKNeXt": ByolResNet(50, selective_kernel=True, base_width=16),
    "v2": S4lResNet(50, base_width=8),
    "v2 without bottleneck": S4lResNet(18, base_width=8),
}


@pytest.fixture(params=NEW.values(), ids=NEW)
def encoder(request):
    return request.param


# ------------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("depth", "width", "selective_kernel", "trainable", "with_statistics"),
    [  # counted in SimCLRv2's code; the second are the paper's Table 1
        (50, 1, False, 23_508_032, 23_561_152),
        (50, 1, True, 35_215_584, 35_277_408),
        (50, 2, False, 93_907_072, 94_013_312),
        (50, 2, True, 140_306_048, 140_428_864),
        (101, 1, False, 42_500_160, 42_605_504),
        (101, 1, True, 64_662_304, 64_786_144),
        (101, 2, False, 169_771_136, 169_981_824),
        (101, 2, True, 257_132_224, 257_377_984),
        (152, 1, False, 58_143_808, 58_295_232),
        (152, 1, True, 88_940_896, 89_119_584),
        (152, 2, False, 232_253_568, 232_556_416),
        (152, 2, True, 353_398_528, 353_752_896),
        (152, 3, True, 794_704_160, 795_235_360),
    ],
)
def test_parameters_are_simclr_s_table(depth, width, selective_kernel, trainable, with_statistics):
    """Catches a stem that width spares, a lost or additional norm, a bias, another hidden size of the selection."""
    with torch.device("meta"):
        net = SimclrResNet(depth, width, selective_kernel).build()
    count = sum(p.numel() for p in net.parameters())
    statistics = sum(b.numel() for name, b in net.named_buffers() if "running" in name)
    assert (count, count + statistics) == (trainable, with_statistics)


def test_parameters_of_semppl_s_selective_kernels():
    """Catches a ResNet's inner width in SKNeXt's place (15.3 M), biases, a reduction of another size."""
    with torch.device("meta"):
        trunk = ByolResNet(50, selective_kernel=True).build()
        classifier = nn.Linear(trunk.num_features, 1000)
    count = sum(p.numel() for p in [*trunk.parameters(), *classifier.parameters()])
    assert count == 27_479_784  # the paper's 27.5 M


@pytest.mark.parametrize(("width", "total"), [(1, 23_500_352), (4, 375_347_456)])
def test_parameters_of_s4l_s_resnet(width, total):
    """Catches norms in the stem or in shortcuts, none at the end, and norms as wide as their block's output."""
    expected, channels = 7 * 7 * 3 * 64 * width, 64 * width
    for group, num_blocks in enumerate((3, 4, 6, 3)):
        inner = 64 * width * 2**group
        for _ in range(num_blocks):
            expected += 2 * channels + channels * inner + 2 * inner + 9 * inner**2 + 2 * inner + 4 * inner**2
            expected += channels * 4 * inner if channels != 4 * inner else 0
            channels = 4 * inner
    with torch.device("meta"):
        net = S4lResNet(50, width).build()
    assert net.num_features == 2048 * width  # MOAM's heads take 8,192
    assert sum(p.numel() for p in net.parameters()) == expected + 2 * channels == total


@pytest.mark.parametrize(
    ("depth", "blocks", "width", "total"),
    [  # at width 1 as many as timm 1.0.31 counts in its resnetv2_18 and resnetv2_34
        (18, (2, 2, 2, 2), 1, 11_174_720),
        (34, (3, 4, 6, 3), 1, 21_282_880),
        (34, (3, 4, 6, 3), 2, 85_082_240),
    ],
)
def test_parameters_of_s4l_s_shallow_resnets(depth, blocks, width, total):
    """Catches bottlenecks, a projection in the first group, where nothing changes, and a norm too many."""
    expected, channels = 7 * 7 * 3 * 64 * width, 64 * width
    for group, num_blocks in enumerate(blocks):
        inner = 64 * width * 2**group
        for _ in range(num_blocks):
            expected += 2 * channels + 9 * channels * inner + 2 * inner + 9 * inner**2
            expected += channels * inner if channels != inner else 0
            channels = inner
    with torch.device("meta"):
        net = S4lResNet(depth, width).build()
    assert net.num_features == 512 * width
    assert sum(p.numel() for p in net.parameters()) == expected + 2 * channels == total


def test_layers_that_torchvision_has_bear_its_names():
    """Catches checkpoints and exports that would not match: only the stem's convolutions change their names."""
    with torch.device("meta"):
        plain, kernels = resnet(50).state_dict(), resnet(50, selective_kernel=True).state_dict()
    assert set(plain) - set(kernels) == {"conv1.weight"}
    others = {name for name in plain if name in kernels and plain[name].shape != kernels[name].shape}
    assert {name.split(".", 2)[2].split(".")[0] for name in others} == {"conv2", "bn2"}
    assert kernels["layer2.0.downsample.0.weight"].shape == (512, 256, 1, 1)
    added = {name.split(".", 2)[2] for name in set(kernels) - set(plain) if name.startswith("layer")}
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert added == {"selection.fc1.weight", "selection.fc2.weight", *(f"selection.bn1.{name}" for name in norm)}


def test_names_tell_what_is_decayed(encoder):
    """Catches a norm under a name that PAWS's rule would decay (the shortcuts' excepted, as in PAWS)."""
    for module in (encoder.build(), simclr_head(8, 4), byol_head(8, 4, 2)):
        for name, parameter in module.named_parameters():
            decayed = "bias" not in name and "bn" not in name
            assert decayed == (parameter.dim() > 1) or name.endswith("downsample.1.weight"), name


def test_what_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="have no selective kernels"):
        resnet(50, selective_kernel=True, preactivation=True)
    with pytest.raises(ValueError, match="depth 50 or more, not 34"):
        sknext(34)
    with pytest.raises(ValueError, match="16, 32, ..., not 24"):
        sknext(50, base_width=24)
    with pytest.raises(TypeError, match="zero_gama"):
        resnet(50, zero_gama=True)
    with pytest.raises(ValueError, match='no stem "Cifar"'):
        resnet(50, preactivation=True, stem="Cifar")


# ------------------------------------------------------------------------------------------- as PAWS has them, still


def plain(net, x):
    """A post-activation ResNet without bottlenecks, in training: the very operations, none fused, of torch."""

    def norm(x, layer):
        return F.batch_norm(x, None, None, layer.weight, layer.bias, True, 0.0, 1e-5)

    x = F.max_pool2d(norm(net.conv1(x), net.bn1).relu(), 3, 2, padding=1)
    for block in (*net.layer1, *net.layer2, *net.layer3, *net.layer4):
        shortcut = norm(block.downsample[0](x), block.downsample[1]) if len(block.downsample) else x
        out = norm(block.conv1(x), block.bn1).relu()
        out = norm(block.conv2(out), block.bn2)
        x = (out + shortcut).relu()
    return x.mean((2, 3))


@pytest.mark.parametrize("depth", [10, 34])
def test_paws_s_networks_compute_what_they_did(depth):
    """Catches a convention of another paper that leaks into PAWS's networks: values and gradients, to the bit."""
    net = ResNet(depth, base_width=8).build().to(memory_format=CHANNELS_LAST)
    x = torch.randn(3, 3, 50, 50).to(memory_format=CHANNELS_LAST)
    results = []
    for function in (net, lambda x: plain(net, x)):
        net.zero_grad()
        y = function(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("encoder", "first", "last", "features"),
    [
        (ResNet(10, base_width=8), 64.747, 288.093, 147.586),
        (ResNet(50, stem="cifar", base_width=4), 19.551, 410.951, 522.991),
        (WideResNet(10, 1), 41.752, 183.690, 103.887),
    ],
)
def test_a_seed_draws_the_networks_that_it_did(encoder, first, last, features):
    """Catches weights drawn in another order or from another law: seeded runs would change."""
    torch.manual_seed(0)
    net = encoder.build()
    weights = [p for p in net.parameters() if p.dim() > 1]
    with torch.no_grad():
        y = net(torch.arange(4.0 * 3 * 32 * 32).sin().view(4, 3, 32, 32))
    got = [weights[0].abs().sum().item(), weights[-1].abs().sum().item(), y.abs().sum().item()]
    assert got == pytest.approx([first, last, features], rel=1e-4)


# -------------------------------------------------------------------------------------------------- initial weights


def test_initial_weights_follow_their_laws():
    """Catches fan-in for fan-out, the truncation's lost variance given back where it is not, and groups in the fan."""
    conv = nn.Conv2d(128, 64, 3, groups=2, bias=False)  # fan-in 9 * 64, fan-out 9 * 64 (torch's, with groups), 36,864
    fan_in = 9 * 64
    expected = {  # standard deviation, largest value in its units
        initialisers.variance_scaling: (fan_in**-0.5, 2 / 0.8796),
        initialisers.haiku_default: (0.8796 * fan_in**-0.5, 2 / 0.8796),
        initialisers.small_normal: (0.01, None),
    }
    for init, (std, bound) in expected.items():
        init(conv.weight)
        assert conv.weight.std().item() == pytest.approx(std, rel=0.015)
        assert abs(conv.weight.mean().item()) < 0.03 * std
        largest = conv.weight.abs().max().item() / std
        assert largest > 3.5 if bound is None else 0.98 * bound < largest <= bound * 1.0001
    linear = nn.Linear(300, 100)
    initialisers.initialise(linear, initialisers.glorot_uniform)
    bound = (6 / 400) ** 0.5
    assert 0.99 * bound < linear.weight.abs().max() <= bound and (linear.bias == 0).all()
    initialisers.initialise(linear, initialisers.kaiming_fan_out)
    assert linear.weight.std().item() == pytest.approx((2 / 100) ** 0.5, rel=0.015)


@pytest.mark.parametrize(
    ("encoder", "variance"),
    [  # of layer3's second 3x3, 64 -> 64 channels, and of a 1x1 from 64 to 256
        (ResNet(50, base_width=16), (2 / (9 * 64), 2 / 256)),
        (SimclrResNet(50, base_width=16), (1 / (9 * 64), 1 / 64)),
        (ByolResNet(50, base_width=16), (0.7737 / (9 * 64), 0.7737 / 64)),
        (S4lResNet(50, base_width=16), (2 / (18 * 64), 2 / 320)),
    ],
)
def test_each_encoder_is_drawn_by_its_own_law(encoder, variance):
    block = encoder.build().layer3[1]
    assert [w.var().item() for w in (block.conv2.weight, block.conv3.weight)] == pytest.approx(variance, rel=0.05)


def test_norms_that_end_a_block_start_at_zero_where_the_paper_s_do():
    """Catches PAWS's networks started as shortcuts, a projection's norm at zero, and blocks that are left out."""
    for encoder, zeros in (
        (ResNet(50, base_width=4), 0), (S4lResNet(50, base_width=4), 0), (SimclrResNet(50, base_width=4), 16),
        (SimclrResNet(50, selective_kernel=True, base_width=4), 16), (SimclrResNet(18, base_width=4), 8),
        (ByolResNet(50, selective_kernel=True, base_width=16), 16), (ByolResNet(18, base_width=4), 0),
    ):  # fmt: skip
        net = encoder.build()
        norms = {name: layer for name, layer in net.named_modules() if isinstance(layer, GlobalBatchNorm)}
        started = {name for name, layer in norms.items() if (layer.weight == 0).all()}
        assert len(started) == zeros
        assert {name.split(".")[-1] for name in started} <= {"bn3" if encoder.depth == 50 else "bn2"}
        assert all((norm.weight == 1).all() for name, norm in norms.items() if name not in started)


# ------------------------------------------------------------- several resolutions, memory layout, recomputed, compiled


def step(net, xs, lockstep):
    ys = lockstep(xs)
    sum((y * torch.arange(y.numel()).view_as(y).sin()).sum() for y in ys).backward()
    return [*ys, *(p.grad for p in net.parameters()), *net.buffers()]


def test_lockstep_is_as_many_passes(encoder):
    """Catches a resolution that sees another's statistics or selection, and running statistics in another order."""
    net = shaken(encoder.build())
    xs = [normal(3, 3, 40, 40), normal(5, 3, 33, 31)]
    again = copy.deepcopy(net)
    together = step(net, xs, net.lockstep)
    separate = step(again, xs, lambda xs: [again(x) for x in xs])
    for a, b in zip(together, separate, strict=True):
        assert (a - b).abs().max() < 1e-9 * max(b.abs().max().item(), 1)
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), again.buffers(), strict=True))
    assert together[0].shape == (3, net.num_features)


def test_channels_last_stays(encoder):
    """Catches a feature map in another layout, which convolutions would copy. Those do that are cut out of a larger
    one: by the pool of stride 1, and from the gradient of two branches side by side."""
    net = encoder.build().to(memory_format=CHANNELS_LAST)
    layouts = {}

    def watch(name):
        def note(what, x):
            layouts[name, what] = x.is_contiguous(memory_format=CHANNELS_LAST)

        def hook(_module, args, out):
            note("input", args[0])
            note("output", out)
            out.register_hook(lambda g: note("gradient", g))

        return hook

    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(watch(name))
    net(torch.randn(2, 3, 64, 64).to(memory_format=CHANNELS_LAST)).square().sum().backward()
    others = {key for key, is_channels_last in layouts.items() if not is_channels_last}
    branches = {(name, "gradient") for name, _ in layouts if name.endswith((".near", ".far"))}
    assert others <= {("layer1.0.downsample.0", "input")} | branches
    assert len(layouts) == 3 * sum(isinstance(layer, nn.Conv2d) for layer in net.modules())


def test_recomputed_blocks_give_the_very_same_gradients_and_statistics(encoder):
    """Catches running statistics that move twice, the selection's among them."""
    net = shaken(encoder.build())
    again = copy.deepcopy(net)
    recompute_blocks(again)
    xs = [normal(3, 3, 40, 40), normal(5, 3, 33, 31)]
    kept, recomputed = (step(n, xs, n.lockstep) for n in (net, again))
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


def two_selective_kernel_blocks():
    return ResNetTrunk(
        SelectiveKernelBottleneck, (1, 1, 0, 0), 16, "imagenet", 3, resnet_d=True, max_pool=stem.same_max_pool
    )


@pytest.mark.parametrize(
    ("build", "sizes"),
    [
        (two_selective_kernel_blocks, [20]),
        (lambda: ResNetV2Trunk(PreactivationBottleneck, (0, 1, 0, 0), 8, "imagenet", 3), [20, 12]),
    ],
    ids=["selective kernels", "v2"],
)
def test_compiled_is_one_graph_and_equals_eager(build, sizes):
    """Catches a graph break, and gradients of the compiled pools or of the softmax that are not the eager ones."""
    net = shaken(build())
    again = copy.deepcopy(net)
    xs = [normal(6, 3, size, size) for size in sizes]
    compiled = torch.compile(again.lockstep, backend="aot_eager", fullgraph=True)
    for a, b in zip(step(net, xs, net.lockstep), step(again, xs, compiled), strict=True):
        assert (a - b).abs().max() < 1e-9 * max(a.abs().max().item(), 1)


def test_the_selection_keeps_the_type_of_its_maps():
    """Catches float32 feature maps behind a softmax that CUDA's autocast widens."""
    x, logits = torch.randn(2, 6, 4, 4).bfloat16(), torch.randn(2, 6)
    assert _select(x, logits).dtype == torch.bfloat16
