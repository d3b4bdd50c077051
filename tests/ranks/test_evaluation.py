"""What several ranks say of a network, each of which holds a part of the features, against what one says."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fastssl import dist
from fastssl.errors import FastsslError
from fastssl.evaluation import linear, load_protocol, probe
from fastssl.evaluation.embed import embed
from fastssl.evaluation.heads import root_mean_square
from fastssl.evaluation.knn import knn_votes
from fastssl.evaluation.linear import choose_head
from fastssl.evaluation.shards import BLOCK, first_row, passing, share, whole
from loaders.store.data import DataSets
from loaders.store.digits import open_digits
from loaders.store.source import ArraySource
from tests.ranks.pool import run_ranks
from tests.unit.evaluation.test_evaluation import subject_of

WORLDS = (1, 2, 4)


def digits(num_validation=None):
    train, held_out = open_digits()
    if num_validation is not None:
        chosen = held_out.images[:num_validation], held_out.labels[:num_validation]
        held_out = ArraySource("few", *chosen, held_out.class_names)
    return DataSets({"train": train, "validation": held_out})


def scores_of():
    """Of each protocol; the linear one by both of its solvers, each as briefly as it can be."""
    linear.EPOCHS, linear.MAX_ITERATIONS, probe.EPOCHS = 2, 20, 10
    subject = subject_of(digits(), labels="all")
    found = {name: load_protocol(name).evaluate(subject) for name in ("soft-nn", "knn", "linear")}
    linear.LARGEST_FOR_LBFGS = 0
    return found | {"sgd": load_protocol("linear").evaluate(subject), "probe": load_protocol("probe").evaluate(subject)}


def features_of(count):
    found = subject_of(digits(count), batch=10).features("validation", "backbone")
    return found.values, found.labels, found.ids


def small_features(count, width=6):
    """Of few values, so that many are equally near each other; this rank's rows, labels, and the whole."""
    g = torch.Generator().manual_seed(count)
    x, labels = torch.randint(0, 3, (count, width), generator=g).float(), torch.randint(0, 4, (count,), generator=g)
    first, last = (min(count, block * BLOCK) for block in share(-(-count // BLOCK)))
    return x[first:last], labels[first:last], x


def votes_and_heads():
    bank, labels, all_bank = small_features(1000)
    queries = small_features(600)[0]
    votes = [(k, whole(votes.clone())) for k, votes in knn_votes(queries, bank, labels, 4, ks=(1, 10, 20, 100, 200))]
    held = (torch.arange(1000) % 7 == 0)[first_row(len(bank)) :][: len(bank)]
    heads = [choose_head(bank, labels, held, 4, solver=solver) for solver in ("sgd", "l-bfgs")]
    rows = torch.cat([rows for rows, _ in passing(bank, labels, block=100, device="cpu")])
    assert torch.equal(rows, all_bank)
    return votes, heads, root_mean_square(bank)


def refusal():
    """Of a network whose features are not finite for one image, which lies with the last rank."""
    subject = subject_of(digits())
    embedded = subject.method.embed

    def broken(nets, x, tap):
        values = embedded(nets, x, tap).clone()
        if dist.rank() == dist.world_size() - 1:
            values[-1, 0] = torch.nan
        return values

    subject.method.embed = broken
    try:
        load_protocol("knn").evaluate(subject)
    except FastsslError as error:
        return str(error)


@dataclass
class Found:
    """By one rank: to start ranks takes longer than all that they do here."""

    scores: dict
    features: dict
    votes_and_heads: tuple
    refusal: str


def on_a_rank(folder):
    embed(subject_of(digits()), "validation", "z", folder / str(dist.world_size()))
    return Found(scores_of(), {count: features_of(count) for count in (1, 41)}, votes_and_heads(), refusal())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("embeddings")


@pytest.fixture(scope="module")
def found(folder):
    """{ranks: what each found}."""
    return {world: run_ranks(world, on_a_rank, folder, timeout_s=400) for world in WORLDS}


def test_scores_do_not_depend_on_the_number_of_ranks(found):
    """To the last bit, but for the effective rank. 1,438 labelled images are six blocks, 355 validation images two, so
    that of four ranks two have none; catches images that are looked at twice or by none, labels beside the wrong rows,
    votes of a rank's own part of the bank, and shares taken of a rank's own images."""
    alone = dict(found[1][0].scores)
    alone["soft-nn"] = dict(alone["soft-nn"])
    rank = alone["soft-nn"].pop("effective_rank")
    assert alone["sgd"]["linear"]["solver"] == "sgd" and alone["linear"]["linear"]["solver"] == "l-bfgs"
    for world in WORLDS[1:]:
        for scores in (each.scores for each in found[world]):
            assert scores["soft-nn"].pop("effective_rank") == pytest.approx(rank, rel=1e-9)
            assert scores == alone


@pytest.mark.parametrize("count", [1, 41])
def test_ranks_hold_every_image_once_in_order(found, count):
    """Catches a dropped or doubled image at a ragged end, and ranks that do not meet because one has none."""
    values, labels, ids = found[1][0].features[count]
    for world in WORLDS[1:]:
        parts = [each.features[count] for each in found[world]]
        assert torch.equal(torch.cat([part[0] for part in parts]), values) and values.shape == (count, 64)
        assert torch.equal(torch.cat([part[1] for part in parts]), labels)
        assert torch.cat([part[2] for part in parts]).tolist() == ids.tolist() == list(range(count))
        assert max(len(part[0]) for part in parts) < max(count, 2)


def test_neighbours_and_heads_do_not_depend_on_the_number_of_ranks(found):
    """Neighbours of which dozens are equally near: catches ties that are broken by who came first to which rank. Heads
    by SGD to the last bit; by L-BFGS, whose sums are of as many parts as there are ranks, to ten digits."""
    votes, ((sgd, about_sgd), (lbfgs, about_lbfgs)), scale = found[1][0].votes_and_heads
    for got in (each.votes_and_heads for world in WORLDS[1:] for each in found[world]):
        for (k, expected), (same_k, its_votes) in zip(votes, got[0], strict=True):
            assert k == same_k and torch.equal(expected, its_votes), k
        (head, about), (free, about_free) = got[1]
        assert torch.equal(head.weight_SKD, sgd.weight_SKD) and torch.equal(head.bias_SK, sgd.bias_SK)
        assert about == about_sgd and about_free == about_lbfgs and got[2] == scale
        torch.testing.assert_close(free.weight_SKD, lbfgs.weight_SKD, rtol=1e-10, atol=1e-10)


def test_files_of_embeddings_are_the_same_bytes(found, folder):
    """Catches a header that NumPy does not write, and blocks in another order."""
    folders = [folder / str(world) for world in found]
    names = sorted(path.name for path in folders[0].iterdir())
    assert len(names) == 5
    for name in names:
        assert len({(each / name).read_bytes() for each in folders}) == 1, name
    assert np.load(folders[0] / "validation.features.npy").shape == (355, 32)


def test_what_one_rank_finds_wrong_all_ranks_say(found):
    """Catches a rank that ends while the others wait for it."""
    said = {each.refusal for of_world in found.values() for each in of_world}
    assert len(said) == 1 and "are not finite" in said.pop()
