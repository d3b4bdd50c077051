"""SemPPL's settings at the door, and its recipes against what the paper says."""

import pytest
import torch

from fastssl.errors import ConfigError
from fastssl.losses.semppl import Byol, Relic, SimClr
from fastssl.methods.base import Facts, Horizon, through
from fastssl.methods.semppl import Semppl
from fastssl.profiling.workload import sized
from fastssl.recipes.resolve import resolve
from fastssl.recipes.semppl import ABLATIONS
from loaders.plan.ops import TF_LUMA, Flip, GaussianKernelBlur, Grayscale, Solarise, TfColourJitter
from loaders.plan.views import SaliencyMask
from tests.parity.test_semppl import BATCH, config, double, method


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"base": Relic(num_negatives=8)}, "8 negatives .* batch of 8: batch_global must be 9"),
        ({"base": Relic(num_negatives=0)}, "batch_global must be"),
        ({"capacity": 7}, "queue of 7 .* all 8: capacity must be 8"),
        ({"neighbours": 10}, "10 neighbours cannot be had from a queue of 9"),
        ({"base": Relic(tau=0.0)}, "above zero"),
        ({"ema": 1.1}, "1 at most"),
        ({"base": SimClr()}, "same_view_pairs=false"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        config(**changes)


def test_no_label_at_all_is_refused_unless_none_is_asked_for():
    unlabelled = Facts(num_classes=0, channels=1, seed=0, all_labelled=False)
    with pytest.raises(ConfigError, match="alpha=0"):
        Semppl(config(), unlabelled, {})
    assert Semppl(config(alpha=0.0), unlabelled, {}).nets().state is None


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_change_the_recipe_they_start_from(name):
    changes = ABLATIONS[name]
    (stage,), (plain,) = resolve("semppl.rn50_100ep", changes), resolve("semppl.rn50_100ep")
    assert (stage != plain) == bool(changes)
    assert stage.config.num_large == 4 and len(stage.config.views) == 4


def test_the_imagenet_recipe_is_the_papers():
    """Numbers that a typing error would change unseen."""
    (stage,) = resolve("semppl.rn50_300ep")
    c = stage.config
    assert (c.batch_global, c.num_entries, c.rate.peak * 16, c.optimizer.weight_decay, c.ema) == (
        4096,
        20 * 4096,
        0.3 * 16,
        1e-6,
        0.996,
    )
    assert (c.alpha, c.positives, c.neighbours, c.voting, c.ema_ramp, c.normaliser) == (0.2, 3, 1, True, False, None)
    assert c.base == Relic(tau=0.2, num_negatives=10, contrast_weight=0.3, invariance_weight=5.0)
    assert [v.copies for v in c.views] == [2, 2, 1, 1] and [v.size for v in c.views] == [224, 224, 96, 96]
    assert [v.crop.area for v in c.views] == [(0.14, 1.0), (0.08, 1.0), (0.05, 0.14), (0.05, 0.14)]
    assert [v.mask for v in c.views] == [SaliencyMask(p=0.1, least_foreground=0.2)] * 2 + [None] * 2
    jitter = TfColourJitter(0.8, offset=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    for view, taps in zip(c.views, (23, 23, 9, 9), strict=True):
        odd = view.name.endswith("odd")
        photometric = (Flip(0.5), jitter, Grayscale(0.2, TF_LUMA), GaussianKernelBlur(0.1 if odd else 1.0, taps=taps))
        assert view.ops == photometric + ((Solarise(0.2, (0.5, 0.5)),) if odd else ())
    ours = Semppl(c, Facts(1000, 3, 0), {})
    assert ours.votes and ours.rates(1564, Horizon(312, 93_835)) == pytest.approx((4.8 * 1564 / 3120,) * 2)
    with torch.device("meta"):
        nets = ours.nets()
    sizes = {name: sum(t.numel() for t in part.parameters()) for name, part in nets.online.named_children()}
    heads = 2048 * 4096 + 3 * 4096 + 4096 * 256, 256 * 4096 + 3 * 4096 + 4096 * 256
    assert sizes == {"trunk": 23_508_032, "projection": heads[0], "prediction": heads[1]}
    assert nets.state.z_LCD.numel() * 4 == 335_544_320


def test_without_pseudo_labels_only_labelled_images_have_semantic_positives():
    """The middle of table 4b. Catches queues that are left out with the votes."""
    ours = Semppl(config(pseudo_labels=False), Facts(10, 1, 0), {})
    assert not ours.votes and ours.nets().state is not None and ours.plan().streams[0].every_class
    assert Semppl(config(), Facts(10, 1, 0), {}).votes


def test_rate_and_queues_follow_the_batch():
    """D.1: .3 for each 256 images; section 2.1: 20 batches. Catches a small batch at the rate of a large one."""
    (stage,) = resolve("semppl.rn50_300ep", ("batch_global=1024",))
    ours = stage.config.build(Facts(1000, 3, 0), {})
    assert ours.rates(12_480, Horizon(1248, 374_400)) == pytest.approx((1.2, 1.2))
    with torch.device("meta"):
        assert ours.nets().state.z_LCD.shape[1] == 20 * 1024


def test_the_recipes_on_other_bases_are_the_papers():
    (byol,), (simclr,) = resolve("semppl.byol_rn50_300ep"), resolve("semppl.simclr_rn50_300ep")
    for c in (byol.config, simclr.config):
        assert [(v.name, v.copies, v.crop.area, v.mask) for v in c.views] == [
            ("odd", 1, (0.08, 1.0), None), ("even", 1, (0.08, 1.0), None)
        ]  # fmt: skip
        assert (c.alpha, c.positives, c.num_entries, c.same_view_pairs) == (0.2, 3, 81_920, False)
    b, s = byol.config, simclr.config
    assert (b.base, b.normaliser, b.ema, b.ema_ramp, b.rate.peak * 16, b.optimizer.weight_decay) == (
        Byol(),
        1,
        0.99,
        True,
        4.8,
        1e-6,
    )
    assert (s.base, s.normaliser, s.labels, s.out_features) == (SimClr(tau=0.1), None, "all", 128)


def test_views_are_one_batch_on_simclr_s_base_alone():
    """As the authors' code of each has it: statistics of both views' rows, or of each view's."""
    views = [torch.rand(BATCH, 1, 8, 8, dtype=torch.float64) for _ in range(2)]
    simclr = {"base": SimClr(), "same_view_pairs": False, "small_odd_view": None}
    for changes, together in ((simclr, True), ({}, False)):
        net = double(method(**changes).nets()).online
        layers = net.trunk, net.projection, net.prediction
        expected = through(layers, torch.cat(views), "fp32").chunk(2)
        assert all(torch.allclose(z, e, rtol=1e-9) for z, e in zip(net(views), expected, strict=True)) == together


def test_a_profile_takes_as_many_images_as_negatives_need():
    """It would begin with two, which the settings refuse."""
    (stage,) = resolve("semppl.rn50_300ep")
    assert [sized(stage, most, 1, False).config.batch_global for most in (2, 12, 8192)] == [16, 12, 4096]
