"""Trunks, heads and batch norm in one process."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastssl.nn.encoders.resnet import ResNet
from fastssl.nn.encoders.wide_resnet import WideResNet
from fastssl.nn.heads import prediction_head, projection_head
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.nn.norm.lockstep import LockstepSequential
from fastssl.nn.norm.passes import affine
from fastssl.nn.norm.running_stats import frozen_running_stats
from fastssl.nn.trunks.resnet import resnet
from fastssl.nn.trunks.wide_resnet import wide_resnet


@pytest.mark.parametrize(
    ("encoder", "out_features", "trunk", "projection", "prediction", "total"),
    [  # PAWS's networks, counted in the authors' code
        (WideResNet(28, 2), 128, 1_468_352, 50_048, 0, 1_518_400),
        (ResNet(50), 2048, 23_508_032, 12_597_248, 2_104_832, 38_210_112),
        (ResNet(50, width=2), 4096, 93_907_072, 50_360_320, 8_403_968, 152_671_360),
        (ResNet(50, width=4), 8192, 375_378_176, 201_383_936, 33_585_152, 610_347_264),
    ],
)
def test_parameter_counts(encoder, out_features, trunk, projection, prediction, total):
    """Catches a missing bias or shortcut, a width that spares the stem, a head of another shape."""
    with torch.device("meta"):
        net = encoder.build()
        heads = [projection_head(net.num_features, out_features)]
        if prediction:
            heads.append(prediction_head(out_features))
    counts = [sum(p.numel() for p in module.parameters()) for module in (net, *heads)]
    assert counts == [trunk, projection, prediction][: len(counts)]
    assert sum(counts) == total


@pytest.mark.parametrize(
    ("depth", "parameters"),  # torchvision's counts without fc
    [(18, 11_176_512), (34, 21_284_672), (101, 42_500_160), (152, 58_143_808)],
)
def test_parameter_counts_of_other_depths(depth, parameters):
    with torch.device("meta"):
        assert sum(p.numel() for p in resnet(depth).parameters()) == parameters


def test_resnet_keys_are_torchvision_s():
    """Catches names under which published checkpoints and exports would not match."""
    with torch.device("meta"):
        keys = list(resnet(50).state_dict())
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    assert keys[:6] == ["conv1.weight", *(f"bn1.{name}" for name in norm)]
    assert [k for k in keys if k.startswith("layer1.0.")] == [
        f"layer1.0.{name}"
        for i in (1, 2, 3)
        for name in (f"conv{i}.weight", *(f"bn{i}.{n}" for n in norm))
    ] + ["layer1.0.downsample.0.weight", *(f"layer1.0.downsample.1.{name}" for name in norm)]  # fmt: skip
    assert sum("downsample.0" in k for k in keys) == 4
    assert len(keys) == 318  # torchvision's resnet50 has these and fc's two


def test_resnet_strides_in_the_3x3_and_starts_as_paws_does():
    """Catches the stride in the 1x1, fan-in initialisation, and batch norms that start at 0."""
    torch.manual_seed(0)
    net = resnet(50)
    assert net.layer2[0].conv1.stride == (1, 1) and net.layer2[0].conv2.stride == (2, 2)
    conv = net.layer4[0].conv2  # fan-out 9 * 512
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)
    assert net.layer4[0].conv3.weight.std().item() == pytest.approx((2 / 2048) ** 0.5, rel=0.01)
    assert all((m.weight == 1).all() and (m.bias == 0).all() for m in net.modules() if isinstance(m, GlobalBatchNorm))


@pytest.mark.parametrize(
    ("stem", "size", "last"), [("imagenet", 64, 2), ("cifar", 32, 4), ("cifar", 18, 3), ("cifar", 8, 1)]
)
def test_resnet_resolution(stem, size, last):
    """Catches a stem that strides where it must not."""
    net = ResNet(10, stem=stem, base_width=8).build(in_channels=1)
    shapes = []
    net.layer4[-1].conv2.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    assert net(torch.randn(2, 1, size, size)).shape == (2, net.num_features) == (2, 64)
    assert shapes == [(2, 64, last, last)]


def test_a_bottleneck_equals_its_definition():
    """Catches a lost ReLU, a shortcut taken after it, an in-place write into the shortcut's operand."""
    torch.manual_seed(0)
    net = resnet(50, base_width=4).double()
    block, x = net.layer2[0], torch.randn(3, 16, 6, 6, dtype=torch.float64)

    def norm(y):
        return F.batch_norm(y, None, None, training=True)

    expected = norm(F.conv2d(x, block.conv1.weight)).clamp(min=0)
    expected = norm(F.conv2d(expected, block.conv2.weight, stride=2, padding=1)).clamp(min=0)
    expected = norm(F.conv2d(expected, block.conv3.weight))
    expected = (expected + norm(F.conv2d(x, block.downsample[0].weight, stride=2))).clamp(min=0)
    assert (block(x) - expected).abs().max() < 1e-12


