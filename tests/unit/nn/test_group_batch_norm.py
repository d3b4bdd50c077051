"""Batch norm by groups of rows against torch's, group by group; on two ranks `tests/test_every_method.py` has it."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from fastssl.nn.norm.group_batch_norm import GroupBatchNorm
from fastssl.nn.norm.running_stats import frozen_running_stats

GROUPS = 3


def layer_and_rows(shape=(6, 4, 5, 5)):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 1
    layer = GroupBatchNorm(4, GROUPS, momentum=0.2).double()
    nn.init.normal_(layer.weight, generator=generator)
    nn.init.normal_(layer.bias, generator=generator)
    return layer, x


@pytest.mark.parametrize("shape", [(6, 4, 5, 5), (9, 4)])
def test_each_group_is_normalised_by_itself(shape):
    """Value, gradients and running statistics. Catches groups that share statistics, rows out of order, and running
    statistics that follow the last group instead of all."""
    layer, x = layer_and_rows(shape)
    y = layer(x.requires_grad_())
    got = torch.autograd.grad(y.square().sum() + y.pow(3).sum(), [x, layer.weight, layer.bias])

    plain = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(4, momentum=1.0).double()
    plain.load_state_dict(layer.state_dict())
    ys, means, variances = [], [], []
    for group in x.chunk(GROUPS):
        ys.append(plain(group))
        means.append(plain.running_mean.clone())
        variances.append(plain.running_var.clone())
    expected = torch.cat(ys)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(expected.square().sum() + expected.pow(3).sum(), [x, plain.weight, plain.bias])
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.running_mean, 0.2 * sum(means) / GROUPS, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.running_var, 0.8 + 0.2 * sum(variances) / GROUPS, rtol=1e-12, atol=1e-12)
    assert layer.num_batches_tracked == 1


def test_frozen_running_statistics_stay_and_outputs_are_the_same():
    layer, x = layer_and_rows()
    before = copy.deepcopy(layer.state_dict())
    with frozen_running_stats(layer):
        y = layer(x)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert torch.equal(y, layer(x))
    assert not torch.equal(before["running_mean"], layer.running_mean)


def test_evaluation_takes_running_statistics_of_any_number_of_rows():
    layer, x = layer_and_rows()
    layer(x)
    plain = nn.BatchNorm2d(4).double()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(x[:1]), plain.eval()(x[:1]))


def test_residual_and_relu_come_after_the_norm():
    layer, x = layer_and_rows()
    residual = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x)
    with frozen_running_stats(layer):
        (y,) = layer.lockstep([x], [residual], relu=True)
        assert torch.equal(y, (layer(x) + residual).clamp_min(0))


def test_forward_mode_equals_central_differences():
    """Catches tangents that take the groups' statistics for constants: what VAT's direction is made of."""
    layer, x = layer_and_rows()
    d = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with frozen_running_stats(layer), torch.no_grad():
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, d))).tangent.clone()
        h = 1e-5
        difference = (layer(x + h * d) - layer(x - h * d)) / (2 * h)
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-8)


def test_rows_that_are_no_whole_groups_are_refused():
    layer, x = layer_and_rows()
    with pytest.raises(ValueError, match="4 rows are no 3 groups"):
        layer(x[:4])


@pytest.mark.parametrize("shape", [(3, 4, 1, 1), (3, 4)])
def test_groups_of_one_row_are_refused(shape):
    """Its outputs would be the biases, and the running variance not a number. Rows of more pixels have a variance, and
    evaluation needs none."""
    layer, x = layer_and_rows(shape)
    with pytest.raises(ValueError, match="more than one row in a group"):
        layer(x)
    assert layer.running_var.isfinite().all() and layer.eval()(x).isfinite().all()
    layer, x = layer_and_rows((3, 4, 1, 2))
    layer(x)
    assert layer.running_var.isfinite().all()
