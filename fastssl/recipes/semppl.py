"""SemPPL's recipes on its three bases, and what its paper varies."""

from __future__ import annotations

from dataclasses import replace

from fastssl.losses.semppl import Byol, SimClr
from fastssl.methods.base import Epochs, Stage, Stages
from fastssl.methods.semppl import SempplConfig, large
from fastssl.nn.encoders.encoder import Encoder
from fastssl.nn.encoders.resnet import ByolResNet
from fastssl.optim.rates import WarmupCosine
from fastssl.recipes.published import Published, published
from loaders.plan.ops import TF_LUMA, Flip, Grayscale, Solarise, TfColourJitter
from loaders.plan.views import CIFAR10, Centre, ClampedRrc, Filter, View, Whole

SOURCE = "SemPPL, arXiv 2301.05158"


def paper(epochs: int, *, ten_pct: float, one_pct: float | None = None, but: str = "") -> list[Published]:
    """Fine-tuned with 1 % and 10 % of the labels, as this paper has them, of others' methods too."""
    return [
        Published(source=SOURCE, labels=labels, epochs=epochs, fine_tuned=value, but=but)
        for labels, value in (("1 %", one_pct), ("10 %", ten_pct))
        if value is not None
    ]


@published(
    *paper(300, one_pct=68.5, ten_pct=76.0),
    *paper(300, ten_pct=72.7, but="in the ablations, table 8b; nobody says why the headline is higher"),
)
def rn50_300ep() -> Stages:
    """ImageNet with 10 % of the labels, ResNet-50, 300 epochs."""
    return _imagenet(ByolResNet(50))


@published(*paper(100, ten_pct=69.9))
def rn50_100ep() -> Stages:
    """As rn50_300ep for 100 epochs, which the paper's ablations start from."""
    return _imagenet(ByolResNet(50), epochs=100)


@published(*paper(300, one_pct=71.9, ten_pct=78.6))
def rn50w2_300ep() -> Stages:
    """As rn50_300ep, twice as wide."""
    return _imagenet(ByolResNet(50, width=2))


@published(*paper(300, one_pct=72.5, ten_pct=79.3))
def rn50w4_300ep() -> Stages:
    """As rn50_300ep, four times as wide."""
    return _imagenet(ByolResNet(50, width=4))


@published(*paper(300, one_pct=74.8, ten_pct=80.4))
def rn200w2_300ep() -> Stages:
    """As rn50_300ep with ResNet-200, twice as wide."""
    return _imagenet(ByolResNet(200, width=2))


@published(*paper(300, one_pct=72.3, ten_pct=78.3))
def rn50_sk_300ep() -> Stages:
    """As rn50_300ep with selective kernels."""
    return _imagenet(ByolResNet(50, selective_kernel=True))


@published(*paper(300, one_pct=74.5, ten_pct=79.8))
def rn50w2_sk_300ep() -> Stages:
    """As rn50w2_300ep with selective kernels."""
    return _imagenet(ByolResNet(50, width=2, selective_kernel=True))


@published(*paper(300, one_pct=76.0, ten_pct=80.5))
def rn200w2_sk_300ep() -> Stages:
    """As rn200w2_300ep with selective kernels."""
    return _imagenet(ByolResNet(200, width=2, selective_kernel=True))


@published(*paper(300, one_pct=57.1, ten_pct=72.4))
def byol_rn50_300ep() -> Stages:
    """SemPPL on BYOL, ResNet-50, 10 % of the labels."""
    return _imagenet(
        ByolResNet(50),
        base=Byol(),
        odd_view=large("odd", 0.08, copies=1, odd=True),
        even_view=large("even", 0.08, copies=1, odd=False),
        small_odd_view=None,
        small_even_view=None,
        masks="off",
        same_view_pairs=False,
        normaliser=1,  # BYOL adds both pairs up
        ema=0.99,
        ema_ramp=True,
    )


