"""Global batch norm against `nn.BatchNorm` on the concatenated batch: one layer, resolutions in lockstep, a whole
ResNet-50 under DDP."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from fastssl import dist
from fastssl.nn.heads import prediction_head, projection_head
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.nn.norm.running_stats import frozen_running_stats
from fastssl.nn.trunks.resnet import resnet
from tests.ranks.pool import RanksFailed, run_ranks
from tests.support.message_bytes import MessageBytes
from tests.support.torch_norm import Encoder, TorchNorm1d, TorchNorm2d

SHARDS = (slice(0, 7), slice(7, 10))  # uneven on purpose
CHANNELS_LAST = torch.channels_last


@pytest.fixture(scope="module")
def two_ranks():
    """Function -> what it returned on rank 0 and on rank 1; one start of the processes serves all tests."""
    functions = (_layer_results, _far_from_zero, _layer_results_half, _frozen, _tangents, _lockstep_and_passes,
                 _one_resolution_unused, _lockstep_tangents, _saved, _other_layouts, _train_steps,
                 _messages)  # fmt: skip
    results = run_ranks(2, _call_each, functions)
    return {function: [rank[i] for rank in results] for i, function in enumerate(functions)}


def _call_each(functions):
    return [function() for function in functions]


# One layer


CASES = [(shape, dtype) for shape in ((10, 6, 5, 4), (10, 6)) for dtype in (torch.float64, torch.float32)]


def test_a_layer_equals_torch_on_the_concatenated_batch(two_ranks):
    """Catches a count that forgets uneven shards, a sum missing in backward, a weight gradient summed over ranks,
    a biased running variance, statistics that differ between ranks."""
    for case, (shape, dtype) in enumerate(CASES):
        torch_layer = nn.BatchNorm2d(6) if len(shape) == 4 else nn.BatchNorm1d(6)
        expected = _layer_result(torch_layer, shape, dtype, slice(None))
        first, second = (results[case] for results in two_ranks[_layer_results])
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        for name in ("output", "input_gradient"):
            _assert_close(torch.cat([first[name], second[name]]), expected[name], tolerance, f"{name} {shape} {dtype}")
        for name in ("weight_gradient", "bias_gradient"):
            _assert_close(first[name] + second[name], expected[name], tolerance, f"{name} {shape} {dtype}")
        for name in ("running_mean", "running_var", "eval_output"):
            _assert_close(first[name], expected[name], tolerance, f"{name} {shape} {dtype}")
            assert torch.equal(first[name], second[name])
        assert first["num_batches_tracked"] == second["num_batches_tracked"] == 1


def _layer_results():
    return [_layer_result(GlobalBatchNorm(6), shape, dtype, SHARDS[dist.rank()]) for shape, dtype in CASES]


def _layer_result(layer, shape, dtype, shard) -> dict[str, Tensor]:
    x = _normal(0, shape).mul(2).add(1).to(dtype)[shard].requires_grad_()
    layer = _with_affine(layer).to(dtype)
    output = layer(x)
    output.backward(_normal(1, shape).to(dtype)[shard])
    return {
        "output": output.detach(),
        "input_gradient": x.grad,
        "weight_gradient": layer.weight.grad,
        "bias_gradient": layer.bias.grad,
        "eval_output": layer.eval()(torch.ones_like(x[:1])).detach(),
        **dict(layer.named_buffers()),
    }


def test_a_mean_far_from_zero_does_not_cancel(two_ranks):
    """Catches sums of squares in float32: at mean 700, std 1, they leave an error of 2e-2 in the output."""
    output = torch.cat(two_ranks[_far_from_zero])
    x = _normal(2, (10, 4, 9, 9)).add(700).float().double()
    expected = F.batch_norm(x, None, None, training=True)
    assert (output - expected).abs().max() < 2e-4  # float32 holds 700 to 6e-5


def _far_from_zero():
    return GlobalBatchNorm(4)(_normal(2, (10, 4, 9, 9)).add(700).float()[SHARDS[dist.rank()]]).detach()


HALF = (torch.bfloat16, torch.float16)


def test_half_precision_keeps_its_statistics_in_float32(two_ranks):
    """Catches statistics or weight gradients rounded to half precision, and an output or gradient that is not."""
    for case, dtype in enumerate(HALF):
        ranks = [results[case] for results in two_ranks[_layer_results_half]]
        x = _normal(0, (10, 6, 5, 4)).mul(2).add(1).to(dtype).double().requires_grad_()
        layer = _with_affine(nn.BatchNorm2d(6)).double()
        output = layer(x)
        output.backward(_normal(1, (10, 6, 5, 4)).to(dtype).double())
        assert ranks[0]["output"].dtype == ranks[0]["input_gradient"].dtype == dtype
        rounding = torch.finfo(dtype).eps
        _assert_close(torch.cat([r["output"] for r in ranks]), output.detach(), rounding, "output")
        _assert_close(torch.cat([r["input_gradient"] for r in ranks]), x.grad, rounding, "input gradient")
        _assert_close(ranks[0]["running_mean"], layer.running_mean, 1e-6, "running mean")
        _assert_close(ranks[0]["running_var"], layer.running_var, 1e-6, "running variance")
        _assert_close(sum(r["weight_gradient"] for r in ranks), layer.weight.grad, 1e-5, "weight gradient")


def _layer_results_half():
    return [_layer_result_half(dtype) for dtype in HALF]


def _layer_result_half(dtype):
    shard = SHARDS[dist.rank()]
    x = _normal(0, (10, 6, 5, 4)).mul(2).add(1).to(dtype)[shard].requires_grad_()
    layer = _with_affine(GlobalBatchNorm(6))
    output = layer(x)
    output.backward(_normal(1, (10, 6, 5, 4)).to(dtype)[shard])
    return {
        "output": output.detach(),
        "input_gradient": x.grad,
        "weight_gradient": layer.weight.grad,
        **dict(layer.named_buffers()),
    }


def test_an_empty_shard_is_refused():
    """Catches the mean of no rows, NaN, spreading to all ranks."""
    with pytest.raises(RanksFailed, match="ValueError: empty batch on this rank"):
        run_ranks(2, _empty_on_the_second)


def _empty_on_the_second():
    GlobalBatchNorm(3)(torch.ones(2 - 2 * dist.rank(), 3))


def test_frozen_running_stats_across_ranks(two_ranks):
    """Catches a throw-away pass that moves running statistics, or one that normalises with them."""
    for frozen, counted, before, after, tracked in two_ranks[_frozen]:
        assert torch.equal(frozen, counted)
        assert torch.equal(before, torch.zeros(6))
        assert after.abs().min() > 0
        assert tracked == 1


def _frozen():
    layer = GlobalBatchNorm(6)
    x = _normal(0, (10, 6, 5, 4)).add(1).float()[SHARDS[dist.rank()]]
    with frozen_running_stats(layer):
        frozen = layer(x).detach()
    before = layer.running_mean.clone()
    counted = layer(x).detach()
    return frozen, counted, before, layer.running_mean, layer.num_batches_tracked


def test_forward_mode_derivative(two_ranks):
    """Catches tangents of the statistics that are left out or stay on their rank, and a tangent of the weight that is
    lost."""
    ranks = two_ranks[_tangents]
    alone, alone_differences = _tangents()
    for tangent, differences in ranks:
        _assert_close(tangent, differences, 1e-7, "jvp against finite differences")
    _assert_close(alone, alone_differences, 1e-7, "alone")
    _assert_close(torch.cat([tangent for tangent, _ in ranks]), alone, 1e-12, "two ranks against one")


def _tangents():
    shard = _shard()
    layer = _with_affine(GlobalBatchNorm(6)).double()
    primals = _normal(0, (10, 6, 5, 4))[shard], layer.weight.detach(), layer.bias.detach()
    tangents = _normal(1, (10, 6, 5, 4))[shard], _normal(2, (6,)), _normal(3, (6,))

    def normalise(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, x)

    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(primal, tangent) for primal, tangent in zip(primals, tangents, strict=True)]
        jvp = forward_ad.unpack_dual(normalise(*duals)).tangent
    h = 1e-5
    ahead, behind = (normalise(*(p + sign * h * t for p, t in zip(primals, tangents, strict=True))) for sign in (1, -1))
    return jvp, (ahead - behind) / (2 * h)


# Several resolutions in lockstep, with residual and ReLU


def test_lockstep_is_as_many_passes(two_ranks):
    """Catches statistics that merge over resolutions, running statistics in another order, a residual or a ReLU's mask
    that backward forgets. Alone, to the bit."""
    lockstep, passes = _lockstep_and_passes()
    for name, expected in passes.items():
        assert torch.equal(lockstep[name], expected), name
    for lockstep, passes in two_ranks[_lockstep_and_passes]:
        assert lockstep["num_batches_tracked"] == passes["num_batches_tracked"] == 2
        for name, expected in passes.items():
            _assert_close(lockstep[name], expected, 1e-12, name)


def _lockstep_and_passes():
    def passes(layer, xs, residuals):
        return [(layer(x) + residual).clamp(min=0) for x, residual in zip(xs, residuals, strict=True)]

    return _result_of_two(_lockstep), _result_of_two(passes)


def _lockstep(layer, xs, residuals):
    return layer.lockstep(xs, residuals, relu=True)


def _two(seed):
    """Of this rank: two resolutions, channels-last."""
    return [
        _normal(seed + i, (10, 6, size, size))[_shard()].to(memory_format=CHANNELS_LAST)
        for i, size in enumerate((5, 3))
    ]


def _result_of_two(function, used=(0, 1)) -> dict[str, Tensor]:
    """`function(layer, xs, residuals)` with outputs, running statistics and, of the outputs in use, all gradients."""
    layer = _with_affine(GlobalBatchNorm(6)).double()
    operands = [x.mul(3).add(1).requires_grad_() for x in _two(10)], [r.clone().requires_grad_() for r in _two(20)]
    ys = function(layer, *operands)
    torch.autograd.backward([ys[i] for i in used], [_two(30)[i] for i in used])
    xs, residuals = operands
    return {
        **{f"y{i}": y.detach() for i, y in enumerate(ys)},
        **{f"dx{i}": x.grad for i, x in enumerate(xs)},
        **{f"dr{i}": residual.grad for i, residual in enumerate(residuals)},
        "weight_gradient": layer.weight.grad,
        "bias_gradient": layer.bias.grad,
        **dict(layer.named_buffers()),
    }


def test_a_resolution_that_the_loss_leaves_out(two_ranks):
    """Catches a backward pass that needs a gradient of every output."""
    for used, alone in two_ranks[_one_resolution_unused]:
        for name in ("dx0", "dr0", "weight_gradient", "bias_gradient"):
            _assert_close(used[name], alone[name], 1e-12, name)
        assert not used["dx1"].any() and not used["dr1"].any()


def _one_resolution_unused():
    def only_first(layer, xs, residuals):
        return layer.lockstep(xs[:1], residuals[:1], relu=True)

    return [_result_of_two(function, used=(0,)) for function in (_lockstep, only_first)]


def test_forward_mode_derivative_in_lockstep(two_ranks):
    """Catches tangents of the residual that are lost, or not cut where ReLU cuts."""
    ranks = two_ranks[_lockstep_tangents]
    alone, alone_differences = _lockstep_tangents()
    for i in (0, 1):
        for tangents, differences in ranks:
            _assert_close(tangents[i], differences[i], 1e-7, "jvp against finite differences")
        _assert_close(alone[i], alone_differences[i], 1e-7, "alone")
        _assert_close(torch.cat([tangents[i] for tangents, _ in ranks]), alone[i], 1e-12, "two ranks against one")


def _lockstep_tangents():
    layer = _with_affine(GlobalBatchNorm(6)).double()
    primals, tangents = [*_two(10), *_two(20)], [*_two(30), *_two(40)]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(primal, tangent) for primal, tangent in zip(primals, tangents, strict=True)]
        jvps = [forward_ad.unpack_dual(y).tangent for y in _lockstep(layer, duals[:2], duals[2:])]
    h = 1e-6
    ahead, behind = (
        _lockstep(layer, *torch.utils._pytree.tree_map(torch.detach, (moved[:2], moved[2:])))
        for sign in (1, -1)
        for moved in [[p + sign * h * t for p, t in zip(primals, tangents, strict=True)]]
    )
    return [jvp.detach() for jvp in jvps], [(a - b).detach() / (2 * h) for a, b in zip(ahead, behind, strict=True)]


def test_backward_keeps_x_and_y_only(two_ranks):
    """Catches a residual, a mask or x_hat kept for backward: each is an activation more."""
    for saved, x, y in two_ranks[_saved]:
        assert saved == x + y


def _saved():
    xs, residuals = _two(10), _two(20)
    storages = {}

    def keep(t):
        if t.dim() == 4:
            storages[t.untyped_storage().data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        ys = _lockstep(GlobalBatchNorm(6).double(), xs, [r.requires_grad_() for r in residuals])
    return sum(storages.values()), sum(x.nbytes for x in xs), sum(y.nbytes for y in ys)


def test_channels_last_stays(two_ranks):
    """Catches an output or a gradient in another layout than its input's, which the next convolution would copy."""
    assert [_other_layouts(), *two_ranks[_other_layouts]] == [[], [], []]


