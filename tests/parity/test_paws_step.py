"""PAWS's step: what it waits for, sends and reports; settings that cannot be meant."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from fastssl.errors import ConfigError
from fastssl.losses.paws import (
    consistency,
    diagnostics,
    gather_supports,
)
from fastssl.losses.similarity import BalancedLabels, DenseLabels
from fastssl.methods.base import Facts
from fastssl.methods.paws import Paws, Ropaws
from fastssl.methods.simclrv2 import nt_xent
from fastssl.nn.encoders.resnet import ResNet
from fastssl.recipes.resolve import resolve
from loaders.batch import Batch, Part
from loaders.plan.views import UNIT, Rrc, View
from tests.parity.test_paws_loss import CLASSES, IMAGES, SUPPORTS, inputs, slow_sharpen, slow_soft_nn, targets_of
from tests.support.no_waiting import NoWaiting

# ---------------------------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_step_never_waits_for_the_device(precision):
    """Catches a value, a shape that depends on values, or a condition that the host would wait for."""
    method, batch = tiny_paws(precision), tiny_batch()
    nets = method.nets()
    with NoWaiting() as mode:
        method.loss(nets, batch)["total"].backward()
    assert mode.num_calls > 200  # backward's included


def test_half_precision_recipes_exchange_half_the_bytes():
    """The step equals `consistency` of supports in bfloat16, one rank's too, and differs from that of exact ones:
    catches an exchange in full precision, and one rank that trains on other numbers than many."""
    method, batch = tiny_paws("bf16"), tiny_batch()
    seen = {}
    nets = method.nets()
    nets.online.register_forward_hook(lambda module, args, out: seen.update(h=out[0], z=out[1]))
    total = method.loss(nets, batch)["total"].item()
    h, z = seen["h"], seen["z"]
    labels = BalancedLabels(4, 2, copies=2, smoothing=0.1)
    totals = {}
    for dtype in (None, torch.bfloat16):
        supports = gather_supports(z[0][:16], h[0][:16], labels, dtype)
        targets = targets_of(h[0][16:], supports)
        terms = consistency(torch.cat([z[0][16:], z[1]]), targets, supports, tau=0.1, sharpen_T=0.25)
        totals[dtype] = terms.cross_entropy + terms.me_max
    assert total == totals[torch.bfloat16].item()
    assert 1e-7 < abs(total - totals[None].item()) < 1e-2


def tiny_paws(precision):
    """PAWS on 8-pixel images: four classes of two supports, seen twice; two global views and three small crops."""
    (stage,) = resolve("paws.digits")
    config = replace(
        stage.config,
        encoder=ResNet(10, stem="cifar", base_width=4),
        out_features=16,
        prediction=True,
        small_view=View("small", 6, Rrc((0.3, 0.6)), pixels=UNIT, copies=3),
        classes_global=4,
        images_per_class=2,
        support_views=2,
        precision=precision,
    )
    torch.manual_seed(0)
    return Paws(config, Facts(num_classes=10, channels=1, seed=0), {})


def tiny_batch():
    generator = torch.Generator().manual_seed(1)

    def part(images, columns, **views):
        shapes = {name: (copies * images, 1, size, size) for name, (copies, size) in views.items()}
        x = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
        ids = torch.arange(images)
        return Part(x, ids, ids % 4, columns, ids, ids)

    parts = {
        "support": part(8, torch.arange(8) // 2, support=(2, 8)),
        "unlabelled": part(6, None, **{"global": (2, 8), "small": (3, 6)}),
    }
    return Batch(parts, torch.tensor(0))


def test_diagnostics_equal_their_definitions():
    """Each against loops: catches a support that classifies itself, one direction of the views left out, and fewer
    candidates than NT-Xent's 2N - 1."""
    _, _, labels_SK, h_GD, h_support_SD = inputs(0, seed=3)
    got = diagnostics(h_GD, F.normalize(h_support_SD), DenseLabels(labels_SK), tau=0.2, sharpen_T=0.25)

    unit = [row / row.norm() for row in h_GD]
    instance = 0.0
    for own in range(2 * IMAGES):
        other_view = (own + IMAGES) % (2 * IMAGES)
        weights = {o: math.exp((unit[own] @ unit[o]).item() / 0.2) for o in range(2 * IMAGES) if o != own}
        instance -= math.log(weights[other_view] / sum(weights.values())) / (2 * IMAGES)
    assert got["instance_discrimination"].item() == pytest.approx(
        nt_xent(*h_GD.chunk(2), tau=0.2).item() / 2, rel=1e-12
    )
    assert got["instance_discrimination"].item() == pytest.approx(instance, rel=1e-12)

    support = 0.0
    for s in range(SUPPORTS):
        others = [o for o in range(SUPPORTS) if o != s]
        one_hot = torch.eye(CLASSES, dtype=torch.float64)[[o % CLASSES for o in others]]
        p = slow_soft_nn(h_support_SD[s], [h_support_SD[o] for o in others], one_hot, 0.2)
        support -= math.log(p[s % CLASSES].item()) / SUPPORTS
    assert got["support_classification"].item() == pytest.approx(support, rel=1e-12)

    sharpened = [slow_sharpen(slow_soft_nn(row, h_support_SD, labels_SK, 0.2), 0.25) for row in h_GD]
    confidence = sum(max(q.item() for q in p) for p in sharpened) / len(h_GD)
    assert got["target_confidence"].item() == pytest.approx(confidence, rel=1e-12)
    assert not any(value.requires_grad for value in got.values())


def test_settings_that_cannot_be_meant_are_refused():
    (stage,) = resolve("paws.digits")
    one_view = replace(stage.config.global_view, copies=1)
    with pytest.raises(ConfigError, match="copies is 1"):
        replace(stage.config, global_view=one_view)
    with pytest.raises(ConfigError, match="above zero"):
        Ropaws(prior_tau=0.0)
    with pytest.raises(ConfigError, match="in both roles"):
        Paws(replace(stage.config, label_targets=True), Facts(10, 1, seed=0, one_set=False), {})
