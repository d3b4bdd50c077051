"""What S4L's paper varies: VAT's divergence both ways, which images and turns count, labels that are believed, and
self-supervision alone with a linear classifier after it. Against loops in float64 from the paper's formulas."""

import json
import math
from dataclasses import replace

import pytest
import torch

from fastssl.errors import ConfigError
from fastssl.methods.base import Artefact, Facts
from fastssl.methods.pseudo_labels import PseudoLabels, pseudo_labels
from fastssl.methods.s4l import Exemplar, LabelConfig, Rotation, S4lConfig, Vat, rotation_loss
from fastssl.nn.encoders.resnet import ResNet
from fastssl.recipes.resolve import recipes, resolve
from loaders.files import sha256_of
from loaders.loader import Loader, bind
from loaders.plan.views import SIGNED, Rrc, View, Whole
from loaders.store.data import open_data

FACTS = Facts(10, 1, 0, train_fingerprint="digits")


def config(**changes):
    settings = {"eval_view": View("eval", 8, Whole(), pixels=SIGNED), "labels": "per-class=10", "precision": "fp32"}
    settings |= {"view": View("crop", 8, Rrc((0.5, 1.0)), pixels=SIGNED), "batch_global": 8}
    return S4lConfig("digits", encoder=ResNet(10, stem="cifar", base_width=4), **settings | changes)


def built(its_config):
    """A method in float64, its networks and its first batch; what the network returned is in `method.seen`."""
    torch.manual_seed(0)
    method = its_config.build(FACTS, {})
    nets = method.nets()
    nets.online.double()
    with Loader(bind(method.plan(), open_data(("digits",))), threads=1) as loader:
        batch = next(iter(loader.batches(0, 1)))
    for part in batch.parts.values():
        part.x = {view: x.double() for view, x in part.x.items()}
    forward = nets.online.forward

    def watched(*arguments):
        method.seen = forward(*arguments)
        return method.seen

    nets.online.forward = watched
    return method, nets, batch


def loop_softmax(row):
    powers = [math.exp(v - max(row)) for v in row]
    return [power / sum(powers) for power in powers]


def loop_kl(p_rows, q_rows):
    """Mean over rows of sum p log(p / q), both as logits."""
    total = 0.0
    for p_row, q_row in zip(p_rows.tolist(), q_rows.tolist(), strict=True):
        p, q = loop_softmax(p_row), loop_softmax(q_row)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return total / len(p_rows)