def _other_layouts():
    """Of two resolutions through a ResNet-50: what convolutions take, return or get back in another layout."""
    layouts = {}
    for dtype in (torch.float32, torch.bfloat16):

        def watch(convolution, args, out, dtype=dtype):
            def note(what, x):
                layouts[dtype, convolution, len(args[0][0, 0]), what] = x.is_contiguous(memory_format=CHANNELS_LAST)

            note("input", args[0])
            note("output", out)
            out.register_hook(lambda g: note("gradient", g))

        net = resnet(50, base_width=4).to(memory_format=CHANNELS_LAST)
        for convolution in (module for module in net.modules() if isinstance(module, nn.Conv2d)):
            convolution.register_forward_hook(watch)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            xs = [_normal(7, (2, 3, size, size)).float().to(memory_format=CHANNELS_LAST) for size in (64, 80)]
            sum(z.float().square().sum() for z in net.lockstep(xs)).backward()
    assert len(layouts) == 2 * 53 * 2 * 3
    return [str(key) for key, is_channels_last in layouts.items() if not is_channels_last]


# ResNet-50 with both heads, two resolutions, a loss across ranks


SUPPORTS, LARGE, SMALL = 6, 6, 12  # rows per rank
SHIFTS_AHEAD_OF_BATCH_NORM = {  # their gradient is zero, up to rounding
    "projection.fc1.bias", "projection.fc2.bias", "projection.fc3.bias", "prediction.bn1.bias", "prediction.fc1.bias",
}  # fmt: skip


