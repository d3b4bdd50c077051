"""SuNCEt's loss against a loop-by-loop float64 transcription, value and gradient, and what its network keeps of PAWS's.

That two ranks equal one process is in tests/test_every_method.py, as for every method.
"""

import math
from dataclasses import replace

import pytest
import torch

from fastssl.config.plain import to_plain
from fastssl.errors import ConfigError
from fastssl.methods.base import Facts, Horizon, Ref
from fastssl.methods.suncet import suncet_loss
from fastssl.nn.encoders.wide_resnet import WideResNet
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.optim.rates import WarmupCosine
from fastssl.optim.sgd import Sgd
from fastssl.recipes.resolve import resolve
from fastssl.weights.read import Weights, WeightsError
from loaders.batch import Batch, Part

FACTS = Facts(num_classes=3, channels=3, seed=0)


def slow_suncet_loss(z_ND, class_N, tau):
    """Every pair of rows by itself."""

    def cosine(a, b):
        return sum(a * b) / (torch.sqrt(sum(a * a)) * torch.sqrt(sum(b * b)))

    total = 0.0
    for i in range(len(z_ND)):
        others = [j for j in range(len(z_ND)) if j != i]
        weights = {j: torch.exp(cosine(z_ND[i], z_ND[j]) / tau) for j in others}
        own = sum(weights[j] for j in others if class_N[j] == class_N[i])
        total = total - torch.log(own / sum(weights.values()))
    return total / len(z_ND)


@pytest.mark.parametrize("tau", [0.1, 0.5])
def test_equals_the_transcription_in_value_and_gradient(tau):
    """Catches a row that is its own neighbour, supports without gradient, a sum in the mean's place, and a temperature
    that nobody reads."""
    generator = torch.Generator().manual_seed(0)
    z_ND = torch.randn(9, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    class_N = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    loss, slow = suncet_loss(z_ND, class_N, tau=tau), slow_suncet_loss(z_ND, class_N, tau)
    assert loss.item() == pytest.approx(slow.item(), rel=1e-12)
    got, expected = torch.autograd.grad(loss, z_ND)[0], torch.autograd.grad(slow, z_ND)[0]
    assert ((got - expected).norm() / expected.norm()).item() < 1e-9


def test_rows_that_cannot_be_told_apart():
    """Each row's own class then has its share of the others: 2 of 5. Finite in float32 also where rows are far apart,
    at cosines of -1 and a tau at which exp(1 / tau) overflows."""
    assert suncet_loss(torch.ones(6, 4), torch.arange(6) % 2).item() == pytest.approx(math.log(5 / 2))
    z_ND = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    loss = suncet_loss(z_ND, torch.tensor([0, 0, 1, 1]), tau=0.01)
    loss.backward()
    assert loss.item() == pytest.approx(200.0) and z_ND.grad.isfinite().all()


def small(name, **changes):
    (stage,) = resolve(name)
    return replace(stage.config, encoder=WideResNet(10, 1), out_features=32, precision="fp32", **changes)


@pytest.fixture(scope="module")
def pretrained():
    """PAWS's method and networks, batch norms included, in a state that no fresh network has."""
    torch.manual_seed(1)
    method = small("paws.cifar10", prediction=True).build(FACTS, {})
    nets = method.nets()
    for layer in nets.online.modules():
        if isinstance(layer, GlobalBatchNorm):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2.0)
    return method, nets


def weights_of(method, nets):
    return Weights({"online": nets.online.state_dict()}, to_plain(method.about()), "runs/paws")


def started(pretrained):
    method = small("suncet.cifar10", prediction=True, images_per_class=4).build(FACTS, {})
    nets = method.nets()
    method.start_from(nets, weights_of(*pretrained))
    nets.online.train()
    return method, nets


def test_it_starts_from_the_whole_of_paws(pretrained):
    """Every tap gives what PAWS gave, the prediction head's output included."""
    theirs, their_nets = pretrained
    ours, our_nets = started(pretrained)
    x = torch.randn(4, 3, 16, 16)
    their_nets.online.eval(), our_nets.online.eval()
    with torch.no_grad():
        for tap in ("backbone", "h", "z"):
            assert torch.equal(ours.embed(our_nets, x, tap), theirs.embed(their_nets, x, tap))


