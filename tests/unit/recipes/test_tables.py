"""Recipes that are made from the rows of a paper's table: as many as it has cells, each with its own settings."""

import re

import pytest

from fastssl.methods.base import Epochs
from fastssl.methods.simclrv2 import Memory
from fastssl.methods.supervised import FirstLayer
from fastssl.nn.encoders.resnet import ByolResNet, ResNet, SimclrResNet
from fastssl.optim.horizon import Share
from fastssl.recipes.published import cells
from fastssl.recipes.resolve import recipes, resolve
from fastssl.recipes.simclrv2_networks import NETWORKS
from loaders.plan.autoaugment import AutoAugment
from loaders.plan.ops import Flip, TfColourJitter


def test_every_network_of_table_1_has_its_cells():
    """39 fine-tunings, and supervised rows, each of its network and share, with the paper's number: the teacher of the
    headline is ResNet-152, three times as wide, with selective kernels."""
    names = [name for name in recipes() if re.fullmatch(r"supervised\.simclrv2_rn.*_finetune_\d+pct", name)]
    assert len(names) == 39 and len({resolve(name)[0].config for name in names}) == 39
    (teacher,) = resolve("supervised.simclrv2_rn152w3_sk_finetune_10pct")
    assert teacher.config.encoder == SimclrResNet(152, 3, selective_kernel=True)
    assert (teacher.config.labels, teacher.length, teacher.config.head.features) == ("simclr-10", Epochs(30), 6144)
    assert cells(recipes()["supervised.simclrv2_rn152w3_sk_finetune_10pct"]) == ("–", "80.1")
    baselines = " ".join(cells(recipes()[f"supervised.{name}_100pct"])[1] for name in NETWORKS)
    assert baselines == "76.6 78.5 77.8 79.3 78.0 79.6 78.9 80.1 78.3 79.9 79.1 80.4 80.5"


@pytest.mark.parametrize("name", NETWORKS)
def test_the_memory_can_be_had_with_every_network(name):
    """Every number of table 1 is with it. Catches a recipe whose memory cannot be turned on."""
    (stage,) = resolve(f"simclrv2.{name}_800ep", ("memory=default",))
    assert stage.config.memory == Memory() and stage.config.encoder == NETWORKS[name].encoder
    (smaller,) = resolve(f"simclrv2.{name}_800ep", ("memory=memory(32768,0.99)",))
    assert smaller.config.memory == Memory(32_768, 0.99)


def test_cifar10_of_appendix_g():
    """Six depths with selective kernels at temperature .2, 800 epochs, and each fine-tuned with 250, 4,000 and all
    labels. Catches the settings of the first SimCLR's README."""
    for depth in (18, 34, 50, 101, 152, 200):
        (stage,) = resolve(f"simclrv2.cifar10_rn{depth}_sk_800ep")
        c = stage.config
        assert (c.encoder, c.tau, c.head_layers, c.batch_global) == (SimclrResNet(depth, 1, True, "cifar"), 0.2, 2, 512)
        assert stage.length == Epochs(800) and c.rate.warmup == Share(0.05) and c.memory is None
        for ending, labels in (("250", "per-class=25"), ("4000", "paws-cifar10-4000-split-152"), ("all", "all")):
            (tuned,) = resolve(f"supervised.simclrv2_cifar10_rn{depth}_sk_finetune_{ending}")
            head = None if labels == "all" else FirstLayer(2048 if depth >= 50 else 512, bias=False)
            assert (tuned.config.labels, tuned.config.encoder, tuned.config.head) == (labels, c.encoder, head)


def test_semppls_seven_networks_are_fine_tuned():
    names = [name for name in recipes() if re.fullmatch(r"supervised\.semppl_.*_finetune_\d+pct", name)]
    assert len(names) == 15  # ResNet-50 with all labels, too: figure 2
    (stage,) = resolve("supervised.semppl_rn200w2_sk_finetune_1pct")
    assert stage.config.encoder == ByolResNet(200, 2, selective_kernel=True) and stage.config.labels == "simclr-1"


def test_supervised_baselines_of_the_papers():
    """PAWS's appendix B has colours for wider networks, SimCLRv2's figure 4 smoothed labels and AutoAugment."""
    (wide,) = resolve("supervised.rn50w4_colour_100pct")
    assert wide.config.encoder == ResNet(50, 4) and any(isinstance(op, TfColourJitter) for op in wide.config.view.ops)
    (smoothed,), (plain,) = resolve("supervised.rn50_1pct_smoothed"), resolve("supervised.rn50_1pct")
    assert (smoothed.config.label_smoothing, plain.config.label_smoothing) == (0.1, 0.0)
    for share in ("10pct", "1pct"):
        (augmented,) = resolve(f"supervised.rn50_autoaugment_{share}")
        (smoothed,) = resolve(f"supervised.rn50_{share}_smoothed")
        assert augmented.config.view.policy == AutoAugment() and augmented.config.view.ops == (Flip(),)
        assert augmented.with_settings(view=smoothed.config.view) == smoothed and smoothed.config.view.policy is None
    (cifar,) = resolve("supervised.cifar10_wrn28_2_100pct")
    assert cifar.config.labels == "all" and cifar.length == Epochs(1000)