def test_vat_s_divergence_goes_both_ways():
    """Section 3.2 prints KL(p(x) || p(x + r)), the release has the reverse. Value, and gradient in the perturbed branch
    alone, against the formulas: of KL(p || q) in q's logits it is q - p, in p's logits p (log p / q - KL)."""
    torch.manual_seed(1)
    perturbed, clean = (torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    adversarial, plain = perturbed.detach().softmax(dim=1), clean.detach().softmax(dim=1)
    printed = Vat(divergence="paper").between(perturbed, clean).mean()
    assert printed.item() == pytest.approx(loop_kl(clean, perturbed), rel=1e-12)
    (gradient,) = torch.autograd.grad(printed, perturbed)
    expected = (adversarial - plain) / 6
    assert ((gradient - expected).norm() / expected.norm()).item() < 1e-9
    released = Vat().between(perturbed, clean).mean()
    assert released.item() == pytest.approx(loop_kl(perturbed, clean), rel=1e-12)
    (gradient,) = torch.autograd.grad(released, perturbed)
    log_ratio = (adversarial / plain).log()
    expected = adversarial * (log_ratio - (adversarial * log_ratio).sum(dim=1, keepdim=True)) / 6
    assert ((gradient - expected).norm() / expected.norm()).item() < 1e-9
    assert not torch.autograd.grad(Vat().between(perturbed, clean).sum(), clean, allow_unused=True)[0]


def test_the_ablations_of_section_4_4():
    """Self-supervision off labelled images, and the class's loss on upright copies alone. Catches the wrong stream's
    rows, and turns mistaken for images."""
    settings = {"rotation": Rotation(), "self_supervised_on": "unlabelled", "class_on": "upright"}
    method, nets, batch = built(config(**settings))
    values = method.loss(nets, batch)
    assert values["rotation"].item() == pytest.approx(rotation_loss(method.seen["turn"][32:]).item(), rel=1e-12)
    logits, labels = method.seen["logits"], batch.parts["labelled"].labels
    upright = -sum(math.log(loop_softmax(logits[b].tolist())[labels[b]]) for b in range(8)) / 8
    assert values["class"].item() == pytest.approx(upright, rel=1e-12)
    both = config(rotation=Rotation())
    other, nets, batch = built(both)
    assert other.loss(nets, batch)["rotation"].item() != values["rotation"].item()
    exemplar = config(exemplar=Exemplar(features=8), self_supervised_on="unlabelled", view=replace(both.view, copies=2))
    method, nets, batch = built(exemplar)
    assert method.loss(nets, batch)["exemplar"].isfinite()


def test_labels_that_are_not_believed_count_nothing():
    """Section 4.2's threshold. Catches -1 taken for a class, and a mean over all rows."""
    method, nets, batch = built(config(pseudo_labels=True))
    told = torch.full((1442,), -1)
    ids = batch.parts["labelled"].ids
    told[ids[:3]] = torch.tensor([1, 2, 3])
    nets.frozen.load(told)
    assert nets.frozen.partial
    value = method.loss(nets, batch)["class"].item()
    rows = [loop_softmax(row) for row in method.seen["logits"].tolist()]
    assert value == pytest.approx(-sum(math.log(rows[b][b + 1]) for b in range(3)) / 3, rel=1e-12)
    nets.frozen.load(torch.full((1442,), -1))
    assert method.loss(nets, batch)["class"].item() == 0.0


@pytest.mark.parametrize(("least", "kept"), [(0.0, 8), (1.1, 0)])
def test_images_below_the_confidence_are_not_labelled(least, kept):
    settings = {**vars(config(labels="per-class=1")), "label_view": View("label", 8, Whole(), pixels=SIGNED)}
    method, nets, batch = built(LabelConfig(**settings, least_confidence=least))
    label_B = method.produce(nets, batch)["pseudo_label"]
    hidden = batch.parts["images"].labels < 0
    assert int((label_B[hidden] >= 0).sum()) == min(kept, int(hidden.sum()))
    assert torch.equal(label_B[~hidden], batch.parts["images"].labels[~hidden])


def test_a_threshold_that_leaves_nothing_is_said_at_the_door(tmp_path):
    path = tmp_path / "produced.pt"
    torch.save({"ids": torch.arange(4), "pseudo_label": torch.full((4,), -1)}, path)
    made = {"sha256": sha256_of(path), "inputs": {}, "data": {"images": "digits"}, "num_images": 4}
    (tmp_path / "result.json").write_text(json.dumps({"made_of": made}))
    with pytest.raises(ConfigError, match=r"labels no image: lower label\.least_confidence"):
        pseudo_labels(FACTS, {"labels": Artefact(path, sha256_of(path))})
    assert not PseudoLabels().partial


def test_self_supervision_alone_sees_no_label_and_has_no_classifier():
    """Section 4.3: a pass over all images makes an epoch, and a set without labels will do. Catches images shown twice,
    and a classifier that nothing trains."""
    method, nets, batch = built(config(class_weight=0.0, rotation=Rotation()))
    assert list(batch.parts) == ["unlabelled"] and method.plan().epoch_of == "unlabelled"
    assert not hasattr(nets.online, "fc") and method.taps == ("backbone",)
    values = method.loss(nets, batch)
    assert values.keys() == {"total", "rotation"}
    values["total"].backward()
    assert all(p.grad is not None for p in nets.online.parameters())
    config(class_weight=0.0, rotation=Rotation()).build(Facts(0, 1, 0), {}).nets()


def test_a_linear_evaluation_trains_the_classifier_alone():
    """On crops and flips, by batch norms as they were. Catches statistics that move, and a trunk that is trained."""
    method, nets, batch = built(config(trained="classifier"))
    nets.online.train()
    before = {name: tensor.clone() for name, tensor in nets.online.trunk.state_dict().items()}
    optimizer = method.optimizer(nets)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {
        id(p) for p in nets.online.fc.parameters()
    }
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    weight = nets.online.fc.weight.clone()
    method.loss(nets, batch)["total"].backward()
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in nets.online.trunk.state_dict().items())
    assert not torch.equal(nets.online.fc.weight, weight)


def test_recipes_of_the_ablations_resolve():
    """Section 4.2's and 4.4's settings by `--set`, and the rows with 1 %, 100 % and another network."""
    (stage,) = resolve("s4l.vat", ("vat.divergence=paper", "vat.epsilon=39.7"))
    assert (stage.config.vat.divergence, stage.config.vat.epsilon) == ("paper", 39.7)
    teach, label, learn = resolve("s4l.pseudo_label", ("label.least_confidence=.5",))
    assert label.config.least_confidence == 0.5 and learn.config.pseudo_labels and not teach.config.pseudo_labels
    for name in ("rotation", "exemplar", "vat", "vat_entmin"):
        (stage,) = resolve(f"s4l.{name}_1pct")
        c = stage.config
        assert (c.labels, c.rate.peak, c.optimizer.weight_decay, stage.length.count) == ("s4l-1", 0.01, 1e-2, 1000)
    assert resolve("s4l.rotation_rn152w2_1pct")[0].config.encoder.name == "ResNet-v2-152 2x"
    (linear,) = resolve("s4l.linear_1pct")
    assert linear.config.trained == "classifier" and "init" in linear.needs
    assert {f"s4l.{name}" for name in ("supervised_100pct", "moam_100pct", "exemplar_pretrain")} <= recipes().keys()
