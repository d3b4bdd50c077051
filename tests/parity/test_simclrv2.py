"""SimCLRv2's loss and its memory against loop-by-loop float64 transcriptions, value and gradient; its schedule, its
tensors and its crops against what the paper and the authors' code say."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastssl.errors import ConfigError
from fastssl.methods.base import Facts, Horizon, Nets, Steps
from fastssl.methods.simclrv2 import KeyMemory, Memory, Simclrv2Config, contrast, momentum_nt_xent, nt_xent
from fastssl.nn.encoders.resnet import SimclrResNet
from fastssl.optim.rates import peak_rate
from fastssl.recipes.resolve import resolve
from loaders.plan.boxes import boxes
from loaders.plan.draws import mix
from loaders.plan.ops import Flip, GaussianKernelBlur, Grayscale, TfColourJitter
from loaders.plan.views import UNIT, Filter, View, Whole

IMAGES, WIDTH, TAU = 3, 5, 0.2


def views(seed=0, images=IMAGES, width=WIDTH):
    """Two float64 views that ask for gradients."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, width, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]


def unit(row):
    """The authors': times the inverse root of the squares' sum, which counts as 1e-12 at least."""
    return row * torch.rsqrt(sum(value * value for value in row).clamp_min(1e-12))


def slow_anchor(query, positive, negatives, tau):
    """-log of the positive's share among all."""
    weights = [torch.exp(unit(query) @ unit(key) / tau) for key in (positive, *negatives)]
    return -torch.log(weights[0] / sum(weights))


def slow_nt_xent(z1, z2, tau):
    """The mean over 2N anchors."""
    rows = [*z1, *z2]
    total = 0.0
    for i, query in enumerate(rows):
        partner = (i + len(z1)) % len(rows)
        negatives = [key for j, key in enumerate(rows) if j not in (i, partner)]
        total = total + slow_anchor(query, rows[partner], negatives, tau)
    return total / len(rows)


def assert_same(value, expected, leaves):
    """Value to 1e-12, gradients to 1e-9."""
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    got, wanted = (torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (value, expected))
    assert all((g - w).norm() < 1e-9 * w.norm() for g, w in zip(got, wanted, strict=True))


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_nt_xent_is_twice_the_mean_over_anchors(tau):
    """Catches a row contrasted with itself, a partner that is a negative too, one direction left out, rows not
    normalised, and the factor 2 of the authors' code lost (which LARS would hide)."""
    z1, z2 = views()
    assert_same(nt_xent(z1, z2, tau=tau), 2 * slow_nt_xent(z1, z2, tau), [z1, z2])


def test_rows_without_length_are_the_authors():
    """Catches NaN for a dead network's zeros, and another least length than 1e-6."""
    z1, z2 = (z.detach() for z in views())
    z1[0] = 0
    z2[1] *= 1e-8
    assert nt_xent(z1, z2, tau=TAU).item() == pytest.approx(2 * slow_nt_xent(z1, z2, TAU).item(), rel=1e-12)
    leaf = z1.clone().requires_grad_()
    assert torch.autograd.grad(nt_xent(leaf, z2, tau=TAU), leaf)[0].isfinite().all()


def test_the_memory_equals_a_queue_unrolled_by_hand():
    """Three steps of two images into a ring of ten keys: the third wraps round. Image 5 comes back in the third, when
    keys of its first time are still there. Catches keys of the current batch that miss or stand at the wrong place, a
    positive of the same view or of an older batch, an image's own old keys or empty places as negatives, overwriting
    the newest rather than the oldest, and a gradient that reaches the momentum encoder."""
    memory = KeyMemory(10, WIDTH).double()
    queue = []  # (image, key), oldest first
    for step, images in enumerate(((5, 7), (1, 2), (3, 5))):
        z1, z2 = views(seed=10 + step, images=2)
        key1, key2 = views(seed=20 + step, images=2)
        queue += [(image, key) for keys in (key1, key2) for image, key in zip(images, keys.detach(), strict=True)]
        queue = queue[-10:]
        anchors = []
        for z, other in ((z1, key2), (z2, key1)):
            for image, query, positive in zip(images, z, other.detach(), strict=True):
                negatives = [key for other_image, key in queue if other_image != image]
                anchors.append(slow_anchor(query, positive, negatives, TAU))
        value = momentum_nt_xent(z1, z2, key1, key2, torch.tensor(images), memory, tau=TAU)
        assert len(queue) == (4, 8, 10)[step]
        assert_same(value, 2 * sum(anchors) / 4, [z1, z2])
        value.backward()
        assert key1.grad is None and key2.grad is None
    assert memory.image_M.tolist() == [3, 5, 5, 7, 1, 2, 1, 2, 3, 5] and int(memory.num_put) == 12


