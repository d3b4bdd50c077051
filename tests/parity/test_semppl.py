"""SemPPL's loss against loops that spell its equations out, and its step against one written by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastssl.losses.semppl import Byol, Positives, Relic, SimClr, semppl_loss
from fastssl.methods import semppl
from fastssl.methods.base import Epochs, Facts, Horizon
from fastssl.methods.semppl import Semppl, SempplConfig
from fastssl.nn.encoders.resnet import ByolResNet
from fastssl.optim.lars import Lars
from fastssl.optim.rates import WarmupCosine
from fastssl.recipes.relicv2 import without_positives
from fastssl.recipes.resolve import resolve
from loaders.batch import Batch, Part
from loaders.plan.draws import mix, tag, uniforms
from loaders.plan.views import UNIT, Rrc, View, Whole
from tests.parity.test_paws_loss import relative_error
from tests.support.no_waiting import NoWaiting

GLOBAL, WIDTH, NEGATIVES, POSITIVES = 6, 5, 3, 2
ROWS = [2, 3, 5]  # this rank's images among GLOBAL
RELIC = Relic()


def unit(*shape, seed):
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=-1)


def inputs(num_large, num_small, num_negatives=NEGATIVES):
    """Float64 unit rows; the last image has no semantic positive."""
    z_VBD = unit(num_large + num_small, len(ROWS), WIDTH, seed=0)
    target_GLD = unit(GLOBAL, num_large, WIDTH, seed=1)
    others = [[n for n in range(GLOBAL) if n != m][:num_negatives] for m in ROWS]
    positives = Positives(unit(len(ROWS), num_large, POSITIVES, WIDTH, seed=2), torch.tensor([True, True, False]))
    return z_VBD, target_GLD, torch.tensor(ROWS), torch.tensor(others), positives


# ------------------------------------------------------------------------------------------- the equations, spelled out


def p(a, positive, negatives, tau):
    """The distribution over one positive and the negatives, by phi(u, v) = tau exp(<u, v> / tau)."""
    phi = [tau * torch.exp((a @ v) / tau) for v in [positive, *negatives]]
    return [f / sum(phi) for f in phi]


def kl(p1, p2):
    """Without gradient through the entropy of p1."""
    entropy = sum(a * torch.log(a) for a in p1).detach()
    return entropy - sum(a * torch.log(b) for a, b in zip(p1, p2, strict=True))


def slow_relic_terms(z, targets, row, negatives, positives, i, j, m, base):
    """A, S, KA and KS of online view i, target view j and image m."""
    num_large = targets.shape[1]

    def own(view):
        return targets[row[m], view]

    def others(view):
        return [targets[n, view] for n in negatives[m]]

    p1 = p(z[i, m], own(j), others(j), base.tau)
    partner = i if i < num_large else j  # whose targets the other side of the divergence is compared with
    small_and_left_out = i >= num_large and base.small_kl == "none"
    attract, ka = -torch.log(p1[0]), kl(p1, p(z[j, m], own(partner), others(partner), base.tau))
    s, ks = 0.0, 0.0
    if positives is not None and positives.found_B[m]:
        for stored in positives.z_BLPD[m, j]:
            q = p(z[i, m], stored, others(j), base.tau)
            s = s - torch.log(q[0])
            if base.semantic_kl == "stored":
                ks = ks + kl(q, p(stored, own(partner), others(partner), base.tau))
    return (attract, s, 0.0, 0.0) if small_and_left_out else (attract, s, ka, ks)


def slow_byol_terms(z, targets, row, negatives, positives, i, j, m, base):
    def distance(a, b):
        return sum((a[d] - b[d]) ** 2 for d in range(len(a)))

    found = positives is not None and positives.found_B[m]
    s = sum(distance(z[i, m], stored) for stored in positives.z_BLPD[m, j]) if found else 0.0
    return distance(z[i, m], targets[row[m], j]), s, 0.0, 0.0


def slow_simclr_terms(z, targets, row, negatives, positives, i, j, m, base):
    def term(positive):
        others = [targets[n, view] for n in range(len(targets)) for view in range(targets.shape[1]) if n != row[m]]
        return -torch.log(p(z[i, m], positive, others, base.tau)[0])

    found = positives is not None and positives.found_B[m]
    s = sum(term(stored) for stored in positives.z_BLPD[m, j]) if found else 0.0
    return term(targets[row[m], j]), s, 0.0, 0.0


def slow_loss(
    z, targets, row, negatives=None, positives=None, *,
    base=RELIC, alpha=0.2, alpha_on_kl=False, same_view_pairs=True, normaliser=None,
):  # fmt: skip
    """The total, a term at a time."""
    slow_terms = {Relic: slow_relic_terms, Byol: slow_byol_terms, SimClr: slow_simclr_terms}[type(base)]
    c, lambda_ = (base.contrast_weight, base.invariance_weight) if isinstance(base, Relic) else (1.0, 0.0)
    total, num_terms = 0.0, 0
    for i in range(len(z)):
        for j in range(targets.shape[1]):
            if i == j and not same_view_pairs:
                continue
            num_terms += 1 + (0 if positives is None else positives.z_BLPD.shape[2])
            for m in range(z.shape[1]):
                a, s, ka, ks = slow_terms(z, targets, row, negatives, positives, i, j, m, base)
                semantic_weight = alpha if alpha_on_kl else 1.0
                total = total + (c * (a + alpha * s) + lambda_ * (ka + semantic_weight * ks)) / z.shape[1]
    return total / (normaliser or num_terms)


CASES = {
    "the paper's": {},
    "alpha on the divergence": {"alpha_on_kl": True},
    "alpha 1": {"alpha": 1.0},
    "no pairs of one view": {"same_view_pairs": False},
    "another normaliser": {"normaliser": 7},
    "no divergence of small views": {"base": Relic(small_kl="none")},
    "no divergence of positives": {"base": Relic(semantic_kl="none")},
    "other weights": {"base": Relic(tau=0.5, contrast_weight=0.7, invariance_weight=2.0)},
    "BYOL": {"base": Byol()},
    "BYOL's pairs": {"base": Byol(), "same_view_pairs": False, "normaliser": 1},
    "SimCLR": {"base": SimClr(), "same_view_pairs": False},
}


@pytest.mark.parametrize("semantic", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_equations_in_value_and_gradient(case, semantic):
    """Catches, among others: the two KL sides with different supports, a gradient that misses one side or passes the
    entropy, the divergence of i and j from the wrong view, semantic positives of another queue, a mean over them in
    place of a sum, an image without any that counts, terms missing from N."""
    settings = CASES[case]
    views = (2, 0) if isinstance(settings.get("base"), SimClr) else (2, 1)
    z, targets, row, negatives, positives = inputs(*views)
    leaves = [z.requires_grad_()]
    if isinstance(settings.get("base"), SimClr):
        leaves.append(targets.requires_grad_())
    z, targets = (torch.nn.functional.normalize(rows, dim=-1) for rows in (z, targets))  # BYOL's two forms are the
    # same for unit vectors alone, so gradients are compared on their way through the normalisation
    arguments = z, targets, row, negatives, positives if semantic else None
    got, expected = semppl_loss(*arguments, **settings)["total"], slow_loss(*arguments, **settings)
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = (torch.autograd.grad(total, leaves, retain_graph=True) for total in (got, expected))
    for gradient, slow in zip(*gradients, strict=True):
        assert relative_error(gradient, slow) < 1e-9


def test_a_view_held_to_itself_has_no_divergence_but_a_gradient():
    """One large view: KL(p || p) is 0, and as its entropy half is detached the gradient is that of the entropy."""
    z, targets, row, negatives, _ = inputs(1, 0)
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(semppl_loss(z, targets, row, negatives)["invariance"], z)
    assert semppl_loss(z, targets, row, negatives)["invariance"].item() == pytest.approx(0, abs=1e-15)
    compared = enumerate(zip(ROWS, negatives, strict=True))
    distributions = [p(z[0, b], targets[m, 0], targets[n, 0], 0.2) for b, (m, n) in compared]
    entropy = sum(-q * torch.log(q) for one in distributions for q in one) / len(ROWS)
    assert relative_error(gradient, torch.autograd.grad(entropy, z)[0]) < 1e-9


def test_parts_at_chance():
    """All embeddings alike: each comparison is uniform over 11 outcomes, so contrast costs ln 11 and nothing diverges;
    the total is c (1 + alpha P) ln 11 / (1 + P)."""
    one = torch.ones(1, dtype=torch.float64)
    alike = one.expand(6, 3, 1), one.expand(12, 4, 1), torch.arange(3), torch.arange(10).expand(3, -1) % 9 + 3
    positives = Positives(one.expand(3, 4, 3, 1), torch.ones(3, dtype=torch.bool))
    parts = {name: value.item() for name, value in semppl_loss(*alike, positives).items()}
    assert parts.pop("total") == pytest.approx(0.3 * (1 + 0.2 * 3) * math.log(11) / 4, rel=1e-12)
    zero = pytest.approx(0, abs=1e-12)
    chance = pytest.approx(math.log(11), rel=1e-12)
    assert parts == {"contrast": chance, "semantic": chance, "invariance": zero, "semantic_invariance": zero}


# ---------------------------------------------------------------------------------------------------------- the method

OPS_FREE = {"ops": (), "pixels": UNIT}
BATCH, CLASSES = 8, 3
KEYS = mix(5, np.arange(3 * BATCH)).reshape(3, BATCH)
# Of three batches of eight, five images, one and six are labelled: into nine slots, so that the ring closes.
LABELS = [[0, -1, 1, 2, -1, 0, 1, -1], [-1, -1, -1, 1, -1, -1, -1, -1], [2, 0, -1, 1, 0, 2, -1, 1]]


def config(**changes):
    settings = {
        "dataset": "digits",
        "eval_view": View("eval", 8, Whole(), pixels=UNIT),
        "labels": "per-class=10",
        "precision": "fp32",
        "base": Relic(num_negatives=3),
        "encoder": ByolResNet(10, stem="cifar", base_width=4),
        "hidden_features": 8,
        "out_features": 6,
        "odd_view": View("odd", 8, Rrc((0.3, 1.0)), copies=1, **OPS_FREE),
        "even_view": View("even", 8, Rrc((0.3, 1.0)), copies=1, **OPS_FREE),
        "small_odd_view": View("small_odd", 6, Rrc((0.1, 0.3)), **OPS_FREE),
        "small_even_view": None,
        "batch_global": BATCH,
        "positives": 2,
        "capacity": 9,
        "rate": WarmupCosine(0.5, Epochs(10)),
        "optimizer": Lars("byol", weight_decay=1e-2),
        "ema": 0.9,
    }
    return SempplConfig(**settings | changes)


def method(all_labelled=False, **changes):
    torch.manual_seed(0)
    return Semppl(config(**changes), Facts(CLASSES, 1, 0, all_labelled=all_labelled), {})


def batches(labels=LABELS, dtype=torch.float64):
    generator, views = torch.Generator().manual_seed(3), config().views
    for step, (keys, label) in enumerate(zip(KEYS, labels, strict=True)):
        x = {v.name: torch.rand(v.copies * BATCH, 1, v.size, v.size, generator=generator).to(dtype) for v in views}
        ids = torch.arange(BATCH)
        part = Part(x, ids, torch.tensor(label), None, torch.from_numpy(keys.view(np.int64)), ids)
        yield Batch({"images": part}, torch.tensor(step))


def double(nets):
    for module in nets.modules().values():
        module.double().train()
    return nets


def slow_step(state, batch, rate, c):
    """One step as the description has it: forward, enqueue, vote, loss, LARS, average. Everything but networks and
    autograd is written out."""
    online, target, queues, momenta = state["online"], state["target"], state["queues"], state["momenta"]
    part = batch.parts["images"]
    views = [part.x[name] for name in ("odd", "even", "small_odd")]
    z = torch.stack([torch.nn.functional.normalize(online([x])[0], dim=1) for x in views])
    with torch.no_grad():
        targets = torch.stack([torch.nn.functional.normalize(target([x])[0], dim=1) for x in views[:2]], dim=1)
    labels, own = part.labels.tolist(), {}
    for m in range(BATCH):
        if labels[m] >= 0:
            own[m] = state["next"]
            queues[state["next"]] = (targets[m].clone(), labels[m])
            state["next"] = (state["next"] + 1) % c.capacity

    used = [slot for slot in range(c.capacity) if queues[slot] is not None]
    asked = range(2 if c.voting else 1)
    for m in range(BATCH):
        if labels[m] < 0:
            votes = []
            for view in asked:
                for j in asked:
                    cosines = {slot: float(z[view, m].detach() @ queues[slot][0][j]) for slot in used}
                    best = sorted(used, key=lambda slot: -cosines[slot])[: c.neighbours]  # noqa: B023 (used at once)
                    votes.append(elected([(queues[slot][1], cosines[slot]) for slot in best], c.ties))
            labels[m], _ = elected(votes, c.ties)

    keys = part.keys.numpy().view(np.uint64)
    draws = {n: np.floor(uniforms(mix(keys, tag(n)), 4) * 2**31).astype(np.int64) for n in ("negatives", "positives")}
    negatives, stored = [], torch.zeros(BATCH, 2, 2, c.out_features, dtype=torch.float64)
    found = torch.zeros(BATCH, dtype=torch.bool)
    for m in range(BATCH):
        chosen = []
        for number, last in enumerate(range(BATCH - 1 - 3, BATCH - 1)):
            drawn = int(draws["negatives"][m, number]) * (last + 1) >> 31
            chosen.append(last if drawn in chosen else drawn)
        negatives.append([(m + 1 + shift) % BATCH for shift in chosen])
        alike = [slot for slot in used if queues[slot][1] == labels[m]]
        alike = [slot for slot in alike if c.own_entry or slot != own.get(m)]
        found[m] = bool(alike)
        for j in range(2 if alike else 0):
            for s in range(2):
                place = int(draws["positives"][m, 2 * j + s]) * len(alike) >> 31
                stored[m, j, s] = queues[alike[place]][0][j]
    weights = {name: getattr(c, name) for name in ("base", "alpha", "alpha_on_kl", "same_view_pairs", "normaliser")}
    loss = slow_loss(z, targets, list(range(BATCH)), negatives, Positives(stored, found), **weights)

    named = dict(online.named_parameters())
    with torch.no_grad():
        for (name, w), g in zip(named.items(), torch.autograd.grad(loss, list(named.values())), strict=True):
            ratio = 1.0
            if w.ndim > 1:
                g = g + c.optimizer.weight_decay * w
                ratio = 1e-3 * w.norm() / g.norm() if w.norm() and g.norm() else 1.0
            momenta[name] = 0.9 * momenta.get(name, 0.0) + ratio * g
            w -= rate * momenta[name]
        stays = 1 - (1 - c.ema) * (math.cos(math.pi * int(batch.step) / 3) + 1) / 2 if c.ema_ramp else c.ema
        for name, average in target.named_parameters():
            average.copy_(stays * average + (1 - stays) * named[name])
    return loss.item(), labels


def elected(votes, ties):
    """Of (label, similarity): the label with most votes, of equals that of the largest sum, or the lowest; its sum."""
    labels = sorted({label for label, _ in votes})
    sums = {y: sum(similarity for label, similarity in votes if label == y) for y in labels}
    counts = {y: sum(label == y for label, _ in votes) for y in labels}
    winner = max(labels, key=lambda y: (counts[y], sums[y] if ties == "similarity" else 0, -y))
    return winner, sums[winner]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"alpha": 0.7, "alpha_on_kl": True, "same_view_pairs": False, "normaliser": 7},
        {"voting": False, "own_entry": False, "ema_ramp": True},
        {"neighbours": 3, "base": Relic(num_negatives=3, tau=0.5, contrast_weight=0.7, invariance_weight=2.0)},
        {"neighbours": 2, "ties": "lowest"},
    ],
    ids=["as published", "weights", "one vote, ramp", "three neighbours", "lowest of equals"],
)
def test_three_steps_equal_those_written_by_hand(changes):
    """Weights, averages, queues and pseudo-labels, the ring closing on the way. Catches an average taken before the
    step, a vote before the queue is filled, positives from the class of another image, momenta with the rate inside,
    statistics of views mixed, draws that are not keyed by image, and settings that never reach what they are for."""
    semppl_ = method(**changes)
    nets, c = double(semppl_.nets()), semppl_.config
    theirs = double(method(**changes).nets())
    state = {"online": theirs.online, "target": theirs.target, "queues": [None] * 9, "next": 0, "momenta": {}}
    optimizer, horizon = semppl_.optimizer(nets), Horizon(3, 3)
    pseudo = []
    for step, batch in enumerate(batches()):
        rates = 0.2 + 0.3 * step, 0.2 + 0.3 * step  # it moves
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        optimizer.zero_grad()
        total = semppl_.loss(nets, batch)["total"]
        total.backward()
        optimizer.step()
        semppl_.after_step(nets, step, horizon)
        expected, labels = slow_step(state, batch, rates[0], c)
        pseudo += labels
        voted = torch.where(batch.parts["images"].labels >= 0, batch.parts["images"].labels, semppl_._seen[3].label_N)
        assert voted.tolist() == labels
        assert total.item() == pytest.approx(expected, rel=1e-10)
    for module, slow in ((nets.online, state["online"]), (nets.target, state["target"])):
        for ours, other in zip(module.state_dict().values(), slow.state_dict().values(), strict=True):
            torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-12)
    assert int(nets.state.next) == state["next"] == (5 + 1 + 6) % 9
    assert nets.state.label_C.tolist() == [label for _, label in state["queues"]]
    torch.testing.assert_close(nets.state.z_LCD, torch.stack([z for z, _ in state["queues"]], dim=1))
    assert len(set(pseudo)) > 1


def test_queues_may_begin_with_random_vectors():
    assert method(start="random").nets().state.used_C.all() and not method().nets().state.used_C.any()


def trained(semppl_, labels=LABELS):
    """Losses and final tensors of three steps."""
    nets = semppl_.nets()
    optimizer, losses = semppl_.optimizer(nets), []
    for module in nets.modules().values():
        module.train()
    for step, batch in enumerate(batches(labels, torch.float32)):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.3
        optimizer.zero_grad()
        losses.append(semppl_.loss(nets, batch)["total"])
        losses[-1].backward()
        optimizer.step()
        semppl_.after_step(nets, step, Horizon(3, 3))
    return nets, torch.stack(losses).detach()


def test_without_alpha_it_is_relicv2_bitwise():
    """Whatever the settings of queues, votes and positives, and whatever the labels: no queue exists, and three steps
    end on the same bits."""
    (plain,) = without_positives(resolve_tiny())
    settings = {"capacity": 64, "positives": 7, "neighbours": 3, "voting": False, "start": "random"}
    ours, losses = trained(method(alpha=0.0, labels="all", alpha_on_kl=True, **settings))
    torch.manual_seed(0)
    theirs, expected = trained(Semppl(plain.config, Facts(CLASSES, 1, 0), {}), labels=[[-1] * BATCH] * 3)
    assert ours.state is None and theirs.state is None
    assert torch.equal(losses, expected)
    for name, module in ours.saved().items():
        for one, other in zip(module.state_dict().values(), theirs.saved()[name].state_dict().values(), strict=True):
            assert torch.equal(one, other)
    with_positives, others = trained(method())
    assert with_positives.state is not None and not torch.equal(others, expected)


def resolve_tiny():
    (stage,) = resolve("semppl.rn50_300ep")
    return (replace(stage, config=config()),)


def test_with_every_label_visible_no_vote_is_taken(monkeypatch):
    """Labels are then the classes of all; a vote would cost as much for nothing. Images that carry none are voted on,
    though the recipe says that all labels may be used."""
    asked = []
    real = semppl.vote
    monkeypatch.setattr(semppl, "vote", lambda *a, **k: asked.append(1) or real(*a, **k))
    visible = [[m % CLASSES for m in range(BATCH)]] * 3
    nets, losses = trained(method(all_labelled=True, labels="all"), labels=visible)
    assert not asked and nets.state.used_C.all() and losses.isfinite().all()
    trained(method(all_labelled=False, labels="all"))
    assert len(asked) == 3


def test_batches_without_labels_leave_semantic_terms_out():
    """Empty queues: no NaN, no semantic term, nothing enqueued; once labels come, the terms do."""
    semppl_ = method()
    nets = double(semppl_.nets())
    for batch, expected in zip(batches(labels=[[-1] * BATCH, *LABELS[1:]]), [False, True, True], strict=True):
        parts = semppl_.loss(nets, batch)
        assert parts["total"].isfinite() and bool(parts["semantic"] > 0) == expected
        assert bool(nets.state.used_C.any()) == expected
        truth = {"images": torch.arange(BATCH) % CLASSES}
        assert all(value.isfinite() for value in semppl_.metrics(nets, batch, truth).values())


def test_the_step_never_waits_for_the_device():
    semppl_ = method(own_entry=False, neighbours=3)
    nets = semppl_.nets()
    batch = next(batches(dtype=torch.float32))
    with NoWaiting() as mode:
        semppl_.loss(nets, batch)["total"].backward()
    assert mode.num_calls > 200


def test_half_precision_targets_travel_without_loss():
    """What goes between ranks in bfloat16 is what the network put out, so the queue holds the same numbers as if it
    had gone in float32. Catches rows that are normalised first and rounded then."""
    semppl_ = method(precision="bf16")
    nets = semppl_.nets()
    seen = []
    nets.target.register_forward_hook(lambda module, args, out: seen.extend(out))
    semppl_.loss(nets, next(batches(dtype=torch.float32)))
    expected = torch.nn.functional.normalize(torch.stack(seen, dim=1), dim=2)
    assert seen[0].dtype == torch.float32
    assert torch.equal(semppl_._seen[1], expected)
    assert torch.equal(nets.state.z_LCD[:, 1], expected[2])  # the second labelled image


def test_metrics_count_what_they_say():
    """Of eight images five have hidden labels; catches precision and recall with each other's denominator, labelled
    images among the pseudo-labelled, and thresholds that are off by one."""
    semppl_ = method()
    nets = double(semppl_.nets())
    batch = next(batches(labels=[[0, 1, 2, -1, -1, -1, -1, -1], *LABELS[1:]]))
    semppl_.loss(nets, batch)
    z, targets, row, voted = semppl_._seen
    label = torch.tensor([2, 2, 2, 0, 1, 1, 2, 0])
    votes = torch.tensor([4, 4, 4, 4, 3, 2, 2, 1])
    semppl_._seen = z, targets, row, voted._replace(label_N=label, votes_N=votes)
    truth = {"images": torch.tensor([0, 1, 2, 0, 2, 1, 2, -1])}  # the last one's is not known: four are measured
    found = {name: value.item() for name, value in semppl_.metrics(nets, batch, truth).items()}
    assert found["pseudo_label_accuracy"] == 3 / 4  # images 3, 5 and 6 of 3, 4, 5 and 6
    assert [found[f"pseudo_label_precision_{t}of4"] for t in (1, 2, 3, 4)] == [3 / 4, 3 / 4, 1 / 2, 1]
    assert [found[f"pseudo_label_recall_{t}of4"] for t in (1, 2, 3, 4)] == [3 / 4, 3 / 4, 1 / 4, 1 / 4]
    assert found["queue_fill"] == 3 / 9
    assert found["spread"] == pytest.approx(1 - float(targets.mean(dim=(0, 1)).norm()) ** 2)
    assert found["agreement"] == pytest.approx(float((z[:2, :, None].movedim(0, 1) * targets[:, None]).sum(-1).mean()))
    unknown = semppl_.metrics(nets, batch, {"images": torch.full((BATCH,), -1)})
    assert not any(name.startswith("pseudo") for name in unknown)


def test_bases_without_semantic_terms_are_the_published_losses():
    """BYOL's sum over both pairs of 2 - 2 cos; SimCLR's NT-Xent, a cross-entropy over the 2B - 1 other rows."""
    z, targets, row, _, _ = inputs(2, 0)
    got = semppl_loss(z, targets, row, base=Byol(), same_view_pairs=False, normaliser=1)["total"]
    cosine = [(z[i] * targets[row, 1 - i]).sum(dim=1) for i in (0, 1)]
    assert got.item() == pytest.approx(sum((2 - 2 * c).mean().item() for c in cosine), rel=1e-12)
    z = targets.transpose(0, 1)  # one network, all images on this rank
    got = semppl_loss(z, targets, torch.arange(GLOBAL), base=SimClr(), same_view_pairs=False)["total"]
    rows = z.flatten(0, 1)
    logits = (rows @ rows.T / 0.1).fill_diagonal_(-torch.inf)
    partner = torch.arange(2 * GLOBAL).roll(GLOBAL)
    assert got.item() == pytest.approx(torch.nn.functional.cross_entropy(logits, partner).item(), rel=1e-12)
