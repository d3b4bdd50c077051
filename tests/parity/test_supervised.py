"""The classifier's training, law by law: what fine-tuning takes and what does not fit, where rates go, what batch norms
normalise by."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastssl import dist
from fastssl.config.plain import to_plain
from fastssl.methods.base import Epochs, Facts, Horizon, Steps
from fastssl.methods.supervised import FirstLayer
from fastssl.nn.encoders.resnet import ResNet, S4lResNet
from fastssl.nn.heads import byol_head, projection_head, simclr_head
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.nn.norm.lockstep import LockstepSequential
from fastssl.nn.norm.running_stats import average_running_stats, set_batch_norm_mode
from fastssl.optim.lars import Lars, LarsOptimizer
from fastssl.optim.rates import WarmupCosine, WarmupStairs
from fastssl.optim.sgd import Sgd
from fastssl.recipes.resolve import resolve
from fastssl.weights.read import Weights, WeightsError
from loaders.batch import Batch, Part
from tests.ranks.pool import run_ranks

FACTS = Facts(num_classes=10, channels=3, seed=0)
TRUNK = 32  # features of the narrow ResNet-10
HEADS = {
    "PAWS": (projection_head(TRUNK, 8), FirstLayer(TRUNK, bias=True)),
    "SimCLRv2": (simclr_head(TRUNK, 8), FirstLayer(TRUNK, bias=False)),
    "BYOL": (byol_head(TRUNK, 48, 8), FirstLayer(48, bias=True)),
}


def method(**changes):
    (stage,) = resolve("supervised.cifar10_finetune")
    tiny = {"encoder": ResNet(10, stem="cifar", base_width=4), "head": FirstLayer(TRUNK, bias=True)}
    return replace(stage.config, **tiny | {"precision": "fp32"} | changes).build(FACTS, {})


def pretrained(head="PAWS", **changes):
    """Weights as a pre-training run leaves them: trunk and projection head, statistics unlike a fresh network's."""
    torch.manual_seed(1)
    config = method(**changes).config
    projection = HEADS[head][0] if isinstance(head, str) else head
    online = nn.ModuleDict({"trunk": config.encoder.build(3), "projection": projection})
    for layer in online.modules():
        if isinstance(layer, GlobalBatchNorm):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
    return online, Weights({"online": online.state_dict()}, to_plain(method(**changes).about()), "runs/first")


def with_gelu():
    """Weights of a run whose projection head has GELU."""
    weights = pretrained("PAWS")[1]
    weights.about["config"]["activation"] = "gelu"
    return weights


def classifier(**changes):
    """Weights as a run of this method leaves them."""
    ours = method(**changes)
    return Weights({"online": ours.nets().online.state_dict()}, to_plain(ours.about()), "runs/first")


def images(rows, seed=0):
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def batch(rows=12):
    nothing, labels = torch.zeros(rows, dtype=torch.int64), torch.arange(rows) % 10
    part = Part({"labelled": images(rows)}, nothing, labels, None, keys=nothing, positions=nothing)
    return Batch({"labelled": part}, torch.tensor(0))


# ------------------------------------------------------------------------------------------------- what is taken


@pytest.mark.parametrize("head", HEADS)
def test_fine_tuning_starts_from_trunk_and_first_layer_with_logits_of_zero(head):
    """Catches statistics left behind, a second layer taken along, and a classifier that starts at random."""
    online, weights = pretrained(head)
    ours = method(head=HEADS[head][1], label_smoothing=0.0)
    nets = ours.nets()
    ours.start_from(nets, weights)
    online.eval(), nets.online.eval()
    with torch.no_grad():
        features = online["projection"][:3](online["trunk"](images(4)))
        assert torch.equal(nets.online.first(nets.online.trunk(images(4))), features) and features.any()
        assert torch.equal(ours.embed(nets, images(4), "logits"), torch.zeros(4, 10))
    nets.online.train()
    loss = ours.loss(nets, batch())["total"]
    assert loss.item() == pytest.approx(math.log(10), rel=1e-6)
    loss.backward()
    assert nets.online.fc.weight.grad.any() and not nets.online.trunk.conv1.weight.grad.any()


def test_fine_tuning_from_the_trunk_leaves_the_head_behind():
    ours = method(head=None)
    nets = ours.nets()
    online, weights = pretrained()
    ours.start_from(nets, weights)
    assert nets.online.fc.in_features == TRUNK and not nets.online.fc.weight.any()
    assert torch.equal(nets.online.trunk.conv1.weight, online["trunk"].conv1.weight)


