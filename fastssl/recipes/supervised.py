"""Recipes that train a classifier on labelled images alone: from scratch, or from what others pre-trained."""

from __future__ import annotations

from dataclasses import replace

from fastssl.methods.base import Epochs, Ref, Stage, Stages
from fastssl.methods.supervised import FirstLayer, SimclrFineTuning, SupervisedConfig
from fastssl.nn.encoders.resnet import ByolResNet, ResNet, SimclrResNet
from fastssl.optim.rates import WarmupCosine, WarmupStairs
from fastssl.optim.sgd import Sgd
from fastssl.recipes import paws
from fastssl.recipes.labels_alone import alone, beside
from fastssl.recipes.published import Published, published
from loaders.plan.ops import Flip
from loaders.plan.views import IMAGENET, UNIT, Centre, ClampedRrc, DistortedBox, Filter, Rrc, View

_SIMCLR, _SEMPPL = "SimCLRv2, arXiv 2006.10029", "SemPPL, arXiv 2301.05158"
# What fine-tuning shows of ImageNet.
_RANDOM_CROP = View("labelled", 224, Rrc((0.08, 1.0)), (Flip(),), IMAGENET)
_CENTRE = View("eval", 224, Centre(resize=256), pixels=IMAGENET)


def _paws(labels: str, fine_tuned: dict[int, float]) -> list[Published]:
    """By epochs of pre-training."""
    return [Published(source=paws.SOURCE, labels=labels, epochs=n, fine_tuned=v) for n, v in fine_tuned.items()]


def digits() -> Stages:
    """The network, labels and crops of paws.digits, trained on the hundred labelled digits alone."""
    return (alone(beside(paws.digits()[0], batch_global=100, peak=0.1), Epochs(400)),)


def cifar10_small() -> Stages:
    """The network, labels and crops of paws.cifar10_small, trained on the 4,000 labelled images alone."""
    return (alone(beside(paws.cifar10_small()[0], batch_global=128, peak=0.2), Epochs(2000)),)


def cifar10_finetune() -> Stages:
    """A run of paws.cifar10_small, fine-tuned on its 4,000 labelled images from the first projection layer."""
    # Of views 24 and 32 pixels wide, rates of .01 and .05, decays of .0005 and .005, by a hundred held-out training
    # images a class (`--sweep`).
    config = beside(paws.cifar10_small()[0], batch_global=128, peak=0.05)
    config = replace(
        config,
        view=replace(config.view, size=32),
        head=FirstLayer(128, bias=True),
        optimizer=Sgd(nesterov=True, weight_decay=5e-3),
        rate=WarmupCosine(0.05),
        label_smoothing=0.0,
    )
    return (finetune(config, Epochs(20)),)


@published(Published(source=_SIMCLR, labels="all", epochs=90, classifier=76.6))
def rn50_100pct() -> Stages:
    """ImageNet, ResNet-50 from scratch, 90 epochs; rates as SimCLR's authors gave them."""
    return _imagenet_baseline("all", epochs=90)


def rn50_10pct() -> Stages:
    """As rn50_100pct with 10 % of the labels, as long as S4L trained its own (v2, other labels: 56.4 %)."""
    return _imagenet_baseline("simclr-10", epochs=200, weight_decay=1e-3)


def rn50_1pct() -> Stages:
    """As rn50_100pct with 1 % of the labels, as long as S4L trained its own (v2, other labels: 25.4 %)."""
    return _imagenet_baseline("simclr-1", epochs=1000, weight_decay=1e-2, peak=0.01)


@published(*_paws("10 %", {100: 73.9, 200: 75.0, 300: 75.5}))
def paws_rn50_finetune_10pct() -> Stages:
    """PAWS's ResNet-50 (paws.rn50_*) with 10 % of the labels."""
    return (finetune(paws_finetune("simclr-10"), Epochs(50)),)


@published(*_paws("1 %", {100: 63.8, 200: 66.1, 300: 66.5}))
def paws_rn50_finetune_1pct() -> Stages:
    """PAWS's ResNet-50 (paws.rn50_*_1pct) with 1 % of the labels."""
    return (finetune(paws_finetune("simclr-1"), Epochs(50)),)


@published(*_paws("10 %", {200: 77.8}))
def paws_rn50w2_finetune_10pct() -> Stages:
    """As paws_rn50_finetune_10pct, twice as wide, after 200 epochs."""
    return (finetune(paws_finetune("simclr-10", width=2), Epochs(50)),)


@published(*_paws("1 %", {200: 69.6}))
def paws_rn50w2_finetune_1pct() -> Stages:
    """As paws_rn50_finetune_1pct, twice as wide, after 200 epochs."""
    return (finetune(paws_finetune("simclr-1", width=2), Epochs(50)),)


@published(Published(source=_SIMCLR, labels="all", epochs=800, fine_tuned=76.3))
def simclrv2_rn50_finetune_100pct() -> Stages:
    """SimCLRv2's ResNet-50 with all labels, from the trunk."""
    return (finetune(simclrv2_finetune(SimclrResNet(50), "all"), Epochs(30)),)


