"""PAWS's loss on two ranks against one process that holds the concatenated batch, and what travels between them."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastssl import dist
from fastssl.losses.paws import consistency, diagnostics, gather_supports, paws_loss, sharpened_targets
from fastssl.losses.similarity import BalancedLabels
from tests.ranks.pool import run_ranks

WORLD, IMAGES, PER_CLASS, CLASSES, VIEWS, WIDTH = 2, 3, 2, 5, 4, 6
SUPPORTS = PER_CLASS * CLASSES // WORLD  # five rows: the middle class is on both ranks


def rank_inputs(rank):
    """One rank's features, float64: anchors, supports, and projections of both."""
    generator = torch.Generator().manual_seed(rank)
    rows = (VIEWS * IMAGES, SUPPORTS, 2 * IMAGES, SUPPORTS)
    return tuple(torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) for n in rows)


def labels_of(world, dense):
    """Labels of one of `world` ranks: the layout of all, or its own rows of their matrix."""
    labels = BalancedLabels(CLASSES, PER_CLASS, ranks=world, smoothing=0.1)
    if not dense:
        return labels
    weight_SS = torch.eye(PER_CLASS * CLASSES, dtype=torch.float64)
    return labels.predictions(weight_SS).chunk(world)[dist.rank()]


def view_major(blocks, num_views):
    """Rows of all ranks, reordered so that views stay outermost, as one process would hold them."""
    return torch.cat([block.view(num_views, IMAGES, -1) for block in blocks], dim=1).flatten(0, 1)


def run(labels, x_ND, x_support_SD, h_GD, h_support_SD):
    """Loss parts, the gradient of a shared linear layer that makes z, gradients of rows, and diagnostics."""
    weight = torch.linspace(-1, 1, WIDTH * WIDTH, dtype=torch.float64).sin().view(WIDTH, WIDTH).requires_grad_()
    z_ND, z_support_SD = x_ND @ weight, x_support_SD @ weight
    z_ND.retain_grad()
    z_support_SD.retain_grad()
    parts = paws_loss(z_ND, z_support_SD, labels, h_GD, h_support_SD)
    sum(parts).backward()
    supports = gather_supports(z_support_SD, h_support_SD, labels)
    watched = diagnostics(h_GD, supports.h_SD, supports.labels)
    return [part.detach() for part in parts], weight.grad, z_ND.grad, z_support_SD.grad, watched


def on_a_rank():
    own = rank_inputs(dist.rank())
    results = {dense: run(labels_of(WORLD, dense), *own) for dense in (False, True)}
    half = exchanging(torch.bfloat16, labels_of(WORLD, False), *own)
    return results, half, messages(torch.bfloat16), messages(None)


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(WORLD, on_a_rank)


@pytest.fixture(scope="module")
def whole_batch():
    xs, supports, hs, h_supports = zip(*map(rank_inputs, range(WORLD)), strict=True)
    return view_major(xs, VIEWS), torch.cat(supports), view_major(hs, 2), torch.cat(h_supports)


def close(got, expected, relative=1e-9):
    return ((got - expected).norm() / expected.norm()).item() < relative


@pytest.mark.parametrize("dense", [False, True])
def test_two_ranks_equal_one_process(dense, ranks, whole_batch):
    """Mean cross-entropy, the same me-max everywhere, and after averaging over ranks exactly the gradient of the whole
    batch: catches local supports, a gathered gradient that stays away, and a stray factor of the number of ranks."""
    parts, weight_grad, z_grad, z_support_grad, watched = run(labels_of(1, dense), *whole_batch)
    of_rank = [results[dense] for results, *_ in ranks]
    assert close(sum(r[0][0] for r in of_rank) / WORLD, parts[0])
    assert all(close(r[0][1], parts[1]) for r in of_rank)
    assert close(sum(r[1] for r in of_rank) / WORLD, weight_grad)
    assert close(view_major([r[2] for r in of_rank], VIEWS) / WORLD, z_grad)
    assert close(torch.cat([r[3] for r in of_rank]) / WORLD, z_support_grad)
    for r in of_rank:
        assert {k: v.item() for k, v in r[4].items()} == pytest.approx({k: v.item() for k, v in watched.items()})