def test_a_wide_block_equals_its_definition():
    """Catches the stride on the first convolution, a shortcut of the activated x, an in-place ReLU on x."""
    torch.manual_seed(0)
    net = wide_resnet(10, 1).double()
    block, x = net.layer2[0], torch.randn(3, 16, 6, 6, dtype=torch.float64)
    (c1, c2, cut), before = (block.conv1, block.conv2, block.shortcut), x.clone()

    def relu_norm(y):
        return F.batch_norm(y, None, None, training=True).clamp(min=0)

    expected = F.conv2d(relu_norm(x), c1.weight, c1.bias, padding=1)
    expected = F.conv2d(relu_norm(expected), c2.weight, c2.bias, stride=2, padding=1)
    expected = expected + F.conv2d(x, cut.weight, cut.bias, stride=2)
    assert (block(x) - expected).abs().max() < 1e-12
    assert torch.equal(x, before)


def test_wide_resnet_layout():
    """Catches a final batch norm without PAWS's momentum, and shortcuts where the shape stays."""
    net = wide_resnet(28, 2)
    assert [len(group) for group in (net.layer1, net.layer2, net.layer3)] == [4, 4, 4]
    assert [isinstance(block.shortcut, nn.Conv2d) for block in net.layer2] == [True, False, False, False]
    assert {m.momentum for name, m in net.named_modules() if isinstance(m, GlobalBatchNorm) and name != "bn1"} == {0.1}
    assert net.bn1.momentum == 0.99
    assert net(torch.randn(2, 3, 18, 18)).shape == (2, net.num_features) == (2, 128)
    with pytest.raises(ValueError, match="6k"):
        wide_resnet(27)


def test_names_tell_what_is_decayed():
    """Catches a batch norm under a name that weight decay would take for a weight (the shortcuts' excepted)."""
    for module in (resnet(10, base_width=8), wide_resnet(10, 1), projection_head(8, 8), prediction_head(8)):
        norms = {f"{name}.weight" for name, m in module.named_modules() if isinstance(m, GlobalBatchNorm)}
        for name, parameter in module.named_parameters():
            decayed = "bias" not in name and "bn" not in name
            assert decayed == (parameter.dim() > 1) or (name in norms and name.endswith("downsample.1.weight")), name


