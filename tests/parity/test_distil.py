"""Distillation's loss against a loop-by-loop float64 transcription, its teacher while the student trains, and teachers
that are refused."""

import math
from dataclasses import replace

import pytest
import torch

from fastssl.config.plain import to_plain
from fastssl.errors import ConfigError
from fastssl.methods.base import Facts, Horizon, Nets
from fastssl.methods.distil import DistilConfig, distillation, labelled_cross_entropy
from fastssl.methods.supervised import Classifier, FirstLayer, SupervisedConfig
from fastssl.nn.encoders.resnet import ResNet, SimclrResNet
from fastssl.weights.read import Weights, WeightsError
from loaders.batch import Batch, Part
from loaders.plan.views import CIFAR10, UNIT, All, Complement, PerClass, View, Whole

IMAGES, CLASSES = 6, 4
VIEW = View("student", 8, Whole(), pixels=UNIT)
FACTS = Facts(CLASSES, 1, 0)


def logits(seed):
    return torch.randn(IMAGES, CLASSES, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(row, temperature=1.0):
    weights = [torch.exp(value / temperature) for value in row]
    return [weight / sum(weights) for weight in weights]


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_distillation_equals_its_transcription(temperature):
    """Value, and gradient of the student alone. Catches teacher and student exchanged, a temperature on one side only,
    a sum for the mean, and a factor of temperature squared."""
    student, teacher = logits(0).requires_grad_(), logits(1).requires_grad_()
    expected = 0.0
    for s, t in zip(student, teacher.detach(), strict=True):
        for p, q in zip(softmax(t, temperature), softmax(s, temperature), strict=True):
            expected = expected - p * torch.log(q) / IMAGES
    value = distillation(student, teacher, temperature=temperature)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    (wanted,), (got,) = (torch.autograd.grad(loss, student, retain_graph=True) for loss in (expected, value))
    assert (got - wanted).norm() < 1e-9 * wanted.norm()
    value.backward()
    assert teacher.grad is None


def test_hidden_labels_count_nothing_and_all_images_divide():
    """Two of six images show their label. Catches hidden ones read as the last class, and a mean over labelled images
    alone, which would weigh a label more the fewer there are."""
    student = logits(0)
    labels = torch.tensor([-1, 2, -1, -1, 0, -1])
    expected = -(math.log(softmax(student[1])[2]) + math.log(softmax(student[4])[0])) / IMAGES
    assert labelled_cross_entropy(student, labels).item() == pytest.approx(expected, rel=1e-12)
    assert labelled_cross_entropy(student, torch.full((IMAGES,), -1)).item() == 0.0


# ------------------------------------------------------------------------------------------------------- the teacher


class Given:
    """Stands for an artefact."""

    def __init__(self, weights):
        self._weights = weights

    def weights(self):
        return self._weights


def fine_tuned(head=None, num_classes=CLASSES, pixels=UNIT, encoder=None):
    """A classifier of random weights and statistics, and its weights as a checkpoint gives them."""
    torch.manual_seed(1)
    encoder = encoder or SimclrResNet(10, stem="cifar", base_width=4)
    config = SupervisedConfig("digits", replace(VIEW, pixels=pixels), encoder=encoder, head=head)
    net = Classifier(config, replace(FACTS, num_classes=num_classes))
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) * 0.2 + 0.1)
        net.fc.weight.normal_()
    about = {"method": "Supervised", "config": to_plain(config), "facts": to_plain(FACTS)}
    return net, Weights({"online": net.state_dict()}, about, "the run")


def distil(weights=None, **changes):
    config = DistilConfig("digits", VIEW, view=VIEW, encoder=ResNet(10, stem="cifar", base_width=4), precision="fp32")
    inputs = {} if weights is None else {"teacher": Given(weights)}
    return replace(config, **{"batch_global": IMAGES, "temperature": 1.0} | changes).build(FACTS, inputs)


def batch(seed=0):
    x = torch.rand(IMAGES, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    rows = torch.arange(IMAGES)
    return Batch({"unlabelled": Part({"student": x}, rows, rows % CLASSES, None, rows, rows)}, torch.tensor(0))


@pytest.mark.parametrize("head", [None, FirstLayer(8, bias=False), FirstLayer(8, bias=True)])
def test_the_teacher_answers_as_it_did_and_stays_as_it_is(head):
    """With another encoder than the student's, with and without the first projection layer, over three steps in which
    the student trains. Catches batch statistics in the teacher, running ones that move, other pixels than the
    student's, a layer lost, a gradient that reaches it."""
    net, weights = fine_tuned(head)
    method = distil(weights)
    nets = method.nets()
    method.load_inputs(nets)
    nets.online.train()
    before = {name: tensor.clone() for name, tensor in nets.frozen.state_dict().items()}
    optimizer = method.optimizer(nets)
    for step in range(3):
        x = batch(step).parts["unlabelled"].x["student"]
        expected = net.eval()(x)
        loss = method.loss(nets, batch(step))
        torch.testing.assert_close(method._seen[1], expected, rtol=0, atol=0)
        loss["total"].backward()
        for group, rate in zip(optimizer.param_groups, method.rates(step + 1, Horizon(9, 9)), strict=True):
            group["lr"] = rate
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in nets.frozen.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in nets.frozen.parameters())
    assert not any(module.training for module in nets.frozen.modules())
    assert all(p.grad is not None for p in nets.online.parameters())
    assert not hasattr(nets.online.first, "fc1")