def test_contrast_equals_its_definition():
    """Against loops. Catches a key of another image counted as found, and entropy in bits or of unnormalised rows."""
    z1, z2 = views(seed=3, images=6)
    got = contrast(z1, z2, tau=TAU)
    found, entropy = 0, 0.0
    for i, query in enumerate(z1):
        weights = [math.exp((unit(query) @ unit(key)).item() / TAU) for key in z2]
        found += max(range(6), key=weights.__getitem__) == i
        entropy -= sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights) / 6
    assert 0 < found < 6
    assert got["contrast_top1"].item() == pytest.approx(found / 6)
    assert got["contrast_entropy"].item() == pytest.approx(entropy, rel=1e-12)
    assert not any(value.requires_grad for value in got.values())


# ------------------------------------------------------------------------------------------------------- the method


def tiny(**changes):
    view = View("global", 8, Whole(), (Flip(),), UNIT, copies=2)
    encoder = SimclrResNet(10, stem="cifar", base_width=4)
    config = Simclrv2Config("digits", replace(view, copies=1), view=view, encoder=encoder, precision="fp32")
    config = replace(config, **{"out_features": 8, "batch_global": 16} | changes)
    return config.build(Facts(10, 1, 0), {})


def test_the_momentum_encoder_is_an_average():
    """From equal weights, 0.999 of the old and 0.001 of the new after a step; running statistics stay its own."""
    method = tiny(memory=Memory(64))
    nets = method.nets()
    before = [p.clone() for p in nets.target.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(before, nets.online.parameters(), strict=True))
    with torch.no_grad():
        for p in nets.online.parameters():
            p.add_(torch.randn_like(p))
    nets.online.trunk.bn1.running_mean.fill_(7.0)
    method.after_step(nets, 0, Horizon(10, 10))
    for old, new, average in zip(before, nets.online.parameters(), nets.target.parameters(), strict=True):
        torch.testing.assert_close(average, 0.999 * old + 0.001 * new, rtol=0, atol=1e-6)
    assert nets.target.trunk.bn1.running_mean.abs().max() == 0


def authors_rate(step, total, warmup, peak):
    """google-research/simclr's `learning_rate_schedule`."""
    if step < warmup:
        return step / warmup * peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def test_rates_follow_the_authors_law():
    """At their counts: 800 epochs of 1,281,167 images are 250,228 steps of 4,096, and 40 epochs 12,511. Ours, of whole
    batches, are 0.25 % fewer. Catches a first step that moves, another peak, a cosine over the warm-up too."""
    (stage,) = resolve("simclrv2.rn50_800ep")
    total, warmup = 1_281_167 * 800 // 4096 + 1, 1_281_167 * 40 // 4096
    assert (total, warmup) == (250_228, 12_511)
    method = replace(stage.config, rate=replace(stage.config.rate, warmup=Steps(warmup))).build(Facts(1000, 3, 0), {})
    for step in (0, 1, 6000, 12_510, 12_511, 12_512, 100_000, 250_227):
        expected = authors_rate(step, total, warmup, peak=6.4)
        assert method.rates(step, Horizon(312, total)) == pytest.approx((expected, expected), rel=1e-12, abs=1e-12)
    assert method.rates(0, Horizon(312, total)) == (0.0, 0.0)

    own = Horizon(1_281_167 // 4096, stage.length.steps(1_281_167 // 4096))
    assert (own.total_steps, own.steps(stage.config.rate.warmup)) == (249_600, 12_480)


@pytest.mark.parametrize("recipe", ["simclrv2.rn50_800ep", "simclrv2.distill_rn50"])
def test_warm_up_is_the_first_twentieth_of_whatever_length(recipe):
    """Section 3.1. Catches 40 epochs of warm-up in a run of 100, or of 40, which would never fall."""
    (stage,) = resolve(recipe, ("epochs=100",))
    ours = stage.config.build(Facts(1000, 3, 0), {})
    horizon = Horizon(312, stage.length.steps(312))
    rates = [ours.rates(epoch * 312, horizon)[0] for epoch in (0, 5, 20, 40)]
    assert rates == pytest.approx([0.0, 6.4, 6.01, 4.49], abs=0.01) and ours.rates(1560, horizon)[0] == max(
        ours.rates(step, horizon)[0] for step in range(0, 31_200, 78)
    )


def test_peaks_scale_with_the_batch():
    """Catches a rate that stays where `--set batch_global` changes."""
    for recipe, batch, peak in (
        ("simclrv2.rn50_800ep", 4096, 6.4),  # the paper's .1 times the root of 4,096
        ("simclrv2.rn50_800ep", 1024, 3.2),
        ("simclrv2.cifar10_small", 512, 2.0),
        ("simclrv2.cifar10_small", 64, 0.25),
    ):
        (stage,) = resolve(recipe, (f"batch_global={batch}",))
        ours = stage.config.build(Facts(10, 3, 0), {})
        warmed_up = Horizon(10, 10_000).steps(stage.config.rate.warmup)
        assert ours.rates(warmed_up, Horizon(10, 10_000)) == pytest.approx((peak, peak))
    assert peak_rate(0.075, 4096) == pytest.approx(4.8)  # the README's, which it says is .3 · 4,096 / 256
    assert peak_rate(0.3, 4096, "linear") == pytest.approx(4.8)


def test_lars_is_simclrs_and_leaves_out_biases_and_norms():
    """Catches PAWS's form, decay of norms, and a head whose kernels are not adapted."""
    method = tiny()
    nets = method.nets()
    optimizer = method.optimizer(nets)
    names = {id(p): name for name, p in nets.online.named_parameters()}
    adapted, excluded = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert [group["lars_exclude"] for group in optimizer.param_groups] == [False, True]
    assert {group["form"] for group in optimizer.param_groups} == {"simclr"}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-4}
    assert {"trunk.conv1.weight", "projection.fc1.weight", "projection.fc3.weight"} <= set(adapted)
    norm = ("bn1", "bn2", "bn3", "downsample.1")
    assert all(name.rpartition(".")[0].endswith(norm) for name in excluded)
    assert not any(name.rpartition(".")[0].endswith(norm) for name in adapted)