def test_statistics_stay_and_affine_parameters_are_trained(pretrained):
    """Catches batch norms that see the batch, and weights frozen along with the statistics."""
    method, nets = started(pretrained)
    nets.online.double()
    norms = [layer for layer in nets.online.modules() if isinstance(layer, GlobalBatchNorm)]
    before = [{name: t.clone() for name, t in layer.state_dict().items()} for layer in norms]
    optimizer = method.optimizer(nets)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    class_N = torch.arange(3).repeat_interleave(4)
    nothing = torch.zeros(12, dtype=torch.int64)
    x = torch.randn(24, 3, 16, 16, generator=torch.Generator().manual_seed(2)).double()
    part = Part({"labelled": x}, ids=nothing, labels=class_N, columns=class_N, keys=nothing, positions=nothing)
    for _ in range(2):
        loss = method.loss(nets, Batch({"labelled": part}, torch.tensor(0)))["total"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for layer, old in zip(norms, before, strict=True):
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, old[name]) == (name not in ("weight", "bias"))


def test_rates_fall_from_a_tenth_to_a_hundredth_in_180_steps():
    """PAWS's appendix: 6 steps of 640 images a pass over 4,000 labels, 30 passes."""
    (stage,) = resolve("suncet.cifar10")
    method = stage.config.build(FACTS, {})
    (stream,) = method.plan().streams
    assert stage.length.steps(4000 // stream.batch_global) == 180
    rates = [method.rates(step, Horizon(6, 180)) for step in (0, 90, 180)]
    assert [rate for pair in rates for rate in pair] == pytest.approx([0.1, 0.1, 0.055, 0.055, 0.01, 0.01])


def test_what_does_not_fit_is_refused():
    method = small("suncet.cifar10", images_per_class=4).build(FACTS, {})
    theirs = small("paws.cifar10")
    wide, headed = (
        replace(theirs, **change).build(FACTS, {}) for change in ({"encoder": WideResNet(10, 2)}, {"prediction": True})
    )
    with pytest.raises(WeightsError, match="another encoder: --set encoder.widen=2 would take it; nothing loaded"):
        method.start_from(method.nets(), weights_of(wide, wide.nets()))
    with pytest.raises(WeightsError, match="prediction"):
        method.start_from(method.nets(), weights_of(headed, headed.nets()))
    gelu = replace(theirs, hidden_features=16, activation="gelu").build(FACTS, {})
    weights, form = weights_of(gelu, gelu.nets()), replace(method.config, hidden_features=16)
    with pytest.raises(WeightsError, match="has gelu in its heads: --set activation=gelu would take it; nothing"):
        (method := form.build(FACTS, {})).start_from(method.nets(), weights)
    method = replace(form, activation="gelu").build(FACTS, {})
    method.start_from(nets := method.nets(), weights)
    assert any(isinstance(layer, torch.nn.GELU) for layer in nets.online.projection)
    with pytest.raises(ConfigError, match="a row needs another one of its class"):
        replace(method.config, images_per_class=1, view=replace(method.config.view, copies=1))
    with pytest.raises(ConfigError, match="a temperature, above zero"):
        replace(method.config, tau=0.0)


def test_the_papers_way_is_momentum_sgd_on_images_as_they_are():
    """Appendix C: 180 steps of 640 images, rate .1 along a cosine, no decay. Catches the code's two flipped views and
    LARS under the paper's name; and one command that leaves PAWS out."""
    (stage,) = resolve("suncet.cifar10_sgd")
    c = stage.config
    assert (c.view.ops, c.view.copies, c.classes_global * c.images_per_class) == ((), 1, 640)
    assert (c.optimizer, c.rate) == (Sgd(momentum=0.9, weight_decay=0.0), WarmupCosine(0.1))
    assert stage.length.steps(4000 // 640) == 180
    pretrain, tuned = resolve("suncet.cifar10_two_stages")
    assert (pretrain,) == resolve("paws.cifar10") and tuned.needs == {"init": Ref(stage=pretrain.name)}
    assert tuned.config == resolve("suncet.cifar10")[0].config
