"""S4L's losses against loop-by-loop float64 transcriptions, value and gradient; which images they see; schedules."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastssl import dist
from fastssl.errors import ConfigError
from fastssl.losses.adversarial import curvature_product, divergence, entropy, unit
from fastssl.losses.triplet import exemplar_identities, exemplar_loss
from fastssl.methods.base import Epochs, Facts, Horizon
from fastssl.methods.s4l import (
    TURNS,
    Exemplar,
    LabelConfig,
    Rotation,
    S4lConfig,
    Vat,
    rotation_loss,
)
from fastssl.nn.encoders.resnet import ResNet
from fastssl.nn.encoders.vit import ViT
from fastssl.nn.recompute import recompute_blocks
from fastssl.recipes.resolve import resolve
from loaders.errors import PlanError
from loaders.loader import Loader, bind
from loaders.plan.plan import StreamFacts
from loaders.plan.views import SIGNED, FiveCrops, Rrc, View, Whole
from loaders.store.data import DataSets, open_data
from loaders.store.source import ArraySource

IMAGES, COPIES, CLASSES, WIDTH = 4, 3, 5, 6
CPU = torch.device("cpu")


def rows(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def assert_same(got, expected, leaf):
    """Two 0-dim tensors, in value and in gradient with respect to `leaf`."""
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    one, other = (torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in (got, expected))
    assert ((one - other).norm() / other.norm()).item() < 1e-9


# --------------------------------------------------------------------------------------------------- transcriptions


def slow_probabilities(logits):
    powers = [torch.exp(value) for value in logits]
    return [power / sum(powers) for power in powers]


def test_rotation_equals_its_transcription():
    """Catches labels that count images in place of turns."""
    logits = rows(4 * IMAGES, 4)
    expected = 0.0
    for turn in range(4):
        for image in range(IMAGES):
            expected = expected - torch.log(slow_probabilities(logits[turn * IMAGES + image])[turn]) / (4 * IMAGES)
    assert_same(rotation_loss(logits), expected, logits)


def test_divergence_and_entropy_equal_their_transcriptions():
    """KL(p || q) in this order, gradient through p; catches the reverse, which the paper prints."""
    logits, other = rows(IMAGES, CLASSES), rows(IMAGES, CLASSES, seed=1)
    kl, uncertainty = 0.0, 0.0
    for i in range(IMAGES):
        p, q = slow_probabilities(logits[i]), slow_probabilities(other[i].detach())
        for k in range(CLASSES):
            kl = kl + p[k] * (torch.log(p[k]) - torch.log(q[k])) / IMAGES
            uncertainty = uncertainty - p[k] * torch.log(p[k]) / IMAGES
    assert_same(divergence(logits, other.detach()).mean(), kl, logits)
    assert_same(entropy(logits).mean(), uncertainty, logits)


def slow_triplets(z, identity):
    """Batch-hard over rows z [M, D] whose identities are a list."""

    def unit(row):
        return row / torch.sqrt(sum(v * v for v in row))

    def distance(a, b):
        return torch.sqrt(sum((a[d] - b[d]) ** 2 for d in range(len(a))))

    unit_rows, losses = [unit(row) for row in z], []
    for m, anchor in enumerate(unit_rows):
        positives = [distance(anchor, unit_rows[o]) for o in range(len(z)) if o != m and identity[o] == identity[m]]
        negatives = [distance(anchor, unit_rows[o]) for o in range(len(z)) if identity[o] != identity[m]]
        losses.append(torch.log(1 + torch.exp(max(positives) - min(negatives))))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("num_cores", [None, 1, 2])
def test_exemplar_equals_its_transcription(num_cores):
    """Within each core. Catches squared distances, a margin, the nearest positive, rows taken for image-major."""
    z = rows(COPIES * IMAGES, WIDTH)
    size = IMAGES // (num_cores or 1)
    expected = 0.0
    for core in range(num_cores or 1):
        images = range(core * size, (core + 1) * size)
        members = [(copy * IMAGES + image, image) for copy in range(COPIES) for image in images]
        expected = expected + slow_triplets([z[row] for row, _ in members], [image for _, image in members])
    assert_same(exemplar_loss(z, IMAGES, num_cores), expected / (num_cores or 1), z)


def test_swapped_identities_are_the_release_s():
    """Eight copies of sixteen images: rows numbered image by image count as one image in sixteens, so as eight of two.
    Right with as many images as copies."""
    by_image = exemplar_identities(16, 8, CPU, compat=True).T.flatten()
    assert by_image.tolist() == [row // 16 for row in range(128)]
    assert torch.equal(exemplar_identities(8, 8, CPU, compat=True), exemplar_identities(8, 8, CPU))
    z = rows(COPIES * IMAGES, WIDTH)
    identity = [(image * COPIES + copy) // IMAGES for copy in range(COPIES) for image in range(IMAGES)]
    assert_same(exemplar_loss(z, IMAGES, 1, compat=True), slow_triplets(list(z), identity), z)


# ----------------------------------------------------------------------------------------------------- the joint loss


def config(**changes):
    settings = {
        "dataset": "digits",
        "eval_view": View("eval", 8, Whole(), pixels=SIGNED),
        "labels": "per-class=10",
        "precision": "fp32",
        "encoder": ResNet(10, stem="cifar", base_width=4),
        "view": View("crop", 8, Rrc((0.5, 1.0)), pixels=SIGNED),
        "batch_global": 8,
    }
    return S4lConfig(**settings | changes)


def first_batch(method):
    with Loader(bind(method.plan(), open_data(("digits",)))) as loader:
        (batch,) = loader.batches(0, 1)
    for part in batch.parts.values():
        part.x = {view: x.double() for view, x in part.x.items()}
    return batch


def built(made):
    """(method, float64 networks in training mode, its first batch)"""
    torch.manual_seed(0)
    method = made.build(Facts(10, 1, 0), {})
    nets = method.nets()
    nets.online.double()
    return method, nets, first_batch(method)


def watched(nets):
    """What the online network is given and returns from now on."""
    seen = {}
    nets.online.register_forward_hook(lambda module, args, out: seen.update(x=args[0], noise=args[2], **out))
    return seen


def by_cores(nets, config, num_cores):
    """(x, num_images) -> the trunk's features, each core's images run by themselves through the same weights with plain
    batch norm; and the classifier that belongs to it."""
    plain = replace(config, core_images=None).build(Facts(10, 1, 0), {}).nets().online.double()
    plain.load_state_dict(nets.online.state_dict())

    def features(x, num_images):
        size, found = num_images // num_cores, {}
        for core in range(num_cores):
            rows = [row for row in range(len(x)) if row % num_images // size == core]
            found |= dict(zip(rows, plain.trunk(x[rows]), strict=True))
        return torch.stack([found[row] for row in range(len(x))])

    return features, plain


def test_virtual_cores_of_a_network_without_batch_norm_are_refused():
    """A setting that would do nothing."""
    vit = replace(config(core_images=2, rotation=Rotation()), encoder=ViT(8, 4, 8, 1, 2))
    with pytest.raises(
        ConfigError, match="no batch norm, so virtual cores of 2 images mean nothing: --set core_images=no"
    ):
        vit.build(Facts(10, 1, 0), {}).nets()
    replace(vit, core_images=None).build(Facts(10, 1, 0), {}).nets()


@pytest.mark.parametrize("core_images", [None, 2, 4])
def test_features_are_those_of_each_core_s_images(core_images):
    """In the order of the rows, of two streams and four turns. Catches rows that stay as the cores had them, and a core
    of a view's images or of a stream's instead of its own."""
    method, nets, batch = built(config(core_images=core_images, rotation=Rotation()))
    x = torch.cat([part.x["crop"] for part in batch.parts.values()])
    features, _ = by_cores(nets, method.config, 8 // (core_images or 8))
    with torch.no_grad():
        torch.testing.assert_close(nets.online.features(x, 8), features(x, 8), rtol=1e-9, atol=1e-9)


def test_turns_are_those_of_rot90():
    method, _, batch = built(config(rotation=Rotation()))
    for part in batch.parts.values():
        x = part.x["crop"].permute(0, 2, 3, 1).numpy()
        for turn in TURNS:
            for image in range(8):
                assert np.array_equal(x[turn * 8 + image], np.rot90(x[image], turn))
    assert [view.turns for stream in method.plan().streams for view in stream.views] == [TURNS, TURNS]


TERMS = {"rotation": Rotation(0.4), "vat": Vat(0.2, epsilon=2.0), "entropy_weight": 0.7, "class_weight": 0.3}


@pytest.mark.parametrize("smoothed", ["all", "unlabelled"])
@pytest.mark.parametrize("core_images", [None, 4])
def test_the_total_is_made_of_its_terms_and_of_the_right_images(smoothed, core_images):
    """Class: all turns of the labelled images. Rotation: labelled and all images, half each. VAT and entropy: both, or
    the unlabelled alone. Catches a term made of the other stream's rows of what the network returns."""
    method, nets, batch = built(config(smoothed=smoothed, core_images=core_images, **TERMS))
    seen = watched(nets)
    values = method.loss(nets, batch)
    labelled, unlabelled = batch.parts["labelled"], batch.parts["unlabelled"]
    assert torch.equal(seen["x"], torch.cat([labelled.x["crop"], unlabelled.x["crop"]]))
    logits, turn = seen["logits"], seen["turn"]
    clean = logits if smoothed == "all" else logits[32:]
    expected = {
        "class": F.cross_entropy(logits[:32], torch.cat([labelled.labels] * 4)),
        "rotation": (rotation_loss(turn[:32]) + rotation_loss(turn[32:])) / 2,
        "vat": divergence(seen["adversarial"], clean).mean(),
        "entropy": entropy(clean).mean(),
        "perturbation": torch.tensor(2.0),
    }
    assert {name: value.item() for name, value in values.items() if name != "total"} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-12
    )
    total = 0.3 * expected["class"] + 0.4 * expected["rotation"] + 0.2 * expected["vat"] + 0.7 * expected["entropy"]
    assert values["total"].item() == pytest.approx(total.item(), rel=1e-12)
    assert len(seen["noise"]) == len(seen["adversarial"]) == len(clean)


