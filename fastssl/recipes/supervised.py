"""Recipes that train a classifier on labelled images alone: from scratch, or from what others pre-trained."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from fastssl.methods.base import Epochs, Ref, Stage, Stages
from fastssl.methods.simclrv2 import colours
from fastssl.methods.supervised import FirstLayer, SimclrFineTuning, SupervisedConfig
from fastssl.nn.encoders.resnet import ByolResNet, ResNet, SimclrResNet
from fastssl.nn.trunks.resnet import Depth
from fastssl.optim.rates import WarmupCosine, WarmupStairs
from fastssl.optim.sgd import Sgd
from fastssl.recipes import paws
from fastssl.recipes.images import TYPICAL, Choices, Images
from fastssl.recipes.labels_alone import alone, beside
from fastssl.recipes.published import Published, published
from fastssl.recipes.simclrv2_networks import CIFAR10_DEPTHS, NETWORKS, Network, made
from fastssl.recipes.simclrv2_networks import SOURCE as SIMCLR
from loaders.plan.autoaugment import AutoAugment
from loaders.plan.ops import Flip
from loaders.plan.views import IMAGENET, UNIT, Centre, ClampedRrc, DistortedBox, Filter, Rrc, View, Whole

_SEMPPL = "SemPPL, arXiv 2301.05158"
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


def mine(images: Images = TYPICAL) -> Stages:
    """Your own labelled images, from scratch or, with --init-from, from another run; the rest follows from them."""
    choices = Choices(images)
    choices.need_classes("supervised.mine")
    epochs = choices.epochs(images.num_labelled) // (4 if images.from_weights else 1)
    peak = (0.025 if images.from_weights else 0.1) * choices.labelled_batch / 256
    config = SupervisedConfig(
        dataset="mine",
        eval_view=choices.eval_view,
        precision="fp32" if choices.on_cpu else "bf16",
        encoder=choices.encoder,
        view=View("labelled", choices.crop, Rrc((0.2, 1.0)), (Flip(),), choices.pixels),
        batch_global=choices.labelled_batch,
        rate=WarmupCosine(peak, Epochs(max(1, epochs // 20))),
    )
    return (alone(config, Epochs(max(1, epochs))),)


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


@published(Published(source=SIMCLR, labels="all", epochs=90, classifier=76.6))
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


@published(*_paws("10 %", {100: 78.5, 200: 79.0}))
def paws_rn50w4_finetune_10pct() -> Stages:
    """As paws_rn50_finetune_10pct, four times as wide, after 100 and 200 epochs."""
    return (finetune(paws_finetune("simclr-10", width=4), Epochs(50)),)


@published(*_paws("1 %", {100: 69.8, 200: 69.9}))
def paws_rn50w4_finetune_1pct() -> Stages:
    """As paws_rn50_finetune_1pct, four times as wide, after 100 and 200 epochs."""
    return (finetune(paws_finetune("simclr-1", width=4), Epochs(50)),)


@published(*_paws("10 %", {100: 77.0, 200: 77.8, 300: 77.7}))
def paws_rn50w2_finetune_10pct() -> Stages:
    """As paws_rn50_finetune_10pct, twice as wide, after 100, 200 and 300 epochs."""
    return (finetune(paws_finetune("simclr-10", width=2), Epochs(50)),)


@published(*_paws("1 %", {100: 68.2, 200: 69.6, 300: 69.6}))
def paws_rn50w2_finetune_1pct() -> Stages:
    """As paws_rn50_finetune_1pct, twice as wide, after 100, 200 and 300 epochs."""
    return (finetune(paws_finetune("simclr-1", width=2), Epochs(50)),)


def cifar10_wrn28_2_100pct() -> Stages:
    """CIFAR-10 with all labels, WRN-28-2, 1,000 epochs: PAWS's figure 7a, which gives neither rate nor views:
    these are PAWS's views, and a usual rate."""
    (stage,) = paws.cifar10()
    config = replace(beside(stage, batch_global=128, peak=0.1), labels="all", label_smoothing=0.0)
    return (alone(config, Epochs(1000)),)