@published(Published(source=_SIMCLR, labels="10 %", epochs=800, fine_tuned=68.4))
def simclrv2_rn50_finetune_10pct() -> Stages:
    """SimCLRv2's ResNet-50 with 10 % of the labels."""
    return (finetune(simclrv2_finetune(SimclrResNet(50), "simclr-10"), Epochs(30)),)


@published(Published(source=_SIMCLR, labels="1 %", epochs=800, fine_tuned=57.9))
def simclrv2_rn50_finetune_1pct() -> Stages:
    """SimCLRv2's ResNet-50 with 1 % of the labels."""
    return (finetune(simclrv2_finetune(SimclrResNet(50), "simclr-1"), Epochs(60)),)


@published(Published(source=_SIMCLR, labels="10 %", epochs=800, fine_tuned=77.0))
def simclrv2_rn50w2_sk_finetune_10pct() -> Stages:
    """SimCLRv2's ResNet-50, twice as wide, selective kernels, with 10 % of the labels."""
    return (finetune(simclrv2_finetune(SimclrResNet(50, 2, selective_kernel=True), "simclr-10"), Epochs(30)),)


@published(Published(source=_SIMCLR, labels="1 %", epochs=800, fine_tuned=70.6))
def simclrv2_rn50w2_sk_finetune_1pct() -> Stages:
    """As simclrv2_rn50w2_sk_finetune_10pct with 1 % of the labels."""
    return (finetune(simclrv2_finetune(SimclrResNet(50, 2, selective_kernel=True), "simclr-1"), Epochs(60)),)


@published(Published(source=_SEMPPL, labels="10 %", epochs=300, fine_tuned=76.0))
def semppl_rn50_finetune_10pct() -> Stages:
    """SemPPL's ResNet-50 with 10 % of the labels."""
    return (finetune(semppl_finetune("simclr-10"), Epochs(30)),)


@published(Published(source=_SEMPPL, labels="1 %", epochs=300, fine_tuned=68.5))
def semppl_rn50_finetune_1pct() -> Stages:
    """SemPPL's ResNet-50 with 1 % of the labels."""
    return (finetune(semppl_finetune("simclr-1"), Epochs(30)),)


def finetune(config: SupervisedConfig, length: Epochs, init: Ref | None = None) -> Stage:
    """Train `config` from the weights `init`: by default those that `--init-from` names."""
    return replace(alone(config, length), name="finetune", needs={"init": init or Ref()})


def paws_finetune(labels: str, width: int = 1) -> SupervisedConfig:
    """The one setting in the authors' code. The paper chose among ten, on 12 held-out training images a class:
    --sweep rate.peak=.01,.02,.05,.1,.2 --sweep epochs=30,50."""
    return SupervisedConfig(
        dataset="imagenet",
        eval_view=_CENTRE,
        labels=labels,
        view=_RANDOM_CROP,
        encoder=ResNet(50, width),
        head=FirstLayer(2048 * width, bias=True),
        batch_norm="local",  # on four GPUs of 256 images each
        batch_global=1024,
        optimizer=Sgd(nesterov=True),
        rate=WarmupCosine(0.02),
        label_smoothing=0.0,
    )


def simclrv2_finetune(encoder: SimclrResNet, labels: str) -> SupervisedConfig:
    """The paper's section 3.1: with all labels from the trunk, else from the first projection layer."""
    return SimclrFineTuning(
        dataset="imagenet",
        eval_view=replace(_CENTRE, pixels=UNIT, filter=Filter.BICUBIC_ALIASED),
        labels=labels,
        view=replace(_RANDOM_CROP, crop=DistortedBox((0.08, 1.0)), pixels=UNIT, filter=Filter.BICUBIC_ALIASED),
        encoder=encoder,
    ).following(())


def semppl_finetune(labels: str) -> SupervisedConfig:
    """From the middle of the paper's grid (A.1), whose rates are for 256 images as these are, chosen by held-out
    training images: --sweep batch_global=512,1024,2048 --sweep rate.peak=.005,.0035,.003,.0025,.002,.001 --sweep
    head_peak=.5,.3,.2,.1,.05,.025."""
    return SupervisedConfig(
        dataset="imagenet",
        eval_view=replace(_CENTRE, filter=Filter.BICUBIC),
        labels=labels,
        view=replace(_RANDOM_CROP, crop=ClampedRrc((0.08, 1.0)), filter=Filter.BICUBIC),
        encoder=ByolResNet(50),
        head=FirstLayer(4096, bias=True),
        batch_global=1024,
        optimizer=Sgd(nesterov=True),
        rate=WarmupStairs(0.0025, (Epochs(18), Epochs(24)), 0.2),
        head_peak=0.1,
        scaling="linear",
        label_smoothing=0.0,
    )


def _imagenet_baseline(labels: str, epochs: int, weight_decay: float = 1e-4, peak: float = 0.1) -> Stages:
    config = SupervisedConfig(
        dataset="imagenet",
        eval_view=_CENTRE,
        labels=labels,
        view=_RANDOM_CROP,
        encoder=ResNet(50),
        optimizer=Sgd(nesterov=True, weight_decay=weight_decay),
        rate=WarmupCosine(peak, Epochs(5)),
        label_smoothing=0.0,
    )
    return (alone(config, Epochs(epochs)),)