@pytest.mark.parametrize("shape", [(8, 5, 4, 4), (8, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_norm_alone_is_torch_s(shape, dtype):
    """Catches a world of one that pays for sums, or updates other statistics than torch: equal to the bit."""
    torch.manual_seed(0)
    x, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    results = []
    for layer in (GlobalBatchNorm(5), nn.BatchNorm2d(5) if len(shape) == 4 else nn.BatchNorm1d(5)):
        own = x.clone().requires_grad_()
        output = layer(own)
        output.backward(g)
        evaluated = layer.eval()(x)
        results.append([output, own.grad, layer.weight.grad, layer.bias.grad, evaluated, *layer.buffers()])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_normalising_asks_no_release_of_torch_for_an_eps_of_zero(monkeypatch):
    """torch 2.10 and 2.11 refuse it in `F.batch_norm`: statistics of several ranks or virtual cores would not train."""

    def as_in_2_10(*args, eps=1e-5, **kwargs):
        assert eps > 0, "batch_norm eps must be positive"

    monkeypatch.setattr(F, "batch_norm", as_in_2_10)
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    scale_C, shift_C = torch.randn(2, 3, dtype=torch.float64)
    expected = x * scale_C.view(3, 1, 1) + shift_C.view(3, 1, 1)
    assert torch.allclose(affine(x, scale_C, shift_C, None, False), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_compiled_norm_ends_in_no_conversion_of_nothing(dtype):
    """torch 2.11.0 gives every weight below such a one a gradient of zero."""
    x, one_C = torch.randn(4, 3, 2, 2, dtype=dtype), torch.ones(3, dtype=torch.promote_types(dtype, torch.float32))
    graphs = []

    def seen(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_method"])
        return graph

    y = torch.compile(lambda x: affine(x, one_C, one_C, None, False), backend=seen, fullgraph=True)(x)
    assert y.dtype == dtype
    assert graphs[0].count("to") == (1 if dtype != one_C.dtype else 0) + 1  # the other one converts x: see `affine`


@pytest.mark.parametrize("training", (True, False))
def test_a_sequence_in_lockstep_is_as_many_passes(training):
    """Catches a ReLU that is lost, done twice or taken by the wrong norm, and layers out of order. To the bit."""
    torch.manual_seed(0)
    inner = LockstepSequential(nn.Linear(6, 6), GlobalBatchNorm(6))
    layers = nn.Linear(5, 6), nn.ReLU(), GlobalBatchNorm(6), nn.ReLU(), inner, nn.ReLU(), nn.Linear(6, 3)
    net, xs = LockstepSequential(*layers).train(training), [torch.randn(8, 5), torch.randn(4, 5)]
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    lockstep, running = net.lockstep(xs), [buffer.clone() for buffer in net.buffers()]
    net.load_state_dict(state)
    for x, y in zip(xs, lockstep, strict=True):
        for layer in (*layers[:4], *inner, *layers[5:]):
            x = layer(x)
        assert torch.equal(y, x)
    assert all(torch.equal(a, b) for a, b in zip(running, net.buffers(), strict=True))
    assert LockstepSequential()(xs[0]) is xs[0]


def test_batch_norm_keys_are_torch_s():
    assert list(GlobalBatchNorm(3).state_dict()) == list(nn.BatchNorm2d(3).state_dict())
    assert list(GlobalBatchNorm(3, affine=False).state_dict()) == list(nn.BatchNorm2d(3, affine=False).state_dict())


def test_frozen_running_stats():
    """Catches a pass that counts, one that normalises with running statistics, and a freeze that outlasts an error."""
    torch.manual_seed(0)
    net = nn.Sequential(GlobalBatchNorm(3), nn.Linear(3, 2), GlobalBatchNorm(2))
    x = torch.randn(6, 3) + 5
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    with pytest.raises(ZeroDivisionError), frozen_running_stats(net):
        frozen = net(x)
        1 / 0  # noqa: B018
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    assert torch.equal(net(x), frozen)
    assert net[2].num_batches_tracked == 1 and not torch.equal(net[0].running_mean, before["0.running_mean"])
    with pytest.raises(TypeError, match="BatchNorm1d"), frozen_running_stats(nn.BatchNorm1d(3)):
        pass


def test_wrong_inputs_are_refused():
    layer = GlobalBatchNorm(3)
    for shape in ((2, 4), (2, 3, 4), (4, 4, 3, 3)):
        with pytest.raises(ValueError, match=r"expected \[N, 3\]"):
            layer(torch.ones(shape))
    with pytest.raises(ValueError, match="empty batch"):
        layer.lockstep([torch.ones(2, 3), torch.ones(0, 3)])
    with pytest.raises(ValueError, match="more than one row"):
        layer(torch.ones(1, 3, 1, 1))
    with pytest.raises(ValueError, match=r"torch.bfloat16 .*2, 3.* added to the norm of torch.float32"):
        layer.lockstep([torch.ones(2, 3)], [torch.ones(2, 3).bfloat16()])
    with pytest.raises(ValueError, match="shorter"):
        layer.lockstep([torch.ones(2, 3)] * 2, [torch.ones(2, 3)])
    assert layer.num_batches_tracked == 0
    with pytest.raises(ValueError, match="no ResNet of depth 49"):
        resnet(49)
    with pytest.raises(ValueError, match='no stem "Cifar"'):
        resnet(18, stem="Cifar")
