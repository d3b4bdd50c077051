"""The encoders and heads of SimCLRv2, SemPPL and S4L against counts, slow definitions and one another."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastssl.nn import initialisers
from fastssl.nn.encoders.resnet import ByolResNet, ResNet, S4lResNet, SimclrResNet
from fastssl.nn.encoders.wide_resnet import WideResNet
from fastssl.nn.heads import byol_head, projection_head, simclr_head
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.nn.recompute import recompute_blocks
from fastssl.nn.trunks import stem
from fastssl.nn.trunks.resnet import ResNetTrunk, resnet, sknext
from fastssl.nn.trunks.resnet_v2 import S4L_NORM, ResNetV2Trunk
from fastssl.nn.trunks.selective_kernel import SelectiveKernelBottleneck, SKNeXtBottleneck, _select

CHANNELS_LAST = torch.channels_last
NEW = {  # small ones of every kind
    "selective kernels": SimclrResNet(50, selective_kernel=True, base_width=8),
    "ResNet-D": SimclrResNet(18, selective_kernel=True, base_width=8),
    "SimCLRv2": SimclrResNet(18, base_width=8),
    "SKNeXt": ByolResNet(50, selective_kernel=True, base_width=16),
    "v2": S4lResNet(50, base_width=8),
}


@pytest.fixture(params=NEW.values(), ids=NEW)
def encoder(request):
    return request.param


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def assert_same(ours, slow, module, xs):
    """`ours(*xs)` equals `slow(*xs)`, and so do the gradients with respect to the xs and the module's parameters."""
    results = []
    for function in (ours, slow):
        own = [x.clone().requires_grad_() for x in xs]
        y = function(*own)
        weights = torch.arange(y.numel(), dtype=y.dtype).sin().view_as(y)
        operands = [*own, *module.parameters()]
        results.append([y, *torch.autograd.grad((y * weights).sum(), operands, allow_unused=True)])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).abs().max() < 1e-10 * max(b.abs().max().item(), 1), (a - b).abs().max()


def batch_norm(x, layer):
    """By its definition, over all axes but the second."""
    axes = [d for d in range(x.dim()) if d != 1]
    mean, var = x.mean(axes, keepdim=True), x.var(axes, correction=0, keepdim=True)
    shape = [1, -1] + [1] * (x.dim() - 2)
    return (x - mean) / (var + layer.eps).sqrt() * layer.weight.view(shape) + layer.bias.view(shape)


def shaken(module):
    """In float64, with norms that are neither 1 nor 0."""
    for layer in module.double().modules():
        if isinstance(layer, GlobalBatchNorm):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            if layer.bias.requires_grad:
                nn.init.normal_(layer.bias)
    return module


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
    with pytest.raises(ValueError, match="depth 50 or more"):
        resnet(18, preactivation=True)
    with pytest.raises(ValueError, match="without selective kernels"):
        resnet(50, selective_kernel=True, preactivation=True)
    with pytest.raises(ValueError, match="depth 50 or more, not 34"):
        sknext(34)
    with pytest.raises(ValueError, match="16, 32, ..., not 24"):
        sknext(50, base_width=24)
    with pytest.raises(TypeError, match="zero_gama"):
        resnet(50, zero_gama=True)
    with pytest.raises(ValueError, match='no stem "Cifar"'):
        resnet(50, preactivation=True, stem="Cifar")


# ------------------------------------------------------------------------------------------------------ definitions


