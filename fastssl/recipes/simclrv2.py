"""SimCLRv2's recipes: pre-training, distillation, and all three stages in a row."""

from __future__ import annotations

from dataclasses import replace

from fastssl.methods.base import Epochs, Ref, Stage, Stages
from fastssl.methods.distil import DistilConfig
from fastssl.methods.simclrv2 import EVAL_VIEW, VIEW, Memory, Simclrv2Config, colours
from fastssl.methods.supervised import FirstLayer, SupervisedConfig
from fastssl.nn.encoders.resnet import SimclrResNet
from fastssl.nn.trunks.resnet import Depth
from fastssl.optim.horizon import Share
from fastssl.optim.lars import Lars
from fastssl.optim.rates import WarmupCosine
from fastssl.recipes import supervised
from fastssl.recipes.distil import distil
from fastssl.recipes.published import Published, published
from fastssl.recipes.supervised import finetune
from loaders.plan.ops import Flip
from loaders.plan.views import UNIT, View, Whole

_SOURCE = "SimCLRv2, arXiv 2006.10029"
_MEMORY = "with the momentum memory"


def _paper(linear: float, one_pct: float, ten_pct: float, every: float, but: str = "") -> tuple[Published, ...]:
    """A row of the paper's table 1."""
    fine_tuned = {"1 %": one_pct, "10 %": ten_pct, "all": every}
    return tuple(
        Published(
            source=_SOURCE,
            labels=labels,
            epochs=800,
            fine_tuned=value,
            linear=linear if labels == "all" else None,
            but=but,
        )
        for labels, value in fine_tuned.items()
    )


def _distilled_paper(one_pct: float, ten_pct: float) -> tuple[Published, ...]:
    return tuple(
        Published(source=_SOURCE, labels=labels, epochs=400, classifier=value)
        for labels, value in (("1 %", one_pct), ("10 %", ten_pct))
    )


def cifar10() -> Stages:
    """CIFAR-10 without labels, ResNet-18, 1,000 epochs: what the code's README runs. It says: about 91 % linear."""
    view = replace(VIEW, size=32, ops=(Flip(), *colours(0.5)))
    config = Simclrv2Config(
        dataset="cifar10",
        eval_view=View("eval", 32, Whole(), pixels=UNIT),
        encoder=SimclrResNet(18, stem="cifar"),
        head_layers=2,  # paper, appendix
        view=view,
        batch_global=512,
        tau=0.5,
        rate=WarmupCosine(1.0, Epochs(10)),  # the code's default warm-up
        scaling="linear",
    )
    return (Stage("pretrain", config, Epochs(1000), evaluate=("knn",)),)


def cifar10_small() -> Stages:
    """CIFAR-10 without labels on two CPU cores in half an hour: the network and view size of paws.cifar10_small."""
    (stage,) = cifar10()
    small = stage.with_settings(
        labels="paws-cifar10-4000-split-152",
        encoder=SimclrResNet(10, stem="cifar", base_width=16),
        view=replace(stage.settings("view")["view"], size=24),
        rate=WarmupCosine(1.0, Epochs(4)),
    )
    return (replace(small, length=Epochs(80), evaluate_every=Epochs(10)),)


def cifar10_small_three_stages() -> Stages:
    """As cifar10_small, then fine-tuned on 4,000 labelled images, then distilled into the same network on all."""
    (pretrain,) = cifar10_small()
    shared = pretrain.settings("dataset", "eval_view", "labels", "encoder")
    seen_once = replace(pretrain.settings("view")["view"], ops=(Flip(),), copies=1)
    tuned = SupervisedConfig(
        **shared,
        view=seen_once,
        head=FirstLayer(128, bias=False),
        batch_global=128,
        optimizer=Lars("simclr"),
        rate=WarmupCosine(0.16),
        label_smoothing=0.0,
    )
    student = DistilConfig(
        **shared,
        view=seen_once,
        batch_global=256,
        rate=WarmupCosine(1.6, Epochs(2)),
    )
    return _in_a_row(pretrain, finetune(tuned, Epochs(60)), distil(student, Epochs(30)))


@published(*_paper(71.7, 57.9, 68.4, 76.3, but=_MEMORY))
def rn50_800ep() -> Stages:
    """ImageNet without labels, ResNet-50."""
    return _imagenet(50)


@published(*_paper(71.7, 57.9, 68.4, 76.3))
def rn50_800ep_memory() -> Stages:
    """As rn50_800ep with the momentum memory."""
    return _imagenet(50, memory=Memory())


@published(*_paper(74.6, 64.5, 72.1, 78.7, but=_MEMORY))
def rn50_sk_800ep() -> Stages:
    """As rn50_800ep, with selective kernels."""
    return _imagenet(50, selective_kernel=True)


