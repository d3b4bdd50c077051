"""SimCLRv2's recipes: pre-training, distillation, and all three stages in a row."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

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
from fastssl.recipes.images import TYPICAL, Choices, Images
from fastssl.recipes.published import Published, published
from fastssl.recipes.simclrv2_networks import CIFAR10_DEPTHS, NETWORKS, SOURCE, made
from fastssl.recipes.supervised import finetune
from loaders.plan.ops import Flip
from loaders.plan.views import UNIT, View, Whole

_MEMORY = "with the momentum memory"


def _distilled_paper(one_pct: tuple[float, float], ten_pct: tuple[float, float]) -> tuple[Published, ...]:
    """Top-1 and top-5 of table 3."""
    return tuple(
        Published(source=SOURCE, labels=labels, epochs=400, classifier=top1, top5=top5)
        for labels, (top1, top5) in (("1 %", one_pct), ("10 %", ten_pct))
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


def mine(images: Images = TYPICAL) -> Stages:
    """Your own images, with or without labels, which only nearest neighbours look at: the rest follows from them."""
    choices = Choices(images)
    epochs = choices.epochs(images.num_images)
    config = Simclrv2Config(
        dataset="mine",
        eval_view=choices.eval_view,
        precision="fp32" if choices.on_cpu else "bf16",
        encoder=choices.encoder,
        view=replace(VIEW, size=choices.crop, pixels=choices.pixels),
        batch_global=choices.batch,
        rate=WarmupCosine(0.1, Epochs(max(1, epochs // 10))),
    )
    tenth = Epochs(max(1, epochs // 10))
    scored = ("knn",) if images.num_classes > 1 else ()
    return (Stage("pretrain", config, Epochs(epochs), evaluate=scored, evaluate_every=tenth, checkpoint_every=tenth),)


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


@published(*NETWORKS["rn50"].pretrained(_MEMORY))
def rn50_800ep() -> Stages:
    """ImageNet without labels, ResNet-50."""
    return _imagenet(50)


@published(*NETWORKS["rn50"].pretrained())
def rn50_800ep_memory() -> Stages:
    """As rn50_800ep with the momentum memory."""
    return _imagenet(50, memory=Memory())


@published(*NETWORKS["rn50_sk"].pretrained(_MEMORY))
def rn50_sk_800ep() -> Stages:
    """As rn50_800ep, with selective kernels."""
    return _imagenet(50, selective_kernel=True)


@published(*NETWORKS["rn50w2"].pretrained(_MEMORY))
def rn50w2_800ep() -> Stages:
    """As rn50_800ep, twice as wide."""
    return _imagenet(50, width=2)


@published(*NETWORKS["rn50w2_sk"].pretrained(_MEMORY))
def rn50w2_sk_800ep() -> Stages:
    """As rn50_sk_800ep, twice as wide."""
    return _imagenet(50, width=2, selective_kernel=True)


@published(*NETWORKS["rn101"].pretrained(_MEMORY))
def rn101_800ep() -> Stages:
    """As rn50_800ep, ResNet-101."""
    return _imagenet(101)


@published(*NETWORKS["rn101_sk"].pretrained(_MEMORY))
def rn101_sk_800ep() -> Stages:
    """As rn101_800ep, with selective kernels."""
    return _imagenet(101, selective_kernel=True)


@published(*NETWORKS["rn101w2"].pretrained(_MEMORY))
def rn101w2_800ep() -> Stages:
    """As rn101_800ep, twice as wide."""
    return _imagenet(101, width=2)


@published(*NETWORKS["rn101w2_sk"].pretrained(_MEMORY))
def rn101w2_sk_800ep() -> Stages:
    """As rn101_sk_800ep, twice as wide."""
    return _imagenet(101, width=2, selective_kernel=True)


@published(*NETWORKS["rn152"].pretrained(_MEMORY))
def rn152_800ep() -> Stages:
    """As rn50_800ep, ResNet-152."""
    return _imagenet(152)


@published(*NETWORKS["rn152_sk"].pretrained(_MEMORY))
def rn152_sk_800ep() -> Stages:
    """As rn152_800ep, with selective kernels."""
    return _imagenet(152, selective_kernel=True)


@published(*NETWORKS["rn152w2"].pretrained(_MEMORY))
def rn152w2_800ep() -> Stages:
    """As rn152_800ep, twice as wide."""
    return _imagenet(152, width=2)


@published(*NETWORKS["rn152w2_sk"].pretrained(_MEMORY))
def rn152w2_sk_800ep() -> Stages:
    """As rn152_sk_800ep, twice as wide."""
    return _imagenet(152, width=2, selective_kernel=True)


@published(*NETWORKS["rn152w3_sk"].pretrained(_MEMORY))
def rn152w3_sk_800ep() -> Stages:
    """As rn152_sk_800ep, three times as wide."""
    return _imagenet(152, width=3, selective_kernel=True)


def _cifar10_of_the_paper(depth: Depth) -> Stages:
    """Appendix G: 800 epochs of 512 images at temperature .2, a head of two layers, no memory. The rate is the code's,
    the paper gives none; of its broader colours and Sobel filter it says no more, so they are not here."""
    (stage,) = cifar10()
    encoder = SimclrResNet(depth, selective_kernel=True, stem="cifar")
    tuned = stage.with_settings(encoder=encoder, tau=0.2, rate=WarmupCosine(1.0, Share(0.05)))
    return (replace(tuned, length=Epochs(800)),)


for _depth in CIFAR10_DEPTHS:
    made(
        globals(),
        f"cifar10_rn{_depth}_sk_800ep",
        f"CIFAR-10 without labels, ResNet-{_depth} with selective kernels, 800 epochs: the paper's appendix G.",
        partial(_cifar10_of_the_paper, _depth),
    )


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


@published(*_distilled_paper((76.6, 93.4), (80.9, 95.5)))
def distill_rn152w3_sk() -> Stages:
    """As distill_rn50 for the largest network."""
    return (_distilled(SimclrResNet(152, 3, selective_kernel=True), temperature=0.1),)


@published(*_distilled_paper((73.9, 91.5), (77.5, 93.4)))
def distill_rn50_from_rn152w3_sk() -> Stages:
    """ResNet-50 learns what a run of distill_rn152w3_sk says."""
    return (_distilled(SimclrResNet(50), temperature=1.0),)


@published(*_distilled_paper((75.9, 93.0), (80.2, 95.0)))
def distill_rn50w2_sk_from_rn152w3_sk() -> Stages:
    """As distill_rn50_from_rn152w3_sk, twice as wide, with selective kernels."""
    return (_distilled(SimclrResNet(50, 2, selective_kernel=True), temperature=1.0),)


@published(
    *(
        Published(source=f"{SOURCE}, table 2", labels=labels, epochs=400, classifier=value, but=but)
        for but, values in {
            "": (68.9, 74.3),
            "alpha below 1": (69.0, 75.1),
            "images=labelled": (23.6, 66.2),
        }.items()
        for labels, value in zip(("1 %", "10 %"), values, strict=True)
    )
)
def distill_rn50_from_rn50w2_sk() -> Stages:
    """ResNet-50 learns what one that is twice as wide, with selective kernels, says after fine-tuning: table 2, whose
    other rows are --set alpha=0.5 (the paper does not say which) and --set images=labelled."""
    return (_distilled(SimclrResNet(50), temperature=1.0),)


def rn50_three_stages_10pct() -> Stages:
    """rn50_800ep, fine-tuned with 10 % of the labels, then distilled into itself."""
    return _in_a_row(*rn50_800ep(), *supervised.simclrv2_fine_tuned(NETWORKS["rn50"], "simclr-10"), *distill_rn50())


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
