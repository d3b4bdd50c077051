"""`--set` of things: encoders, optimisers and rates written whole, in the words of a call."""

import pytest

from fastssl.errors import ConfigError
from fastssl.losses.semppl import Byol
from fastssl.methods.base import Epochs, Steps
from fastssl.methods.supervised import FirstLayer
from fastssl.nn.encoders.resnet import ResNet, SimclrResNet
from fastssl.nn.encoders.timm_models import Timm
from fastssl.nn.encoders.wide_resnet import WideResNet
from fastssl.optim.adamw import AdamW
from fastssl.optim.lars import Lars
from fastssl.optim.rates import WarmupCosine, WarmupStairs
from fastssl.optim.sgd import Sgd
from fastssl.recipes.resolve import resolve


def changed(*changes, recipe="paws.digits"):
    return resolve(recipe, changes)[-1].config


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ("encoder=wide_resnet(28,2)", "encoder", WideResNet(28, 2)),
        ("encoder=timm:resnet50", "encoder", Timm("resnet50")),
        ("encoder=timm(vit_tiny_patch16_224.augreg_in21k)", "encoder", Timm("vit_tiny_patch16_224.augreg_in21k")),
        ("encoder=WideResNet( widen=4 , depth=16 )", "encoder", WideResNet(16, 4)),
        ("encoder=simclr_resnet(10,1,true,stem=cifar)", "encoder", SimclrResNet(10, 1, True, "cifar")),
        ("encoder=resnet()", "encoder", ResNet()),
        ("optimizer=sgd(momentum=.9)", "optimizer", Sgd(0.9)),
        ("optimizer=adamw(betas=(.9,.95),weight_decay=.1)", "optimizer", AdamW((0.9, 0.95), weight_decay=0.1)),
        ("optimizer=lars(simclr,authors)", "optimizer", Lars("simclr", "authors")),
        ("rate=warmup_cosine(3.2,5,final=.1)", "rate", WarmupCosine(3.2, Epochs(5), final=0.1)),
        (
            "rate=warmup_stairs(.1,(10,300steps),warmup=20steps)",
            "rate",
            WarmupStairs(0.1, (Epochs(10), Steps(300)), warmup=Steps(20)),
        ),
        ("rate.peak=1.6", "rate", WarmupCosine(1.6, Epochs(5), start=0.8, final=0.032)),
    ],
)
def test_a_call_becomes_the_thing(change, field, value):
    assert getattr(changed(change), field) == value


def test_what_may_be_absent_or_one_of_several_is_written_so_too():
    assert changed("head=first_layer(32,true)", recipe="supervised.digits").head == FirstLayer(32, True)
    assert changed("head=none", recipe="supervised.cifar10_finetune").head is None
    assert changed("base=byol()", "alpha=0", recipe="semppl.cifar10_small").base == Byol()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("encoder=wideresnt(2)", "encoder: there is no 'wideresnt'; did you mean 'WideResNet'?"),
        (
            "encoder=sgd()",
            "encoder: there is no 'sgd'; known: ResNet, S4lResNet, WideResNet, ByolResNet, SimclrResNet and 2 more",
        ),
        ("optimizer=muon(1)", "optimizer: there is no 'muon'; known: AdamW, Lars, Sgd"),
        ("encoder=wide_resnet(depht=28)", "encoder: WideResNet has no 'depht'; did you mean 'depth'?"),
        ("encoder=wide_resnet(28,2,3)", "encoder: WideResNet takes depth, widen, not '3'"),
        ("encoder=wide_resnet(widen=2,28)", "encoder: WideResNet is given 'widen' twice"),
        ("encoder=wide_resnet(28,depth=28)", "encoder: WideResNet is given 'depth' twice"),
        ("encoder=wide_resnet(,2)", "encoder: WideResNet takes depth, widen, not ''"),
        ("encoder=wide_resnet(wide)", "encoder.depth=wide: a whole number is needed"),
        ("encoder=resnet(51)", "encoder.depth=51: choose one of 10, 18, 34, 50, 101, 152, 200"),
        ("rate=warmup_stairs(.1)", "rate: WarmupStairs needs 'falls': it takes peak, falls, factor, warmup"),
        ("optimizer=sgd(momentum=-1)", "momentum is -1.0, but must be 0 at least"),
        ("optimizer=adamw(betas=(1,2))", "betas are (1.0, 2.0), but each must be 0 at least and below 1"),
        ("encoder=resnet", "encoder=resnet: write it whole, as ByolResNet(...) or ResNet(...) or"),
        (
            "optimizer=sgd(momentum=.9",
            "optimizer=sgd(momentum=.9: write it whole, as AdamW(...) or Lars(...) or Sgd(...)",
        ),
    ],
)
def test_what_cannot_be_meant_is_said_by_name(change, says):
    with pytest.raises(ConfigError) as error:
        changed(change)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("recipe", "change", "says"),
    [
        ("paws.digits", "lr_peak=1.6", "lr_peak is rate.peak now: --set rate.peak=1.6"),
        ("paws.digits", "warmup=3", "warmup is rate.warmup now: --set rate.warmup=3"),
        ("paws.digits", "lars_rule=paper", "lars_rule is optimizer.rule now: --set optimizer.rule=paper"),
        ("s4l.rotation", "decays=1,2", "decays is rate.falls now: --set rate.falls=1,2"),
        (
            "s4l.moam",
            "joint.momentum=.8",
            "joint.momentum is optimizer.momentum now: --set joint.optimizer.momentum=.8",
        ),
        ("supervised.digits", "lr_head=.1", "lr_head is head_peak now: --set head_peak=.1"),
        ("simclrv2.cifar10", "lr_base=.1", "lr_base is rate.peak now: --set rate.peak=.1"),
    ],
)
def test_settings_of_before_are_refused_with_the_new_name(recipe, change, says):
    with pytest.raises(ConfigError) as error:
        changed(change, recipe=recipe)
    assert str(error.value) == says


def test_a_key_that_the_named_stage_lacks_is_refused():
    """Catches a change that is dropped in silence because the other stages stay as they are."""
    with pytest.raises(ConfigError, match="unknown key 'joint.half_lives'; did you mean 'half_life'"):
        changed("joint.half_lives=3", recipe="s4l.moam")
    with pytest.raises(ConfigError, match="unknown key 'finetune.label_view.size'"):
        changed("finetune.label_view.size=3", recipe="s4l.moam")
