"""PAWS's loss on two ranks against one process that holds the concatenated batch."""

import pytest
import torch

from fastssl import dist
from fastssl.methods.paws import diagnostics, label_matrix, paws_loss
from tests.ranks.pool import run_ranks

WORLD, IMAGES, PER_CLASS, CLASSES_PER_RANK, VIEWS, WIDTH = 2, 3, 2, 3, 4, 5
SUPPORTS = PER_CLASS * CLASSES_PER_RANK


def rank_inputs(rank):
    """What one rank sees: features, and labels whose columns are this rank's own block of the global columns."""
    generator = torch.Generator().manual_seed(rank)
    x_ND, x_support_SD, h_GD, h_support_SD = (
        torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
        for rows in (VIEWS * IMAGES, SUPPORTS, 2 * IMAGES, SUPPORTS)
    )
    columns_S = rank * CLASSES_PER_RANK + torch.arange(SUPPORTS) % CLASSES_PER_RANK
    return x_ND, x_support_SD, label_matrix(columns_S, WORLD * CLASSES_PER_RANK, 0.1).double(), h_GD, h_support_SD


def view_major(blocks, num_views):
    """Rows of all ranks, reordered so that views stay outermost, as one process would hold them."""
    return torch.cat([block.view(num_views, IMAGES, -1) for block in blocks], dim=1).flatten(0, 1)


def run(x_ND, x_support_SD, labels_SK, h_GD, h_support_SD):
    """Loss parts, the gradient of a shared linear layer that makes z, gradients of rows, and diagnostics."""
    weight = torch.linspace(-1, 1, WIDTH * WIDTH, dtype=torch.float64).sin().view(WIDTH, WIDTH).requires_grad_()
    z_ND, z_support_SD = x_ND @ weight, x_support_SD @ weight
    z_ND.retain_grad()
    z_support_SD.retain_grad()
    parts = paws_loss(z_ND, z_support_SD, labels_SK, h_GD, h_support_SD)
    sum(parts).backward()
    watched = diagnostics(h_GD, h_support_SD, labels_SK)
    return [part.detach() for part in parts], weight.grad, z_ND.grad, z_support_SD.grad, watched


def on_a_rank():
    return run(*rank_inputs(dist.rank()))


def test_two_ranks_equal_one_process():
    """Mean cross-entropy, the same me-max everywhere, and after averaging over ranks exactly the gradient of the whole
    batch: catches local supports, a gathered gradient that stays away, and a stray factor of the number of ranks."""
    ranks = run_ranks(WORLD, on_a_rank)
    blocks = [rank_inputs(rank) for rank in range(WORLD)]
    xs, supports, labels, hs, h_supports = zip(*blocks, strict=True)
    parts, weight_grad, z_grad, z_support_grad, watched = run(
        view_major(xs, VIEWS), torch.cat(supports), torch.cat(labels), view_major(hs, 2), torch.cat(h_supports)
    )

    def close(got, expected):
        return ((got - expected).norm() / expected.norm()).item() < 1e-9

    assert close(sum(r[0][0] for r in ranks) / WORLD, parts[0])
    assert all(close(r[0][1], parts[1]) for r in ranks)
    assert close(sum(r[1] for r in ranks) / WORLD, weight_grad)
    assert close(view_major([r[2] for r in ranks], VIEWS) / WORLD, z_grad)
    assert close(torch.cat([r[3] for r in ranks]) / WORLD, z_support_grad)
    for r in ranks:
        assert {k: v.item() for k, v in r[4].items()} == pytest.approx({k: v.item() for k, v in watched.items()})
