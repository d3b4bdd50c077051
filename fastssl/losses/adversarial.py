"""Virtual adversarial training (Miyato et al. 2018, arXiv 1704.03976): the perturbation of an image, of a given length,
that changes its classification most, to second order.

Near r = 0, KL(p(x + r) || p(x)) is r' H r / 2 with H = J' (diag p - p p') J, J the derivative of the logits. One power
iteration from random noise d finds H d, whose direction is the perturbation's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd import forward_ad

Classify = Callable[[Tensor], Tensor]  # images [N, ...] -> logits [N, K]

_LEAST = 1e-12  # S4L's release: l2_normalize's epsilon


def divergence(logits_NK: Tensor, other_NK: Tensor) -> Tensor:
    """KL(p || q) of each row, [N], of p and q as logits."""
    log_p_NK = logits_NK.log_softmax(dim=1)
    return (log_p_NK.exp() * (log_p_NK - other_NK.log_softmax(dim=1))).sum(dim=1)


def entropy(logits_NK: Tensor) -> Tensor:
    """Of each row's probabilities, [N]."""
    log_p_NK = logits_NK.log_softmax(dim=1)
    return -(log_p_NK.exp() * log_p_NK).sum(dim=1)


def curvature_product(classify: Classify, x: Tensor, d: Tensor) -> Tensor:
    """H d, like x: one pass forward with tangents, one there and back. Nothing is approximated.

    Rows that share batch statistics share H, over all ranks where the statistics are theirs; every rank must call it.
    """
    with torch.no_grad(), forward_ad.dual_level():
        logits_NK, change_NK = forward_ad.unpack_dual(classify(forward_ad.make_dual(x, d)))
        p_NK = logits_NK.softmax(dim=1)
        change_NK = p_NK * (change_NK - (p_NK * change_NK).sum(dim=1, keepdim=True))
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        (product,) = torch.autograd.grad(classify(leaf), leaf, change_NK)
    return product


def difference_product(classify: Classify, x: Tensor, d: Tensor, xi: float) -> Tensor:
    """H d approximately, like x: the gradient of KL(p(x + xi d) || p(x)) over xi, as published.

    `xi` is for d of unit length. Too small, x + xi d is x again: in float32 most of it at 1e-6, the published one.
    """
    with torch.no_grad():
        clean_NK = classify(x)
    with torch.enable_grad():
        r = (xi * d).requires_grad_()
        (gradient,) = torch.autograd.grad(divergence(classify(x + r), clean_NK).sum(), r)
    return gradient / xi


def unit(x: Tensor) -> Tensor:
    """Each image of [N, ...] scaled to Euclidean length 1; by its greatest magnitude first, so that no square
    underflows. Images of zeros stay."""
    dims, tiny = tuple(range(1, x.dim())), torch.finfo(x.dtype).tiny
    x = x / x.abs().amax(dims, keepdim=True).clamp_min(tiny)
    unit: Tensor = x / torch.linalg.vector_norm(x, dim=dims, keepdim=True).clamp_min(tiny)
    return unit


def unit_unless_small(x: Tensor) -> Tensor:
    """As `unit`, but images shorter than 1e-6 are multiplied by 1e6 and no more: TensorFlow's `l2_normalize`."""
    dims = tuple(range(1, x.dim()))
    return x * x.square().sum(dims, keepdim=True).clamp_min(_LEAST).rsqrt()


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32: their rounding is larger than what a small perturbation changes."""
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = tf32
