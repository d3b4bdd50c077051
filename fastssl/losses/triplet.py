"""S4L's exemplar loss: batch-hard triplets (Hermans et al. 2017, arXiv 1703.07737) of copies of images."""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl import dist

_LEAST = 1e-12  # of a squared distance: the root's derivative is infinite at 0


def batch_hard(anchors_MD: Tensor, identity_M: Tensor, others_AD: Tensor, identity_A: Tensor) -> Tensor:
    """softplus(d+ - d-) of each anchor, [..., M]: d+ is its greatest distance to rows of its identity among `others`,
    d- its smallest to a row of another. Distances are Euclidean, not squared; there is no margin.

    anchors_MD, others_AD  [..., M, D] and [..., A, D]; along leading dimensions, batches that do not see each other
    identity_M, identity_A  integers [M] and [A]

    Anchors may be among the others: an anchor is never farther from itself than from a row of its identity. Every
    anchor needs a row of its identity and one of another. With gradient in both; only the chosen rows get any.
    """
    with torch.no_grad():
        products = anchors_MD @ others_AD.mT
        squared = anchors_MD.square().sum(-1)[..., :, None] + others_AD.square().sum(-1)[..., None, :] - 2 * products
        same = identity_M[:, None] == identity_A
        positive = squared.masked_fill(~same, -torch.inf).argmax(dim=-1)
        negative = squared.masked_fill(same, torch.inf).argmin(dim=-1)
    # Chosen by products of whole matrices, measured by differences of rows: close rows would cancel in the former.
    farthest, nearest = (
        _distance(anchors_MD, torch.take_along_dim(others_AD, chosen[..., None], dim=-2))
        for chosen in (positive, negative)
    )
    return F.softplus(farthest - nearest)


def exemplar_identities(num_images: int, num_copies: int, device: torch.device, *, compat: bool = False) -> Tensor:
    """Whose copy a row is, int64 [num_copies, num_images].

    `compat` are the release's, which called its function with the two counts swapped: rows are numbered image by image,
    and every `num_images` in a row count as one image. Right only where there are as many images as copies.
    """
    image = torch.arange(num_images, device=device).expand(num_copies, -1)
    if not compat:
        return image
    return (image * num_copies + torch.arange(num_copies, device=device)[:, None]) // num_images


def exemplar_loss(z_ND: Tensor, num_images: int, num_cores: int | None, *, compat: bool = False) -> Tensor:
    """Mean batch-hard triplet loss of this rank's images, of which z_ND [copies * num_images, D] has all copies,
    copy-major. Triplets are made within each of `num_cores` runs of consecutive images, or among those of all ranks.
    """
    unit_ND = F.normalize(z_ND, dim=1, eps=1e-6)  # TensorFlow's, whose 1e-12 is of the square
    num_copies = len(z_ND) // num_images
    if num_cores is None:
        world, rank = dist.world_size(), dist.rank()
        identity_CN = exemplar_identities(num_images * world, num_copies, z_ND.device, compat=compat)
        identity_WM = identity_CN.unflatten(1, (world, num_images)).transpose(0, 1).flatten(1)
        own, of_all = identity_WM[rank], identity_WM.flatten()
        return batch_hard(unit_ND, own, dist.gather_rows(unit_ND), of_all).mean()
    core_images = num_images // num_cores
    core_GMD = unit_ND.unflatten(0, (num_copies, num_cores, core_images)).transpose(0, 1).flatten(1, 2)
    identity_M = exemplar_identities(core_images, num_copies, z_ND.device, compat=compat).flatten()
    return batch_hard(core_GMD, identity_M, core_GMD, identity_M).mean()


def _distance(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().sum(-1).clamp_min(_LEAST).sqrt()