def test_resnet50_on_two_ranks_equals_one_process(two_ranks):
    """Catches any factor W, any statistic of one rank alone, a message out of order, a pass merged with the other.

    In float32, gradients of a whole ResNet are no finer than its ReLUs' signs: what a change of the inputs in their
    last bit does to them is the measure there.
    """
    ranks = two_ranks[_train_steps]
    for result in (0, 1):
        assert torch.equal(ranks[0][result]["gradient"]["trunk.conv1.weight"],
                           ranks[1][result]["gradient"]["trunk.conv1.weight"])  # fmt: skip

    double, expected = ranks[0][0], _one_process(torch.float64)
    assert _distance((ranks[0][0]["losses"] + ranks[1][0]["losses"]) / 2, expected["losses"]) < 1e-9
    for name, gradient in expected["gradient"].items():
        if name in SHIFTS_AHEAD_OF_BATCH_NORM:
            assert max(double["gradient"][name].abs().max(), gradient.abs().max()) < 1e-9
        else:
            assert _distance(double["gradient"][name], gradient) < 1e-9, name
    for name, buffer in expected["buffers"].items():
        assert _distance(double["buffers"][name], buffer) < 1e-9, name

    single, expected = ranks[0][1], _one_process(torch.float32)
    nudged = _one_process(torch.float32, scale=1 + 1e-7)
    assert _distance((ranks[0][1]["losses"] + ranks[1][1]["losses"]) / 2, expected["losses"]) < 1e-5
    assert _distance(_flat(single["buffers"]), _flat(expected["buffers"])) < 1e-5
    sensitivity = _distance(_flat(nudged["gradient"]), _flat(expected["gradient"]))
    assert _distance(_flat(single["gradient"]), _flat(expected["gradient"])) < 3 * sensitivity