def exchanging(dtype, labels, x_ND, x_support_SD, h_GD, h_support_SD):
    """Loss parts and gradients where supports travel in `dtype`."""
    leaves = x_ND.detach().requires_grad_(), x_support_SD.detach().requires_grad_()
    supports = gather_supports(leaves[1], h_support_SD, labels, dtype)
    targets = sharpened_targets(h_GD, supports, tau=0.1, sharpen_T=0.25)
    parts = consistency(leaves[0], targets, supports, tau=0.1, sharpen_T=0.25)[:2]
    gradients = torch.autograd.grad(sum(parts), leaves)
    return [part.detach() for part in parts], gradients


def test_the_half_precision_exchange_equals_one_process(ranks, whole_batch):
    """Supports are rounded alone too, so values agree as exactly as without rounding, and the gradient of supports to
    what bfloat16 holds (eight bits). Catches one rank that trains on other numbers than many."""
    parts, (z_grad, z_support_grad) = exchanging(torch.bfloat16, labels_of(1, False), *whole_batch)
    _, (_, exact) = exchanging(None, labels_of(1, False), *whole_batch)
    of_rank = [result for _, result, *_ in ranks]
    assert close(sum(p[0] for p, _ in of_rank) / WORLD, parts[0])
    assert all(close(p[1], parts[1]) for p, _ in of_rank)
    assert close(view_major([g[0] for _, g in of_rank], VIEWS) / WORLD, z_grad)
    assert close(torch.cat([g[1] for _, g in of_rank]) / WORLD, z_support_grad, 2**-7)
    assert close(z_support_grad, exact, 2**-4) and not close(z_support_grad, exact, 1e-6)


class Messages(TorchDispatchMode):
    """(operator, elements, bytes) of each collective's input, whichever way it was called."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.name():
            name = func.overloadpacket.__name__
            tensors = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            self.sent.append((name, sum(t.numel() for t in tensors), sum(t.nbytes for t in tensors)))
        return func(*args, **(kwargs or {}))


def messages(dtype):
    """What the loss and its backward send from this rank, features in float32."""
    x_ND, x_support_SD, h_GD, h_support_SD = (x.float().requires_grad_() for x in rank_inputs(dist.rank()))
    with Messages() as mode:
        supports = gather_supports(x_support_SD, h_support_SD, labels_of(WORLD, False), dtype)
        targets = sharpened_targets(h_GD, supports, tau=0.1, sharpen_T=0.25)
        sum(consistency(x_ND, targets, supports, tau=0.1, sharpen_T=0.25)[:2]).backward()
    return mode.sent


def received_bytes(supports, width, world, bytes_each):
    """What a rank gets of the others' supports: z and h forward, and their shares of the gradient of its own z."""
    return 3 * supports * width * bytes_each * (world - 1) // world


@pytest.mark.parametrize("which, bytes_each", [(2, 2), (3, 4)], ids=["bfloat16", "float32"])
def test_three_messages_of_known_size(which, bytes_each, ranks):
    """One gather, one reduce-scatter, and me-max's mean of K numbers. Catches labels that travel, h and z apart, and a
    gradient of h (zeros) or of everybody's rows that travels. For the ImageNet job on 64 ranks the formula is 81 MB;
    the authors' code takes 218."""
    for sent in (rank[which] for rank in ranks):
        gathered, mean, scattered = sent
        assert gathered == ("all_gather_into_tensor", 2 * SUPPORTS * WIDTH, 2 * SUPPORTS * WIDTH * bytes_each)
        assert mean == ("all_reduce", CLASSES, 4 * CLASSES)
        assert scattered == ("reduce_scatter_tensor", elements := WORLD * SUPPORTS * WIDTH, elements * bytes_each)
        others = WORLD - 1  # gathered from each, and a WORLD-th of what each one sends to be summed
        exchanged = others * gathered[2] + others * scattered[2] // WORLD
        assert exchanged == received_bytes(WORLD * SUPPORTS, WIDTH, WORLD, bytes_each)
    assert received_bytes(6720, 2048, 64, 2) == 81_285_120