def rn50w2_colour_100pct() -> Stages:
    """As rn50_100pct, twice as wide, with SimCLR's colour distortion: what PAWS's appendix B compares with."""
    return _with_colours(width=2)


def rn50w4_colour_100pct() -> Stages:
    """As rn50w2_colour_100pct, four times as wide."""
    return _with_colours(width=4)


def rn50_10pct_smoothed() -> Stages:
    """As rn50_10pct with labels smoothed by 0.1."""
    return tuple(stage.with_settings(label_smoothing=0.1) for stage in rn50_10pct())


def rn50_1pct_smoothed() -> Stages:
    """As rn50_1pct with labels smoothed by 0.1."""
    return tuple(stage.with_settings(label_smoothing=0.1) for stage in rn50_1pct())


def rn50_autoaugment_10pct() -> Stages:
    """As rn50_10pct_smoothed with AutoAugment: the baseline of SimCLRv2's figure 4, which plots it without a number."""
    return _autoaugmented(rn50_10pct_smoothed())


def rn50_autoaugment_1pct() -> Stages:
    """As rn50_1pct_smoothed with AutoAugment: the baseline of SimCLRv2's figure 4, which plots it without a number."""
    return _autoaugmented(rn50_1pct_smoothed())


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


def semppl_finetune(encoder: ByolResNet, labels: str) -> SupervisedConfig:
    """From the middle of the paper's grid (A.1), whose rates are for 256 images as these are, chosen by held-out
    training images: --sweep batch_global=512,1024,2048 --sweep rate.peak=.005,.0035,.003,.0025,.002,.001 --sweep
    head_peak=.5,.3,.2,.1,.05,.025."""
    return SupervisedConfig(
        dataset="imagenet",
        eval_view=replace(_CENTRE, filter=Filter.BICUBIC),
        labels=labels,
        view=replace(_RANDOM_CROP, crop=ClampedRrc((0.08, 1.0)), filter=Filter.BICUBIC),
        encoder=encoder,
        head=FirstLayer(4096, bias=True),
        batch_global=1024,
        optimizer=Sgd(nesterov=True),
        rate=WarmupStairs(0.0025, (Epochs(18), Epochs(24)), 0.2),
        head_peak=0.1,
        scaling="linear",
        label_smoothing=0.0,
    )


def _with_colours(width: int) -> Stages:
    (stage,) = rn50_100pct()
    view = replace(_RANDOM_CROP, ops=(Flip(), *colours(1.0)))
    return (stage.with_settings(encoder=ResNet(50, width), view=view),)


def _autoaugmented(stages: Stages) -> Stages:
    view = replace(_RANDOM_CROP, policy=AutoAugment())
    return tuple(stage.with_settings(view=view) for stage in stages)


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


# ------------------------------------------------------------------------------- a recipe for each cell of a table


def simclrv2_fine_tuned(network: Network, labels: str) -> Stages:
    """A cell of SimCLRv2's table 1."""
    return (finetune(simclrv2_finetune(network.encoder, labels), Epochs(60 if labels == "simclr-1" else 30)),)


def _supervised_simclr(network: Network) -> Stages:
    (stage,) = rn50_100pct()
    return (stage.with_settings(encoder=network.encoder),)


def _simclrv2_on_cifar10(depth: Depth, labels: str) -> Stages:
    """Appendix G: crop and flip. Batch and length are not published: these are guesses, which nobody has tried."""
    config = simclrv2_finetune(SimclrResNet(depth, selective_kernel=True, stem="cifar"), labels)
    view = View("labelled", 32, DistortedBox((0.08, 1.0)), (Flip(),), UNIT)
    config = replace(config, dataset="cifar10", eval_view=View("eval", 32, Whole(), pixels=UNIT), view=view)
    return (finetune(replace(config, batch_global=128 if labels == "per-class=25" else 512), Epochs(60)),)