def test_the_parts_of_the_loss_add_up():
    """alpha of distillation, which the notebook's factor multiplies, and the rest of the labels; none without them."""
    _, weights = fine_tuned()
    losses = []
    for changes in ({}, {"alpha": 0.25}, {"alpha": 0.25, "temperature": 0.1, "times_temperature_squared": True}):
        torch.manual_seed(0)
        method = distil(weights, **changes)
        nets = method.nets()
        method.load_inputs(nets)
        losses.append({name: value.item() for name, value in method.loss(nets, batch()).items()})
    alone, both, cold = losses
    assert alone == {"total": alone["distillation"], "distillation": pytest.approx(both["distillation"])}
    assert both["total"] == pytest.approx(0.25 * both["distillation"] + 0.75 * both["cross_entropy"])
    assert cold["total"] == pytest.approx(0.25 * 0.01 * cold["distillation"] + 0.75 * cold["cross_entropy"])
    assert both["cross_entropy"] > 0.5


def test_labels_show_only_where_the_loss_wants_them():
    assert distil(labels="per-class=3").plan().streams[0].visible == All()  # read by nothing
    assert distil(labels="per-class=3", alpha=0.5).plan().streams[0].visible == PerClass(3)


def apart(**changes):
    """A method whose labelled images are a set of their own, and what it sees of both."""
    config = distil(**changes).config
    method = config.build(replace(FACTS, one_set=False), {"teacher": Given(fine_tuned()[1])})
    streams = {stream.name: stream for stream in method.plan().streams}
    return method, streams


def test_labelled_images_of_their_own_are_seen_with_their_labels():
    """Equation 3 sums over labelled images, wherever they lie. Catches a cross-entropy that is 0 throughout, labels of
    the unlabelled source, which are of other classes, and labelled images that are not distilled."""
    method, streams = apart(alpha=0.25, labels="per-class=3", labelled_batch=2)
    assert streams["labelled"].batch_global == 2 and streams["labelled"].ids == PerClass(3)
    assert streams["unlabelled"].visible == Complement(All())
    nets = method.nets()
    method.load_inputs(nets)
    unlabelled, labelled = batch(0).parts["unlabelled"], batch(1).parts["unlabelled"]
    hidden = replace(unlabelled, labels=torch.full((IMAGES,), -1))
    nets.online.eval()
    parts = method.loss(nets, Batch({"unlabelled": hidden, "labelled": labelled}, torch.tensor(0)))
    x = torch.cat([unlabelled.x["student"], labelled.x["student"]])
    log_p, teacher = nets.online(x).detach().double().log_softmax(dim=1), nets.frozen(x).double().softmax(dim=1)
    told = -sum(row[c].item() for row, c in zip(log_p[IMAGES:], labelled.labels, strict=True)) / len(x)
    taught = -sum((q * row).sum().item() for q, row in zip(teacher, log_p, strict=True)) / len(x)
    assert parts["cross_entropy"].item() == pytest.approx(told, rel=1e-5) and told > 0.1
    assert parts["total"].item() == pytest.approx(0.25 * taught + 0.75 * told, rel=1e-5)


def test_streams_of_a_student():
    """By default labelled images of their own come an eighth beside; without labels in the loss they do not come; and
    the labelled set alone is table 2's second row."""
    assert apart(alpha=0.5, batch_global=64)[1]["labelled"].batch_global == 8
    assert apart()[1].keys() == {"unlabelled"} == {s.name for s in distil(alpha=0.5).plan().streams}
    alone = distil(images="labelled", labels="per-class=3", batch_global=4).plan()
    assert alone.epoch_of == "labelled" and [(s.name, s.ids) for s in alone.streams] == [("labelled", PerClass(3))]


def test_a_student_that_agrees_is_told_so():
    """Logged beside the loss: who agrees, and the least that the loss can come to."""
    method = distil()
    method._seen = logits(0), logits(0)
    assert method.metrics(Nets(torch.nn.Identity()), batch(), {})["agreement"] == 1
    method._seen = -logits(0), logits(0)
    told = method.metrics(Nets(torch.nn.Identity()), batch(), {})
    entropy = -sum(p * math.log(p) for row in logits(0) for p in softmax(row)) / IMAGES
    assert told["agreement"] == 0 and told["teacher_entropy"].item() == pytest.approx(float(entropy), rel=1e-12)


def without(weights, part):
    kept = {name: tensor for name, tensor in weights.nets["online"].items() if not name.startswith(part)}
    return replace(weights, nets={"online": kept})


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: without(fine_tuned()[1], "fc."), "the run has no classifier"),
        (lambda: fine_tuned(num_classes=7)[1], "the run tells 7 classes apart, the labelled data has 4"),
        (lambda: fine_tuned(pixels=CIFAR10)[1], r"mean \[0.4914, 0.4822, 0.4465\].* this recipe has mean \[0.0\]"),
        (lambda: replace(fine_tuned()[1], about={}), "does not say which encoder"),
        (lambda: without(fine_tuned()[1], "trunk.layer3."), "trunk.layer3.*; nothing loaded"),
        (lambda: without(fine_tuned(FirstLayer(8, bias=False))[1], "first."), "fc.weight.*; nothing loaded"),
    ],
)
def test_no_teacher_for_this_student(made, said):
    """At the door, in the user's words; and nothing of it is kept."""
    method = distil(made())
    nets = method.nets()
    with pytest.raises(WeightsError, match=said):
        method.load_inputs(nets)
    assert nets.frozen is None


@pytest.mark.parametrize(
    ("changes", "said"), [({"temperature": 0.0}, "above zero"), ({"alpha": 1.5}, "between 0 and 1")]
)
def test_settings_that_cannot_be_are_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        distil(**changes)