def _train_steps():
    results = []
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        net = DistributedDataParallel(Encoder(GlobalBatchNorm, GlobalBatchNorm).to(dtype), broadcast_buffers=False)
        large, small, targets, labels = _rows(dtype)
        own = dist.rank()
        z = net(large[own], small[own])
        losses = _losses(z, targets[own], labels)
        losses.sum().backward()
        results.append(_snapshot(net.module, losses))
    return results


def _one_process(dtype, scale=1.0):
    torch.manual_seed(0)
    net = Encoder(TorchNorm2d, TorchNorm1d).to(dtype)
    large, small, targets, labels = _rows(dtype)
    # supports of both ranks, then anchors of both: the order that one process knows
    x_large = torch.cat([large[:, :SUPPORTS].flatten(0, 1), large[:, SUPPORTS:].flatten(0, 1)])
    t = torch.cat([targets[:, :LARGE].flatten(0, 1), targets[:, LARGE:].flatten(0, 1)])
    losses = _losses(net(x_large * scale, small.flatten(0, 1) * scale), t, labels)
    losses.sum().backward()
    return _snapshot(net, losses)


def _losses(z, targets_NK, labels_SK):
    """Soft nearest neighbours among all ranks' supports, and the entropy of all ranks' mean prediction."""
    num_supports = len(labels_SK) // dist.world_size()
    z = F.normalize(z)
    supports = dist.gather_rows(z[:num_supports])
    p = torch.softmax(z[num_supports:] @ supports.T / 0.5, dim=1) @ labels_SK
    mean = dist.mean_over_ranks(p.mean(0))
    return torch.stack([-(targets_NK * p.log()).sum(1).mean(), (mean * mean.log()).sum()])