def test_a_probe_beside_the_projection_head_is_no_classifier_to_go_on_from():
    """SimCLRv2 trains one while it pre-trains, on other features than ours."""
    ours, (online, _) = method(), pretrained()
    online["fc"] = nn.Linear(TRUNK, 1000)
    nets = ours.nets()
    ours.start_from(nets, Weights({"online": online.state_dict()}, {}, "runs/first"))
    assert not nets.online.fc.weight.any()


def test_a_classifier_is_taken_whole():
    ours, weights = method(), classifier()
    nets = ours.nets()
    ours.start_from(nets, weights)
    state = nets.online.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.nets["online"].items())
    assert nets.online.fc.weight.any()


CLASSES = tuple("abcdefghij")


@pytest.mark.parametrize(
    ("theirs", "ours", "says"),
    [
        (CLASSES[:7], CLASSES, "runs/first tells 7 classes apart, the labelled data has 10, among them 'h', which it"),
        ((), CLASSES[:7], "runs/first tells 10 classes apart, the labelled data has 7\n"),
        (CLASSES, ("z", *CLASSES[1:]), "tells 10 classes apart, the labelled data has 10, among them 'z', which it"),
        (CLASSES, CLASSES[:7], "runs/first tells 10 classes apart, the labelled data has 7\n"),
    ],
    ids=["more", "fewer, without names", "as many", "fewer"],
)
def test_other_classes_get_a_new_classifier(theirs, ours, says, capsys):
    """Catches the rows of other classes taken over without a word because they are as many, and a start that is refused
    because they are not."""
    weights, learner = of_classes(theirs), with_facts(ours)
    nets = learner.nets()
    learner.start_from(nets, weights)
    assert torch.equal(nets.online.trunk.conv1.weight, weights.nets["online"]["trunk.conv1.weight"])
    assert nets.online.fc.weight.shape == (len(ours), TRUNK) and not nets.online.fc.weight.any()
    said = capsys.readouterr().out
    assert said.startswith(f"a new classifier for {len(ours)} classes: ") and says in said and said.count("\n") == 1


def test_a_classifier_of_the_same_classes_is_taken_by_their_names(capsys):
    """Catches rows that stay where they were where the data numbers its classes otherwise."""
    backwards, weights = with_facts(CLASSES[::-1]), of_classes(CLASSES)
    nets = backwards.nets()
    backwards.start_from(nets, weights)
    assert torch.equal(nets.online.fc.weight, weights.nets["online"]["fc.weight"].flip(0))
    assert torch.equal(nets.online.fc.bias, weights.nets["online"]["fc.bias"].flip(0))
    assert capsys.readouterr().out == ""


def with_facts(class_names):
    return method().config.build(Facts(len(class_names) or 10, 3, 0, class_names=class_names), {})


def of_classes(class_names):
    made = with_facts(class_names)
    return Weights({"online": made.nets().online.state_dict()}, to_plain(made.about()), "runs/first")


def test_weights_of_which_nobody_said_what_they_are_must_fit():
    """Checkpoints from before runs said so, and other people's."""
    ours, (_, weights) = method(), pretrained()
    ours.start_from(ours.nets(), replace(weights, about={}))
    _, other = pretrained(encoder=ResNet(10, stem="cifar", base_width=8))
    with pytest.raises(WeightsError, match="trunk"):
        ours.start_from(ours.nets(), replace(other, about={}))