@pytest.mark.parametrize("smoothed", ["all", "unlabelled"])
@pytest.mark.parametrize("core_images", [None, 4])
def test_vat_s_gradient_is_that_of_the_perturbed_branch(smoothed, core_images):
    """With p(x) and r as constants, of the images that are smoothed, each among its core's. Catches gradient through
    the clean logits or through the search for r, and the labelled images perturbed for the unlabelled."""
    changes = {"vat": Vat(1.0, epsilon=2.0), "class_weight": 0.0, "smoothed": smoothed, "core_images": core_images}
    method, nets, batch = built(config(**changes))
    features, plain = by_cores(nets, method.config, 8 // (core_images or 8))
    seen = watched(nets)
    got = torch.autograd.grad(method.loss(nets, batch)["total"], list(nets.online.parameters()))

    def classify(x):
        return plain.fc(features(x, 8))

    labelled, unlabelled = (batch.parts[name].x["crop"] for name in ("labelled", "unlabelled"))
    with torch.no_grad():
        clean = classify(torch.cat([labelled, unlabelled]))
    x = torch.cat([labelled, unlabelled]) if smoothed == "all" else unlabelled
    r = 2.0 * unit(curvature_product(classify, x, unit(seen["noise"])))
    loss = divergence(classify(x + r), clean[-len(x) :]).mean()
    expected = torch.autograd.grad(loss, list(plain.parameters()))
    whole = torch.cat([g.flatten() for g in expected]).norm()
    assert max((one - other).norm() / whole for one, other in zip(got, expected, strict=True)) < 1e-9


@pytest.mark.parametrize("product", ["exact", "differences"])
@pytest.mark.parametrize("core_images", [None, 4])
def test_recomputed_steps_with_vat_are_the_kept_ones(product, core_images):
    """`--step eager-recompute`: gradients and running statistics. Catches a perturbed pass that is computed again as
    one that counts."""
    method, nets, batch = built(config(vat=Vat(product=product), core_images=core_images))
    again = copy.deepcopy(nets)
    assert recompute_blocks(again.online) > 0
    for each in (nets, again):
        method.loss(each, batch)["total"].backward()
    for one, other in zip(nets.online.parameters(), again.online.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    for one, other in zip(nets.online.buffers(), again.online.buffers(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("product", ["exact", "differences"])
@pytest.mark.parametrize("core_images", [None, 4])
def test_perturbed_passes_leave_running_statistics_bitwise_alone(product, core_images):
    """A step with VAT leaves the statistics that one without leaves."""
    buffers = []
    for vat in (Vat(product=product), None):
        method, nets, batch = built(config(vat=vat, entropy_weight=1.0, core_images=core_images))
        method.loss(nets, batch)
        buffers.append(dict(nets.online.named_buffers()))
    assert all(torch.equal(value, buffers[1][name]) for name, value in buffers[0].items())
    assert buffers[0]["trunk.bn1.num_batches_tracked"] == 1


@pytest.mark.parametrize("product", ["exact", "differences"])
@pytest.mark.parametrize("core_images", [None, 4])
def test_the_release_s_normaliser_shortens_perturbations(product, core_images):
    """By the gradient of the mean of a core's rows at the release's step of 1e-6, where that is below 1e-6. Catches a
    clamp at the step that differences take, and rows of the batch counted for a core's."""
    vat = Vat(epsilon=3.0, product=product, xi=1e-3, normaliser="compat")
    method, nets, batch = built(config(vat=vat, core_images=core_images))
    features, plain = by_cores(nets, method.config, 8 // (core_images or 8))
    seen = watched(nets)
    method.loss(nets, batch)
    gradient = 1e-6 * curvature_product(lambda x: plain.fc(features(x, 8)), seen["x"], unit(seen["noise"]))
    lengths = [float(image.norm()) / (2 * (core_images or 8)) for image in gradient]
    expected = [3.0 * length / max(length, 1e-6) for length in lengths]
    assert seen["perturbation"].tolist() == pytest.approx(expected, rel=1e-6 if product == "exact" else 0.02)
    assert min(expected) < 1.0


def test_an_image_s_noise_is_its_own_on_any_number_of_ranks():
    """Catches noise of the batch's rows in place of the images': a rank's share must get its share of the noise."""
    method, nets, batch = built(config(vat=Vat(), smoothed="unlabelled", rotation=Rotation()))
    seen = watched(nets)
    method.loss(nets, batch)
    whole = seen["noise"].unflatten(0, (4, 8))
    for part in batch.parts.values():
        part.x = {view: x.unflatten(0, (4, 8))[:, 4:].flatten(0, 1) for view, x in part.x.items()}
        part.ids, part.labels, part.keys = part.ids[4:], part.labels[4:], part.keys[4:]
    method.loss(nets, batch)
    assert torch.equal(seen["noise"].unflatten(0, (4, 4)), whole[:, 4:])


# ----------------------------------------------------------------------------------------- schedules, averages, labels


@pytest.mark.parametrize("name, steps", [("s4l.rotation", 500), ("s4l.exemplar", 250), ("s4l.moam", 1000)])
def test_epochs_count_labelled_images(name, steps):
    """10 % of ImageNet, 128 images of each class, are 500 steps at 256; the unlabelled stream has ten times as many."""
    method = resolve(name)[0].config.build(Facts(1000, 3, 0), {})
    every = np.arange(1_281_167)
    facts = StreamFacts(every[:128_000], every % 1000, np.full((len(every), 2), 400, np.int32), 1000)
    bound = method.plan().bind({"labelled": facts, "unlabelled": replace(facts, ids=None)})
    assert bound.steps_per_epoch == steps


def test_rates_rise_and_fall_at_the_right_steps():
    method = resolve("s4l.rotation")[0].config.build(Facts(1000, 3, 0), {})
    horizon = Horizon(500, 100_000)
    at = {0: 0.0, 1250: 0.015, 2500: 0.03, 69_999: 0.03, 70_000: 3e-3, 80_000: 3e-4, 90_000: 3e-5, 99_999: 3e-5}
    assert {step: method.rates(step, horizon)[0] for step in at} == pytest.approx(at)


def test_the_average_has_no_memory_of_the_start():
    """Half of it from the last epoch, over what it has seen, against sums. Catches TensorFlow's average without
    `zero_debias`, averaged running statistics, and a decay per epoch in place of per step."""
    method, nets, _ = built(config(half_life=resolve("s4l.moam")[0].config.half_life))
    horizon, decay = Horizon(3, 12), 0.5 ** (1 / 3)
    nets.target.double()
    history = []
    for step in range(5):
        with torch.no_grad():
            for p in nets.online.parameters():
                p.add_(float(step + 1))
            nets.online.trunk.bn1.running_mean.fill_(step)
        history.append(nets.online.fc.weight.clone())
        method.after_step(nets, step, horizon)
        seen = [decay ** (step - k) for k in range(step + 1)]
        expected = sum(weight * value for weight, value in zip(seen, history, strict=True)) / sum(seen)
        torch.testing.assert_close(nets.target.fc.weight, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(nets.target.trunk.bn1.running_mean, nets.online.trunk.bn1.running_mean)


def test_evaluation_looks_at_the_average():
    method, nets, batch = built(config(half_life=resolve("s4l.moam")[0].config.half_life))
    nets.target.double()
    with torch.no_grad():
        nets.target.fc.weight.zero_()
        nets.target.fc.bias.copy_(torch.arange(10.0))
        logits = method.embed(nets, batch.parts["labelled"].x["crop"], "logits")
    assert torch.equal(logits[0], torch.arange(10.0, dtype=torch.float64))


def test_turned_logits_are_the_mean_over_quarter_turns():
    method, nets, batch = built(config())
    nets.online.eval()
    x = batch.parts["labelled"].x["crop"]
    turned = [torch.from_numpy(np.rot90(x.numpy(), turn, (2, 3)).copy()) for turn in TURNS]
    with torch.no_grad():
        expected = sum(nets.online.fc(nets.online.trunk(each)) for each in turned) / 4
        torch.testing.assert_close(method.embed(nets, x, "turned-logits"), expected, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(method.embed(nets, x, "logits"), expected)


@pytest.mark.parametrize("half_life", [None, Epochs(1)])
def test_images_are_labelled_by_the_mean_logits_of_crops_and_turns(half_life):
    """Twenty views of each image, whose own slices and turns are taken here; labels that show are kept. Catches a vote
    by probabilities or by the first crop alone, rows of one image counted as another's, and labels by the weights
    themselves where there is an average."""
    view = View("label", 6, FiveCrops(), pixels=SIGNED, copies=5, turns=TURNS)
    settings = {**vars(config(batch_global=100, half_life=half_life)), "labels": "per-class=2", "label_view": view}
    method = LabelConfig(**settings).build(Facts(10, 1, 0), {})
    torch.manual_seed(0)
    nets = method.nets()
    nets.online.double().eval()
    votes_by = nets.online if half_life is None else nets.target.double().eval()
    torch.nn.init.normal_(votes_by.fc.weight, std=30.0)  # so sure that a mean of probabilities is another vote
    batch = first_batch(method)
    with torch.no_grad():
        got = method.produce(nets, batch)["pseudo_label"]
    digits = open_data(("digits",)).get("train")
    part, kept, unlike = batch.parts["images"], 0, 0
    for row, image_id in enumerate(part.ids.tolist()):
        image = digits.images[image_id].astype(np.float64) / 255 * 2 - 1
        crops = [image[1:7, 1:7], image[:6, :6], image[:6, 2:], image[2:, :6], image[2:, 2:]]
        turned = np.stack([np.rot90(crop, turn) for crop in crops for turn in TURNS]).transpose(0, 3, 1, 2)
        with torch.no_grad():
            logits = votes_by.fc(votes_by.trunk(torch.from_numpy(np.ascontiguousarray(turned))))
        shown = int(part.labels[row])
        assert got[row] == (shown if shown >= 0 else logits.mean(dim=0).argmax())
        kept += shown >= 0
        unlike += shown < 0 and logits.softmax(dim=1).mean(dim=0).argmax() != logits.mean(dim=0).argmax()
    assert 0 < kept < 100 and unlike > 0
    assert len(set(got.tolist())) > 1


# ---------------------------------------------------------------------------------------------------------- bad input


def test_virtual_cores_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ConfigError, match="batch_global 256 does not divide into virtual cores of 24 images"):
        resolve("s4l.rotation", ("core_images=24",))


def test_virtual_cores_that_ranks_cannot_share_are_refused(monkeypatch):
    monkeypatch.setattr(dist, "world_size", lambda: 3)
    with pytest.raises(ConfigError, match="8 virtual cores of 1, which 3 ranks.*core_images=none"):
        config(core_images=1).build(Facts(10, 1, 0), {}).nets()


@pytest.mark.parametrize("changes", [{"batch_global": 1}, {"core_images": 1}, {"view": View("crop", 8, Whole())}])
def test_exemplar_without_another_image_or_copy_is_refused(changes):
    """One image has no negative, one copy no positive: the loss would compare an image with itself."""
    view = View("crop", 8, Rrc((0.5, 1.0)), copies=8)
    with pytest.raises(ConfigError, match="exemplar tells images apart"):
        config(**{"exemplar": Exemplar(), "view": view} | changes)


def test_classes_without_labelled_images_are_refused():
    digits = open_data(("digits",)).get("train")
    names = (*digits.class_names, "ten")
    data = DataSets({"train": ArraySource("digits", digits.images, digits.labels, names)})
    method = config(labels="all").build(Facts(11, 1, 0), {})
    with pytest.raises(PlanError, match="1 of 11 classes have no labelled image, first class 10"):
        bind(method.plan(), data)
    unlabelled = np.where(np.arange(len(digits)) < 3, -1, digits.labels)
    data = DataSets({"train": ArraySource("digits", digits.images, unlabelled, digits.class_names)})
    with pytest.raises(PlanError, match="3 of its 1442 images carry no label"):
        bind(method.plan(), data)