def _semppl(name: str, labels: str) -> Stages:
    return (finetune(semppl_finetune(SEMPPL_NETWORKS[name][0], labels), Epochs(30)),)


# Of each network fine-tuned accuracies with 1, 10 and, where the paper has it (figure 2), 100 % of the labels.
SEMPPL_NETWORKS: dict[str, tuple[ByolResNet, tuple[float | None, ...]]] = {
    "rn50": (ByolResNet(50), (68.5, 76.0, 79.7)),
    "rn50w2": (ByolResNet(50, 2), (71.9, 78.6, None)),
    "rn50w4": (ByolResNet(50, 4), (72.5, 79.3, None)),
    "rn200w2": (ByolResNet(200, 2), (74.8, 80.4, None)),
    "rn50_sk": (ByolResNet(50, selective_kernel=True), (72.3, 78.3, None)),
    "rn50w2_sk": (ByolResNet(50, 2, selective_kernel=True), (74.5, 79.8, None)),
    "rn200w2_sk": (ByolResNet(200, 2, selective_kernel=True), (76.0, 80.5, None)),
}
# Top-5 of table 6.
_SEMPPL_TOP5 = {("rn50", "1 %"): 88.2, ("rn50", "10 %"): 92.7, ("rn50_sk", "1 %"): 90.6, ("rn50_sk", "10 %"): 93.9}
# PAWS's table 7b quotes these, with 4,000 labels.
_SIMCLRV2_CIFAR10 = {18: 92.1, 200: 96.0}
_CIFAR10_LABELS = {"250": "per-class=25", "4000": "paws-cifar10-4000-split-152", "all": "all"}
_SHARES = {"1pct": ("1 %", "simclr-1"), "10pct": ("10 %", "simclr-10"), "100pct": ("all", "all")}

for _network in NETWORKS.values():
    for _ending, (_share, _labels) in _SHARES.items():
        made(
            globals(),
            f"simclrv2_{_network.name}_finetune_{_ending}",
            f"A run of simclrv2.{_network.name}_800ep, fine-tuned with {_share} of the labels.",
            partial(simclrv2_fine_tuned, _network, _labels),
            Published(source=SIMCLR, labels=_share, epochs=800, fine_tuned=_network.fine_tuned()[_share]),
        )
    if _network.name != "rn50":  # of which rn50_100pct is the recipe
        made(
            globals(),
            f"{_network.name}_100pct",
            f"As rn50_100pct, SimCLRv2's {_network.encoder.name}.",
            partial(_supervised_simclr, _network),
            Published(source=SIMCLR, labels="all", epochs=90, classifier=_network.supervised),
        )

for _name, (_encoder, _accuracies) in SEMPPL_NETWORKS.items():
    for (_ending, (_share, _labels)), _value in zip(_SHARES.items(), _accuracies, strict=True):
        if _value is not None:
            made(
                globals(),
                f"semppl_{_name}_finetune_{_ending}",
                f"A run of semppl.{_name}_300ep, {_encoder.name}, fine-tuned with {_share} of the labels.",
                partial(_semppl, _name, _labels),
                Published(
                    source=_SEMPPL,
                    labels=_share,
                    epochs=300,
                    fine_tuned=_value,
                    top5=_SEMPPL_TOP5.get((_name, _share)),
                ),
            )

for _depth in CIFAR10_DEPTHS:
    for _ending, _labels in _CIFAR10_LABELS.items():
        _known = _SIMCLRV2_CIFAR10.get(_depth) if _ending == "4000" else None
        made(
            globals(),
            f"simclrv2_cifar10_rn{_depth}_sk_finetune_{_ending}",
            f"A run of simclrv2.cifar10_rn{_depth}_sk_800ep, fine-tuned with {_ending} labels.",
            partial(_simclrv2_on_cifar10, _depth, _labels),
            *([Published(source=paws.SOURCE, labels="4,000", epochs=800, fine_tuned=_known)] if _known else []),
        )