UNFIT = {
    "a head layer that the checkpoint lacks": (
        lambda: classifier(head=None),
        r"no first projection layer to start from, but fc, trunk: --set head=none starts from the trunk",
    ),
    "a head layer too many": (
        classifier,
        r"classifies what a first projection layer makes, which this recipe has none of \(head\)",
    ),
    "a head of another width": (
        lambda: pretrained("BYOL")[1],
        r"another first projection layer: --set head.features=48 --set head.bias=True would take it",
    ),
    "a head with another activation": (
        with_gelu,
        r"GELU in its projection head, where fine-tuning from its layers has ReLU: --set head=none",
    ),
    "a head without bias": (
        lambda: pretrained("SimCLRv2")[1],
        r"another first projection layer: --set head.features=32 --set head.bias=False would take it",
    ),
    "an encoder of another size": (
        lambda: pretrained(encoder=ResNet(18, width=2, stem="cifar", base_width=4))[1],
        r"another encoder: --set encoder.depth=18 --set encoder.width=2 would take it",
    ),
    "an encoder of another kind": (
        lambda: pretrained(encoder=S4lResNet(50, stem="cifar", base_width=4))[1],
        r"another encoder, S4lResNet, where this recipe has ResNet",
    ),
    "other pixels": (
        lambda: pretrained(eval_view=resolve("supervised.simclrv2_rn50_finetune_1pct")[0].config.eval_view)[1],
        r"pixels of mean \[0.0\] and std \[1.0\], this recipe has mean \[0.4914, 0.4822, 0.4465\] and std \[0.2023, "
        r"0.1994, 0.201\]: --set view.pixels.mean=0.0 --set view.pixels.std=1.0 --set eval_view.pixels.mean=0.0",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(case):
    weights, message = UNFIT[case][0](), UNFIT[case][1]
    ours = method(head=None) if "too many" in case else method()
    nets = ours.nets()
    before = {name: tensor.clone() for name, tensor in nets.online.state_dict().items()}
    with pytest.raises(WeightsError, match=f"^runs/first .*{message}.*; nothing loaded$"):
        ours.start_from(nets, weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in nets.online.state_dict().items())


# ------------------------------------------------------------------------------------------------------ rates


def test_rates_reach_their_parameters():
    """Catches a first projection layer that trains as the classifier does, and decayed norms."""
    ours = method(rate=WarmupCosine(0.5, Epochs(0)), head_peak=2.0, optimizer=Sgd(nesterov=True, weight_decay=0.1))
    nets = ours.nets()
    named = {id(p): name for name, p in nets.online.named_parameters()}
    found = {}
    for group, rate in zip(ours.optimizer(nets).param_groups, ours.rates(0, Horizon(10, 100)), strict=True):
        assert group["nesterov"] and group["momentum"] == 0.9
        found |= {named[id(p)]: (rate, group["weight_decay"]) for p in group["params"]}
    assert found.keys() == set(named.values())
    for name, p in nets.online.named_parameters():
        assert found[name] == (2.0 if name.startswith("fc.") else 0.5, 0.1 if p.ndim > 1 else 0.0), name


def test_lars_adapts_all_kernels_but_the_classifiers():
    """A classifier at zero has no norm to be adapted to; SimCLR leaves it out of LARS altogether."""
    ours = method(optimizer=Lars("simclr"))
    nets = ours.nets()
    optimizer = ours.optimizer(nets)
    assert isinstance(optimizer, LarsOptimizer) and {group["form"] for group in optimizer.param_groups} == {"simclr"}
    adapted = {id(p) for group in optimizer.param_groups if not group["lars_exclude"] for p in group["params"]}
    names = {name for name, p in nets.online.named_parameters() if id(p) in adapted}
    assert names == {n for n, p in nets.online.named_parameters() if p.ndim > 1 and not n.startswith("fc.")}


def test_the_classifiers_rate_is_the_encoders_unless_set():
    assert method(rate=WarmupCosine(0.5)).rates(0, Horizon(10, 100)) == (0.5, 0.5, 0.5, 0.5)
    assert method(rate=WarmupCosine(0.0), head_peak=0.5).rates(0, Horizon(10, 100)) == (0.0, 0.0, 0.5, 0.5)


def rates(ours, *steps, steps_per_epoch=12, epochs=30):
    return [ours.rates(step, Horizon(steps_per_epoch, steps_per_epoch * epochs))[0] for step in steps]


def test_cosine_with_warm_up():
    ours = method(rate=WarmupCosine(0.8, Epochs(5)))
    assert rates(ours, 0, 15, 60, 210, 359) == pytest.approx([0.0, 0.2, 0.8, 0.4, 0.8 * 2.7e-5], rel=0.02)


def test_steps_down_at_their_epochs_and_not_before():
    """SemPPL's: a fifth at 18 and 24 of 30 epochs."""
    (stage,) = resolve("supervised.semppl_rn50_finetune_1pct")
    assert stage.length == Epochs(30)
    ours = stage.config.build(FACTS, {})
    assert rates(ours, 0, 18 * 12 - 1, 18 * 12, 24 * 12 - 1, 24 * 12, 359) == pytest.approx(
        [0.01, 0.01, 0.002, 0.002, 0.0004, 0.0004]
    )
    assert ours.rates(18 * 12, Horizon(12, 360)) == pytest.approx((0.002, 0.002, 0.08, 0.08))
    warmed = method(rate=WarmupStairs(0.8, (Steps(4), Epochs(2)), 0.5, Steps(4)))
    assert rates(warmed, 0, 1, 3, 4, 23, 24) == pytest.approx([0.0, 0.2, 0.6, 0.4, 0.4, 0.2])


def test_schedules_can_be_set():
    (stage,) = resolve("supervised.semppl_rn50_finetune_1pct", ("rate.falls=2,5steps", "rate.factor=0.5"))
    assert stage.config.rate == WarmupStairs(0.0025, (Epochs(2), Steps(5)), 0.5)
    assert [rate.peak for rate in stage.config.rates] == pytest.approx([0.01, 0.4])


def test_published_settings():
    """The fine-tuning rows of SimCLRv2's appendix and PAWS's released code."""
    rows = {name: resolve(f"supervised.{name}_finetune_{share}")[0] for name, share in (
        ("simclrv2_rn50", "1pct"), ("simclrv2_rn50w2_sk", "10pct"), ("paws_rn50w2", "1pct")
    )}  # fmt: skip
    told = {
        name: (
            s.length.count,
            pytest.approx(s.config.rates[0].peak),
            s.config.optimizer,
            s.config.head,
            s.config.batch_norm,
        )
        for name, s in rows.items()
    }
    assert told == {
        "simclrv2_rn50": (60, 0.16, Lars("simclr"), FirstLayer(2048, bias=False), "train"),
        "simclrv2_rn50w2_sk": (30, 0.064, Lars("simclr"), FirstLayer(4096, bias=False), "train"),
        "paws_rn50w2": (50, 0.02, Sgd(nesterov=True), FirstLayer(4096, bias=True), "local"),
    }
    assert all(s.config.batch_global == 1024 for s in rows.values())
    (whole,) = resolve("supervised.simclrv2_rn50_finetune_100pct")
    assert whole.config.head is None and whole.length == Epochs(30)


@pytest.mark.parametrize(
    ("changes", "peak", "head"),
    [
        (("encoder.selective_kernel=true",), 0.064, FirstLayer(2048, bias=False)),
        (("encoder.width=2",), 0.064, FirstLayer(4096, bias=False)),
        (("encoder.depth=152",), 0.16, FirstLayer(2048, bias=False)),
        (("labels=all",), 0.16, None),
        (("batch_global=4096",), 0.32, FirstLayer(2048, bias=False)),
        (("encoder.width=2", "rate.peak=0.005", "head=first_layer(64,false)"), 0.16, FirstLayer(64, bias=False)),
        (("finetune.encoder.width=2", "finetune.head.layers=2"), 0.064, FirstLayer(2048, bias=False, layers=2)),
    ],
)
def test_rate_and_head_of_simclrv2s_fine_tuning_follow_encoder_and_labels(changes, peak, head):
    """Unless they are set. Catches .16 for a network that is wide or has selective kernels (section 3.1: .064), and
    all labels from a projection layer."""
    (stage,) = resolve("supervised.simclrv2_rn50_finetune_10pct", changes)
    assert stage.config.rates[0].peak == pytest.approx(peak) and stage.config.head == head


@pytest.mark.parametrize("layers", [1, 2])
def test_it_starts_from_as_many_projection_layers_as_it_keeps(layers):
    """SimCLRv2's figure 5 and appendix E, and a head of a width of its own (section 2, note 2). Catches layers of fresh
    weights, and one too many."""
    torch.manual_seed(0)
    head = simclr_head(TRUNK, 8, num_layers=3, hidden_features=24)
    shapes = [tuple(head[i].weight.shape) for i in (0, 3, 6)]
    assert shapes == [(24, TRUNK), (24, 24), (8, 24)]
    ours = method(head=FirstLayer(24, bias=False, layers=layers))
    net, weights = pretrained(head)
    assert net.projection is head
    nets = ours.nets()
    ours.start_from(nets, weights)
    nets.online.eval(), net.eval()
    x = images(4)
    expected = head.eval()[: 3 * layers](net.trunk(x))
    assert torch.equal(nets.online.first(nets.online.trunk(x)), expected)


def test_a_head_of_fewer_layers_is_refused():
    ours = method(head=FirstLayer(TRUNK, bias=False, layers=4))
    _, weights = pretrained(simclr_head(TRUNK, 8, num_layers=3))
    with pytest.raises(WeightsError, match=r"has 3 of the 4 projection layers .*--set head.layers=3 or fewer"):
        ours.start_from(ours.nets(), weights)


def test_semppls_rates_are_of_256_images():
    """A.1's grid has base rates. Catches rates that stay where the batch changes, and one that follows alone."""
    (stage,) = resolve("supervised.semppl_rn50_finetune_10pct", ("batch_global=512",))
    assert [rate.peak for rate in stage.config.rates] == pytest.approx([0.005, 0.2])


# ------------------------------------------------------------------------------------------------- batch norms


def statistics(module):
    return {name: t.clone() for name, t in module.state_dict().items() if "running" in name or "tracked" in name}


def test_frozen_statistics_stay_bitwise_and_affine_parameters_are_trained():
    """Also after train(), which the engine calls; the output is that of eval mode."""
    ours, (_, weights) = method(batch_norm="frozen"), pretrained()
    nets = ours.nets()
    ours.start_from(nets, weights)
    nets.online.train()
    before, optimizer = statistics(nets.online), ours.optimizer(nets)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    bn = nets.online.first.bn1.weight.clone()
    for _ in range(2):  # through a classifier of zeros nothing gets in the first step
        optimizer.zero_grad()
        ours.loss(nets, batch())["total"].backward()
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in statistics(nets.online).items())
    assert not torch.equal(nets.online.first.bn1.weight, bn)
    assert nets.online.trunk.bn1.weight.grad.any() and nets.online.trunk.bn1.bias.grad.any()
    in_training = nets.online(images(6))
    nets.online.eval()
    assert torch.equal(in_training, nets.online(images(6)))


def layers():
    """A small network in float64 whose batch norms have weights of their own."""
    torch.manual_seed(0)
    net = LockstepSequential(nn.Conv2d(3, 4, 3), GlobalBatchNorm(4), nn.ReLU(), nn.Conv2d(4, 2, 3), GlobalBatchNorm(2))
    return net.double()


def outputs(net, x):
    """Output, input gradient and statistics after one pass in training mode."""
    x = x.double().requires_grad_()
    y = net(x)
    (gradient,) = torch.autograd.grad(y.pow(3).sum(), x)
    return y.detach(), gradient, statistics(net)


def on_a_rank():
    net, own = layers(), images(10).chunk(2)[dist.rank()]
    set_batch_norm_mode(net, "local")
    local = outputs(net, own)
    average_running_stats(net)
    return local, statistics(net), outputs(layers(), own)


def test_a_network_without_batch_norms_has_no_statistics_to_average():
    """As a transformer under its classifier, after every step on several ranks."""
    average_running_stats(nn.Linear(2, 2))


def test_local_statistics_are_of_one_ranks_rows():
    """As if each rank trained alone, until the statistics are averaged; the default is of all ranks' rows, which
    differs. Catches a mode that nobody reads, and ranks that evaluate with different networks."""
    ranks = run_ranks(2, on_a_rank)
    alone = [outputs(layers(), half) for half in images(10).chunk(2)]
    whole = outputs(layers(), images(10))
    for rank, (local, _, _) in enumerate(ranks):
        for got, expected in zip(local[:2], alone[rank][:2], strict=True):
            assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12)
        for name, expected in alone[rank][2].items():
            assert torch.allclose(local[2][name], expected, rtol=1e-10)
    for name, tensor in ranks[0][1].items():
        assert torch.equal(tensor, ranks[1][1][name])
        if "tracked" not in name:
            assert torch.allclose(tensor, (alone[0][2][name] + alone[1][2][name]) / 2, rtol=1e-10)
    together = torch.cat([rank[2][0] for rank in ranks])
    assert torch.allclose(together, whole[0], rtol=1e-10, atol=1e-12)
    assert not torch.allclose(together, torch.cat([local[0] for local, _, _ in ranks]), atol=1e-2)


def test_frozen_norms_take_a_single_row_and_no_count():
    """One row has no variance, and needs none here."""
    net = layers()
    set_batch_norm_mode(net, "frozen")
    before = statistics(net)
    assert net(images(1).double()[:, :, :5, :5]).shape == (1, 2, 1, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in statistics(net).items())