def test_views_are_the_authors():
    """Boxes cover 38.7 % of a 500 x 375 image in the mean (torchvision's 43.1 %); for evaluation the middle .875 of the
    shorter side; colours and blur in their order, pixels from 0 to 1."""
    (stage,) = resolve("simclrv2.rn50_800ep")
    view, eval_view = stage.config.view, stage.config.eval_view
    sizes, keys = np.tile([[375, 500]], (50_000, 1)), mix(np.arange(50_000))
    box = boxes(view, sizes, keys)
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) / (375 * 500)
    assert abs(area.mean() - 0.387) < 0.003 and area.min() >= 0.1
    (box,) = boxes(eval_view, sizes[:1], keys[:1])
    assert box[3] - box[1] == pytest.approx(0.875 * 375) and box[2] - box[0] == pytest.approx(0.875 * 375, rel=0.01)
    assert (box[1] + box[3]) / 2 == pytest.approx(375 / 2, abs=1) and (box[0] + box[2]) / 2 == pytest.approx(250, abs=1)
    flip, jitter, grey, blur = view.ops
    assert (type(flip), flip.p, grey.p, blur.p, blur.taps, blur.sigma) == (Flip, 0.5, 0.2, 0.5, 23, (0.1, 2.0))
    assert jitter == TfColourJitter(0.8, brightness=0.8, offset=0.0, contrast=0.8, saturation=0.8, hue=0.2)
    assert isinstance(grey, Grayscale) and isinstance(blur, GaussianKernelBlur)
    assert {(v.pixels, v.filter) for v in (view, eval_view)} == {(UNIT, Filter.BICUBIC_ALIASED)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tau": 0.0}, "above zero"),
        ({"head_layers": 1}, "two or more"),
        ({"view": View("global", 8, Whole(), copies=3)}, "two views"),
        ({"memory": Memory(30)}, "have to find room"),
        ({"memory": Memory(64, decay=1.0)}, "below 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, said):
    """Catches a ring in which a batch overwrites its own keys, and three views of which one is never seen."""
    with pytest.raises(ConfigError, match=said):
        tiny(**changes)


def test_proj1_is_what_fine_tuning_starts_from():
    """Catches a tap after another layer than linear, norm, ReLU."""
    method = tiny()
    net = method.nets().online.eval()
    x = torch.rand(3, 1, 8, 8)
    backbone, proj1, z = (method.embed(Nets(net), x, tap) for tap in method.taps)
    assert torch.equal(proj1, torch.relu(net.projection.bn1(net.projection.fc1(backbone)))) and (proj1 == 0).any()
    assert z.shape == (3, 8) and torch.equal(z, net(x))
