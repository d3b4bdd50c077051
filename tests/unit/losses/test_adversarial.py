"""VAT's perturbation: its direction against double backward in float64, its length, and the noise it starts from."""

import pytest
import torch
from torch import nn

from fastssl.losses.adversarial import (
    curvature_product,
    difference_product,
    divergence,
    full_float32,
    unit,
    unit_unless_small,
)
from fastssl.losses.keyed_draws import normals
from fastssl.nn.encoders.resnet import S4lResNet
from fastssl.nn.norm.group_batch_norm import GroupBatchNorm
from fastssl.nn.norm.running_stats import frozen_running_stats

IMAGES = 8


class Tiny(nn.Module):
    """A pre-activation network of 49 convolutions in training mode, and a classifier of ten classes."""

    def __init__(self, norm=None):
        super().__init__()
        encoder = S4lResNet(50, stem="cifar", base_width=4)
        self.trunk = encoder.build(3) if norm is None else encoder.build(3, norm)
        self.fc = nn.Linear(self.trunk.num_features, 10)

    def forward(self, x):
        return self.fc(self.trunk(x))


@pytest.fixture(scope="module")
def setting():
    """(network in float32, images in [-1, 1], unit noise, H d in float64 by double backward)."""
    torch.manual_seed(0)
    net = Tiny()
    x = torch.rand(IMAGES, 3, 32, 32) * 2 - 1
    d = unit(torch.randn(x.shape))
    return net, x, d, twice_differentiated(net, x, d)


def twice_differentiated(net, x, d):
    """The derivative along d, at r = 0, of the gradient of sum KL(p(x + r) || p(x)) with respect to r."""
    net.double()
    with frozen_running_stats(net):
        r = torch.zeros_like(x, dtype=torch.float64, requires_grad=True)
        kl = divergence(net(x.double() + r), net(x.double()).detach()).sum()
        (gradient,) = torch.autograd.grad(kl, r, create_graph=True)
        assert gradient.norm() < 1e-9  # at its least
        (product,) = torch.autograd.grad((gradient * d).sum(), r)
    net.float()
    return product


def cosines(one, other):
    return (unit(one.double()) * unit(other.double())).flatten(1).sum(dim=1)


def test_the_exact_product_is_the_second_derivative(setting):
    """In float64 to rounding; in float32, as it is used, every image's direction to a cosine of 0.9999. Catches p
    without its mean taken off, a Jacobian that takes batch statistics for constants, and J d in place of J' S J d."""
    net, x, d, expected = setting
    with frozen_running_stats(net):
        in_double = curvature_product(net.double(), x.double(), d.double())
        in_float = curvature_product(net.float(), x, d)
    assert ((in_double - expected).norm() / expected.norm()).item() < 1e-9
    assert in_float.dtype == torch.float32 and not in_float.requires_grad
    assert cosines(in_float, expected).min() > 0.9999


def test_the_published_step_is_below_the_resolution_of_float32(setting):
    """The quotient is right in float64 at the release's step of 1e-6, and in float32 at 1e-3. In float32 at 1e-6 it
    points anywhere: this is why it is not the default."""
    net, x, d, expected = setting
    with frozen_running_stats(net):
        in_double = difference_product(net.double(), x.double(), d.double(), xi=1e-6)
        coarse, fine = (difference_product(net.float(), x, d, xi=xi) for xi in (1e-3, 1e-6))
    assert cosines(in_double, expected).min() > 0.9999
    assert cosines(coarse, expected).min() > 0.98
    assert cosines(fine, expected).mean() < 0.3


def test_products_leave_running_statistics_and_gradients_alone(setting):
    """Catches a search for the direction that counts as training."""
    net, x, d, _ = setting
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with frozen_running_stats(net):
        curvature_product(net, x, d)
        difference_product(net, x, d, xi=1e-3)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_groups_do_not_see_each_other():
    """With batch norm by groups, other images in the second group change nothing in the first."""
    torch.manual_seed(0)
    net = Tiny(lambda features: GroupBatchNorm(features, 2)).double()
    x, d = torch.rand(IMAGES, 3, 8, 8).double(), torch.randn(IMAGES, 3, 8, 8).double()
    others = torch.cat([x[: IMAGES // 2], x[IMAGES // 2 :] * 0.5])
    with frozen_running_stats(net):
        one, other = curvature_product(net, x, d), curvature_product(net, others, d)
    half = IMAGES // 2
    torch.testing.assert_close(one[:half], other[:half], rtol=1e-9, atol=1e-15)
    assert not torch.allclose(one[half:], other[half:])


def test_unit_length_of_what_underflows_when_it_is_squared():
    """Gradients of 1e-25 have length 1 like any other; those of zeros stay zeros, no NaN. The release's form leaves
    what is shorter than 1e-6 short."""
    x = torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    tiny = x * torch.tensor([1.0, 1e-25, 0.0]).view(3, 1, 1, 1)
    lengths = unit(tiny).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(unit(tiny)[1], unit(x)[1])
    short = unit(x) * torch.tensor([1.0, 1e-6, 1e-9]).view(3, 1, 1, 1)
    lengths = unit_unless_small(short).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([1.0, 1.0, 1e-3]), rtol=1e-3, atol=0)


def test_full_float32_switches_autocast_off_and_puts_everything_back():
    x = torch.ones(2, 2)
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with full_float32(x.device):
                assert (x @ x).dtype == torch.float32
                assert torch.get_float32_matmul_precision() == "highest"
            assert (x @ x).dtype == torch.bfloat16
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_keyed_normals_are_normal_and_each_image_s_own():
    """Moments of 100,000 draws within four standard errors, and no correlation between images or with neighbours.
    Catches sine and cosine that are not independent, and noise that depends on who else is in the batch."""
    keys = torch.arange(100) * 7919
    draws = normals(keys, 1, 1001)
    assert draws.dtype == torch.float32 and draws.shape == (100, 1001)
    z = draws.double()
    n = z.numel()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(z.pow(power).mean() - mean) < 4 * (variance / n) ** 0.5, power
    for one, other in ((z[:, :500], z[:, 501:]), (z[:, 1:], z[:, :-1]), (z[1:], z[:-1])):
        assert abs((one * other).mean()) < 4 / one.numel() ** 0.5
    assert torch.equal(normals(keys[30:32], 1, 1001), draws[30:32])
    assert not torch.equal(normals(keys[:1], 2, 1001), draws[:1])