@published(*_paper(75.6, 66.3, 73.9, 79.1, but=_MEMORY))
def rn50w2_800ep() -> Stages:
    """As rn50_800ep, twice as wide."""
    return _imagenet(50, width=2)


@published(*_paper(77.7, 70.6, 77.0, 81.3, but=_MEMORY))
def rn50w2_sk_800ep() -> Stages:
    """As rn50_sk_800ep, twice as wide."""
    return _imagenet(50, width=2, selective_kernel=True)


@published(*_paper(73.6, 62.1, 71.4, 78.2, but=_MEMORY))
def rn101_800ep() -> Stages:
    """As rn50_800ep, ResNet-101."""
    return _imagenet(101)


@published(*_paper(76.3, 68.3, 75.1, 80.6, but=_MEMORY))
def rn101_sk_800ep() -> Stages:
    """As rn101_800ep, with selective kernels."""
    return _imagenet(101, selective_kernel=True)


@published(*_paper(77.0, 69.1, 75.8, 80.7, but=_MEMORY))
def rn101w2_800ep() -> Stages:
    """As rn101_800ep, twice as wide."""
    return _imagenet(101, width=2)


@published(*_paper(79.0, 73.2, 78.8, 82.4, but=_MEMORY))
def rn101w2_sk_800ep() -> Stages:
    """As rn101_sk_800ep, twice as wide."""
    return _imagenet(101, width=2, selective_kernel=True)


@published(*_paper(74.5, 64.0, 73.0, 79.3, but=_MEMORY))
def rn152_800ep() -> Stages:
    """As rn50_800ep, ResNet-152."""
    return _imagenet(152)


@published(*_paper(77.2, 70.0, 76.5, 81.3, but=_MEMORY))
def rn152_sk_800ep() -> Stages:
    """As rn152_800ep, with selective kernels."""
    return _imagenet(152, selective_kernel=True)


@published(*_paper(77.4, 70.2, 76.6, 81.1, but=_MEMORY))
def rn152w2_800ep() -> Stages:
    """As rn152_800ep, twice as wide."""
    return _imagenet(152, width=2)


@published(*_paper(79.4, 74.2, 79.4, 82.9, but=_MEMORY))
def rn152w2_sk_800ep() -> Stages:
    """As rn152_sk_800ep, twice as wide."""
    return _imagenet(152, width=2, selective_kernel=True)


@published(*_paper(79.8, 74.9, 80.1, 83.1, but=_MEMORY))
def rn152w3_sk_800ep() -> Stages:
    """As rn152_sk_800ep, three times as wide."""
    return _imagenet(152, width=3, selective_kernel=True)


def _imagenet(depth: Depth, width: int = 1, selective_kernel: bool = False, memory: Memory | None = None) -> Stages:
    config = Simclrv2Config(
        dataset="imagenet",
        labels="simclr-10",  # what nearest neighbours look among
        encoder=SimclrResNet(depth, width, selective_kernel),
        memory=memory,
    )
    return (Stage("pretrain", config, Epochs(800), evaluate=("knn",)),)


def distill_rn50() -> Stages:
    """ResNet-50 learns on ImageNet what one that was fine-tuned (--set teacher=RUN) says of it."""
    return (_distilled(SimclrResNet(50), temperature=0.1),)


@published(*_distilled_paper(76.6, 80.9))
def distill_rn152w3_sk() -> Stages:
    """As distill_rn50 for the largest network."""
    return (_distilled(SimclrResNet(152, 3, selective_kernel=True), temperature=0.1),)


@published(*_distilled_paper(73.9, 77.5))
def distill_rn50_from_rn152w3_sk() -> Stages:
    """ResNet-50 learns what a run of distill_rn152w3_sk says."""
    return (_distilled(SimclrResNet(50), temperature=1.0),)


def rn50_three_stages_10pct() -> Stages:
    """rn50_800ep, fine-tuned with 10 % of the labels, then distilled into itself."""
    return _in_a_row(*rn50_800ep(), *supervised.simclrv2_rn50_finetune_10pct(), *distill_rn50())


def _distilled(encoder: SimclrResNet, temperature: float) -> Stage:
    config = DistilConfig(
        "imagenet",
        EVAL_VIEW,
        "simclr-10",
        encoder=encoder,
        temperature=temperature,
        rate=WarmupCosine(0.1, Share(0.05)),
        scaling="sqrt",
    )
    return distil(config, Epochs(400))


def _in_a_row(pretrained: Stage, tuned: Stage, student: Stage) -> Stages:
    """Three stages, each with what the one before made."""
    return (
        pretrained,
        replace(tuned, needs={"init": Ref(stage=pretrained.name)}),
        replace(student, needs={"teacher": Ref(stage=tuned.name)}),
    )