@pytest.mark.parametrize("sides", [(6, 6), (7, 7), (6, 9), (1, 4)])
def test_same_max_pool_is_tensorflow_s(sides):
    """Catches padding that is split evenly on even sides, not so on odd ones, or of zeros."""
    x = normal(2, 3, *sides) - 2

    def slow(x):
        starts = []
        for side in sides:
            padding = max((math.ceil(side / 2) - 1) * 2 + 3 - side, 0)
            starts.append([2 * i - padding // 2 for i in range(math.ceil(side / 2))])
        rows = [
            [x[:, :, max(i, 0) : i + 3, max(j, 0) : j + 3].amax((2, 3)) for j in starts[1]] for i in starts[0]
        ]  # fmt: skip
        return torch.stack([torch.stack(row, -1) for row in rows], -2)

    assert_same(stem.same_max_pool, slow, nn.Identity(), [x])
    assert torch.equal(stem.same_max_pool(x), stem.symmetric_max_pool(x)) == (sides == (7, 7))


def test_zero_padded_max_pool_counts_zeros():
    """Catches padding by -inf: S4L pools convolutions' raw, partly negative outputs."""
    x = -normal(2, 3, 6, 7).abs()
    padded = torch.zeros(2, 3, 8, 9, dtype=x.dtype)
    padded[:, :, 1:-1, 1:-1] = x
    slow = torch.stack(
        [padded[:, :, i : i + 3, j : j + 3].amax((2, 3)) for i in (0, 2, 4) for j in (0, 2, 4, 6)], -1
    ).view(2, 3, 3, 4)
    pooled = stem.zero_padded_max_pool(x)
    assert torch.equal(pooled, slow)
    assert (pooled[:, :, 0] == 0).all() and (pooled[:, :, 1:, 1:-1] < 0).all()


def pooled_shortcut(x, downsample, stride):
    """ResNet-D's, pixel by pixel."""
    height, width = x.shape[2:]
    rows = []
    for i in range(0, height, stride):
        row = []
        for j in range(0, width, stride):
            window = x[:, :, i : i + 2, j : j + 2]
            count = 4 if stride == 2 else window.shape[2] * window.shape[3]
            row.append(window.sum((2, 3)) / count)
        rows.append(torch.stack(row, -1))
    pooled = torch.stack(rows, -2)
    conv, norm = downsample.get_submodule("0"), downsample.get_submodule("1")
    return batch_norm(torch.einsum("oi,nihw->nohw", conv.weight[:, :, 0, 0], pooled), norm)


@pytest.mark.parametrize("sides", [(6, 6), (5, 7)])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_pooled_shortcut_equals_its_definition(stride, sides):
    """Catches a missing pool at stride 1, padding that counts there, and padding that does not count at stride 2."""
    net = shaken(resnet(18, selective_kernel=True, base_width=8, every_group_projects=True))
    downsample = (net.layer1 if stride == 1 else net.layer2)[0].downsample
    x = normal(3, 8, *sides)
    assert_same(downsample, lambda x: pooled_shortcut(x, downsample, stride), downsample, [x])


@pytest.mark.parametrize("form", [SelectiveKernelBottleneck, SKNeXtBottleneck])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_selective_kernel_block_equals_its_definition(form, stride):
    """Catches sigmoids for a softmax, a softmax over channels, branches that swap, a pool of one branch, and a norm
    that mixes both branches."""
    trunk = ResNetTrunk(form, (1, 1, 0, 0), 16, "cifar", 3, resnet_d=form is SelectiveKernelBottleneck)
    block = (shaken(trunk).layer1 if stride == 1 else shaken(trunk).layer2)[0]
    inner = block.conv1.out_channels
    assert inner == 16 * stride * (2 if form is SKNeXtBottleneck else 1)

    def part(layer, near):  # half of the norm of both branches
        half = slice(0, inner) if near else slice(inner, None)
        norm = GlobalBatchNorm(inner).double()
        del norm.weight, norm.bias
        norm.weight, norm.bias = layer.weight[half], layer.bias[half]
        return norm

    def branch(x, near):
        if form is SKNeXtBottleneck:
            conv, dilation = (block.conv2.near, 1) if near else (block.conv2.far, 2)
            size = inner // 32
            groups = [
                F.conv2d(x[:, g * size : (g + 1) * size], conv.weight[g * size : (g + 1) * size], stride=stride,
                         padding=dilation, dilation=dilation) for g in range(32)
            ]  # fmt: skip
            return torch.cat(groups, 1)
        weight = block.conv2.weight[:inner] if near else block.conv2.weight[inner:]
        return F.conv2d(x, weight, stride=stride, padding=1)

    def slow(x):
        out = batch_norm(F.conv2d(x, block.conv1.weight), block.bn1).clamp(min=0)
        near, far = (batch_norm(branch(out, which), part(block.bn2, which)).clamp(min=0) for which in (True, False))
        selection = block.selection
        assert len(selection.fc1.weight) == 32
        hidden = batch_norm((near + far).mean((2, 3)) @ selection.fc1.weight.T, selection.bn1).clamp(min=0)
        logits = hidden @ selection.fc2.weight.T
        chosen = torch.zeros_like(near)
        for channel in range(inner):
            a, b = logits[:, channel].exp(), logits[:, inner + channel].exp()
            mixed = near[:, channel] * (a / (a + b))[:, None, None] + far[:, channel] * (b / (a + b))[:, None, None]
            chosen = torch.cat([chosen[:, :channel], mixed[:, None], chosen[:, channel + 1 :]], 1)
        out = batch_norm(F.conv2d(chosen, block.conv3.weight), block.bn3)
        if form is SelectiveKernelBottleneck:
            return (out + pooled_shortcut(x, block.downsample, stride)).clamp(min=0)
        shortcut = F.conv2d(x, block.downsample[0].weight, stride=stride)
        return (out + batch_norm(shortcut, block.downsample[1])).clamp(min=0)

    assert_same(block, slow, block, [normal(4, 16 if stride == 1 else 64, 6, 5)])


@pytest.mark.parametrize("which", [("layer1", 0), ("layer1", 1), ("layer2", 0)])
def test_a_preactivation_block_equals_its_definition(which):
    """Catches a shortcut of the raw x, a norm in the shortcut, the stride in a 1x1, an in-place ReLU on x."""
    net = shaken(ResNetV2Trunk((2, 1, 0, 0), 4, "cifar", 3))
    group, index = which
    block = getattr(net, group)[index]
    stride = 2 if group == "layer2" else 1
    x = normal(3, block.conv1.in_channels, 6, 5)
    before = x.clone()

    def slow(x):
        active = batch_norm(x, block.bn1).clamp(min=0)
        shortcut = x if index == 1 else F.conv2d(active, block.downsample.weight, stride=stride)
        out = batch_norm(F.conv2d(active, block.conv1.weight), block.bn2).clamp(min=0)
        out = batch_norm(F.conv2d(out, block.conv2.weight, stride=stride, padding=1), block.bn3).clamp(min=0)
        return F.conv2d(out, block.conv3.weight) + shortcut

    assert_same(block, slow, block, [x])
    assert torch.equal(x, before)


def test_s4l_s_stem_and_end():
    """Catches a norm or ReLU before the first block, and pooled features without the last norm and ReLU."""
    net = shaken(ResNetV2Trunk((1, 0, 0, 0), 4, "imagenet", 3))

    def slow(x):
        x = F.conv2d(x, net.conv1.weight, stride=2, padding=3)
        x = net.layer1[0](stem.zero_padded_max_pool(x))
        return batch_norm(x, net.bn1).clamp(min=0).mean((2, 3))

    assert_same(net, slow, net, [normal(3, 3, 20, 17)])
    norms = [layer for layer in S4lResNet(50, base_width=4).build().modules() if isinstance(layer, GlobalBatchNorm)]
    assert len(norms) == 49 and {(layer.eps, layer.momentum) for layer in norms} == {(1e-3, 0.01)}
    assert S4L_NORM(3).num_features == 3


def test_the_deep_stem_equals_its_definition():
    """Catches the stride in another convolution than the first, and one norm or ReLU too few or too many."""
    net = shaken(ResNetTrunk(SelectiveKernelBottleneck, (0, 0, 0, 0), 8, "imagenet", 3, resnet_d=True))

    def slow(x):
        for conv, norm, stride in (("conv1", "bn1", 2), ("conv2", "bn2", 1)):
            weight = getattr(net.conv1, conv).weight
            x = batch_norm(F.conv2d(x, weight, stride=stride, padding=1), getattr(net.conv1, norm)).clamp(min=0)
        x = F.conv2d(x, net.conv1.conv3.weight, padding=1)
        return stem.symmetric_max_pool(batch_norm(x, net.bn1).clamp(min=0)).mean((2, 3))

    assert_same(net, slow, net, [normal(3, 3, 12, 13)])
    cifar = SimclrResNet(50, selective_kernel=True, stem="cifar", base_width=8).build()
    assert cifar.conv1.kernel_size == (3, 3) and cifar.conv1.stride == (1, 1)
    assert cifar.maxpool is stem.no_pool


def test_the_first_group_projects_where_its_paper_does():
    """Catches SimCLRv2's additional projection lost, or given to PAWS's networks."""
    for encoder, projections in ((ResNet(18), 3), (SimclrResNet(18), 4), (ByolResNet(18), 4), (ResNet(50), 4)):
        with torch.device("meta"):
            names = encoder.build().state_dict()
        assert sum(name.endswith("downsample.0.weight") for name in names) == projections


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
    [(two_selective_kernel_blocks, [20]), (lambda: ResNetV2Trunk((0, 1, 0, 0), 8, "imagenet", 3), [20, 12])],
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


# ------------------------------------------------------------------------------------------------------------- heads


def test_parameters_of_heads():
    """Catches biases, a bias of the last norm, other widths: counted in the papers' code."""
    with torch.device("meta"):
        head = simclr_head(2048)
        assert sum(p.numel() for p in head.parameters()) == 8_659_072
        assert sum(p.numel() for p in head[:3].parameters()) == 4_198_400
        assert sum(p.numel() for p in simclr_head(4096)[:3].parameters()) == 16_785_408
        assert sum(p.numel() for p in simclr_head(512, num_layers=2).parameters()) == 512**2 + 2 * 512 + 512 * 128 + 128
        projector, predictor = byol_head(2048), byol_head(256)
        assert sum(p.numel() for p in projector.parameters()) == 2048 * 4096 + 3 * 4096 + 4096 * 256
        assert sum(p.numel() for p in predictor.parameters()) == 256 * 4096 + 3 * 4096 + 4096 * 256
    assert [name for name in head.state_dict() if name.startswith("bn3")] == [
        "bn3.weight", "bn3.running_mean", "bn3.running_var", "bn3.num_batches_tracked",
    ]  # fmt: skip


def test_simclr_s_head_equals_its_definition():
    """Catches a ReLU at the end, none before it, and a last norm that shifts."""
    head = shaken(simclr_head(6, 4))

    def slow(x):
        for index in (1, 2):
            x = x @ getattr(head, f"fc{index}").weight.T
            x = batch_norm(x, getattr(head, f"bn{index}")).clamp(min=0)
        x = x @ head.fc3.weight.T
        return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() * head.bn3.weight

    assert_same(head, slow, head, [normal(5, 6)])
    first = head(normal(5, 6))
    assert first.mean(0).abs().max() < 1e-12
    assert simclr_head(400).fc1.weight.std().item() == pytest.approx(0.01, rel=0.02)


def test_byol_s_head_equals_its_definition():
    head = shaken(byol_head(6, 8, 4))

    def slow(x):
        x = x @ head.fc1.weight.T + head.fc1.bias
        return batch_norm(x, head.bn1).clamp(min=0) @ head.fc2.weight.T

    assert_same(head, slow, head, [normal(5, 6)])
    drawn = byol_head(400, 100)
    assert (drawn.fc1.bias == 0).all()
    assert drawn.fc1.weight.std().item() == pytest.approx(0.8796 / 20, rel=0.02)


@pytest.mark.parametrize("head", [projection_head(8, 4), simclr_head(8, 4), byol_head(8, 16, 4)])
def test_the_first_three_layers_are_the_first_projection_layer(head):
    """Catches a head whose slice would end before its norm or ReLU."""
    kinds = [type(layer) for layer in head[:3]]
    assert kinds == [nn.Linear, GlobalBatchNorm, nn.ReLU]
    x = torch.randn(5, 8)
    assert torch.equal(head[:3].eval()(x), head.eval()[2](head[1](head[0](x))))