def _rows(dtype):
    """Per rank: large images [2, ...] (supports first), small images, targets; and all supports' labels."""
    large = _normal(4, (2, SUPPORTS + LARGE, 3, 48, 48))
    small = _normal(5, (2, SMALL, 3, 32, 32))
    targets = _normal(6, (2, LARGE + SMALL, 3)).mul(2).softmax(2)
    labels = F.one_hot(torch.arange(2 * SUPPORTS) % 3, 3).mul(0.9).add(1 / 30)
    return tuple(t.to(dtype) for t in (large, small, targets, labels))


def _snapshot(net, losses):
    return {
        "losses": losses.detach(),
        "gradient": {name: parameter.grad for name, parameter in net.named_parameters()},
        "buffers": {name: b for name, b in net.named_buffers() if b.is_floating_point()},
    }


def test_one_message_a_layer_each_way_for_both_resolutions(two_ranks):
    """Catches a message per resolution, a second collective in a layer, and messages that grow with the batch."""
    channels = _channels(Encoder(GlobalBatchNorm, GlobalBatchNorm))
    for forward, backward, groups, operators in two_ranks[_messages]:
        assert groups == {"statistics"}, "in a group of their own, which DDP's buckets do not share"
        assert not any("var_mean" in name for name in operators), "30 times as slow as it must be on a CPU"
        assert forward == [8 * 2 * (2 * c + 1) for c in channels]
        assert sorted(backward) == sorted(8 * 2 * 2 * c for c in channels)
        assert len(forward) + len(backward) == 114
        assert sum(forward) + sum(backward) == _statistics_bytes(channels)
    with torch.device("meta"):
        full = [resnet(50), projection_head(2048, 2048), prediction_head(2048)]
    channels = [c for module in full for c in _channels(module)]
    assert sum(channels) == 33_216
    assert _statistics_bytes(channels) == 2_126_736


def _statistics_bytes(channels):
    """Of a step with two resolutions: float64 sums and sums of squares of each channel and a count each forward, two
    sums each backward."""
    return 8 * 2 * (4 * sum(channels) + len(channels))


def _channels(net):
    return [module.num_features for module in net.modules() if isinstance(module, GlobalBatchNorm)]


def _messages():
    net = Encoder(GlobalBatchNorm, GlobalBatchNorm)
    large, small, _, _ = (t[dist.rank()] for t in _rows(torch.float32))
    with MessageBytes() as forward:
        z = net(large, small)
    with MessageBytes() as backward:
        z.square().sum().backward()
    groups = {
        "statistics" if group == dist.statistics_group().group_name else group
        for group in forward.groups | backward.groups
    }
    return forward.messages, backward.messages, groups, forward.operators | backward.operators


# Helpers


def _normal(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _shard():
    """This rank's rows of ten; alone, all."""
    return SHARDS[dist.rank()] if dist.world_size() > 1 else slice(None)


def _with_affine(layer):
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 2, 6))
        layer.bias.copy_(torch.linspace(3, -2, 6))
    return layer


def _flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def _distance(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def _assert_close(actual, expected, tolerance, name):
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"{name}: {error:.2e}"