@published(Published(source=SOURCE, labels="all", epochs=300, fine_tuned=76.0))
def simclr_rn50_300ep() -> Stages:
    """SemPPL on SimCLR, ResNet-50, all labels."""
    (stage,) = byol_rn50_300ep()
    return (stage.with_settings(base=SimClr(), labels="all", out_features=128, normaliser=None),)


def cifar10_small() -> Stages:
    """CIFAR-10 with 4,000 labels on one CPU core in minutes: a small ResNet, two crops of 24 pixels, eight epochs."""
    # By short runs on 40,000 training images, scored on the others. Batch, average and rate: two epochs of
    # relicv2.cifar10_small. Neighbours and the divergence's weight: four epochs; so early, one neighbour in five is of
    # the right class, and positives of wrong classes at the paper's weight cost five points of kNN accuracy.
    ops = (Flip(), TfColourJitter(0.8, offset=0.4, contrast=0.4, saturation=0.2, hue=0.1), Grayscale(0.2, TF_LUMA))
    odd = View("odd", 24, ClampedRrc((0.35, 1.0)), (*ops, Solarise(0.2, (0.5, 0.5))), CIFAR10)
    config = SempplConfig(
        dataset="cifar10",
        eval_view=View("eval", 32, Whole(), pixels=CIFAR10),
        labels="paws-cifar10-4000-split-152",
        encoder=ByolResNet(10, stem="cifar", base_width=16),
        hidden_features=512,
        out_features=64,
        odd_view=odd,
        even_view=replace(odd, name="even", ops=ops),
        small_odd_view=None,
        small_even_view=None,
        batch_global=128,
        capacity=2560,
        alpha_on_kl=True,
        neighbours=20,
        ema=0.97,
        rate=WarmupCosine(1.4, Epochs(1)),
    )
    return (Stage("pretrain", config, Epochs(8), evaluate_every=Epochs(2)),)


# What the paper varies in rn50_100ep, one thing at a time (tables 4 and 8 to 11), as `--set` changes. After each: its
# top-1, and the accuracy of pseudo-labels, in %. Its oracle (71.6, 76.9), which corrects pseudo-labels by the hidden
# ones, is not among them: no loss here sees what a run is not given.
ABLATIONS: dict[str, tuple[str, ...]] = {
    "as it is": (),  # 69.9, 69
    "one vote": ("voting=false",),  # 69.0, 62.5
    **{f"{k} neighbours": (f"neighbours={k}",) for k in (2, 3, 5, 10)},  # 10: 69.1, 68.0
    **{f"{n} positives": (f"positives={n}",) for n in (1, 2, 5, 10)},  # 5: 71.0, 72.8
    # The paper's 4,000 are less than its batch: one batch stands for them. 67.9, 53.1; 20,000: 69.2, 64.3;
    # 200,000: 69.8, 69.5
    **{f"queues of {n} batches": (f"capacity={4096 * n}",) for n in (1, 2, 3, 5, 10, 49)},
    "200 epochs": ("epochs=200",),  # 72.4
    "300 epochs": ("epochs=300",),  # 72.7, 77.9; the headline, with these settings, is 76.0
    "500 epochs": ("epochs=500",),  # 72.3
    "no pseudo-labels": ("epochs=300", "pseudo_labels=false"),  # 71.1; 61.9 with 1 % of the labels
    "no semantic positives": ("epochs=300", "alpha=0"),  # 72.4, quoted of ReLICv2's run of 1,000 epochs
    "positives weigh as views": ("epochs=300", "alpha=1"),  # 74.6
}


def _imagenet(encoder: Encoder, epochs: int = 300, **changes: object) -> Stages:
    config = SempplConfig(
        dataset="imagenet",
        eval_view=View("eval", 224, Centre(resize=256), filter=Filter.BICUBIC_ALIASED),
        labels="simclr-10",
        encoder=encoder,
        rate=WarmupCosine(0.3, Epochs(10)),
        scaling="linear",
    )
    return (Stage("pretrain", replace(config, **changes), Epochs(epochs)),)  # type: ignore[arg-type]
