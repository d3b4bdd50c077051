"""Signs of collapse: embeddings that fill few directions, predictions that ignore the image.

Each is a 0-dim tensor on its argument's device, for training to log with the rest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def effective_rank(values_ND: Tensor) -> Tensor:
    """exp of the entropy of the singular values divided by their sum, between 1 and min(N, D).

    Roy & Vetterli 2007, of the matrix itself, not centred; as RankMe uses it (arXiv 2210.02885). 1 for a matrix of
    zeros. Waits for the device.
    """
    # The Gram matrix of the shorter side has the squares of the same singular values.
    return rank_of_gram(gram(values_ND if len(values_ND) >= values_ND.shape[1] else values_ND.T))


def gram(values_ND: Tensor) -> Tensor:
    """float64 [D, D]: the rows' products with themselves, summed; those of parts of a matrix add up to the whole's."""
    summed_DD = torch.zeros(values_ND.shape[1], values_ND.shape[1], dtype=torch.float64, device=values_ND.device)
    for rows in values_ND.split(4096):  # because their float64 copy would be large
        summed_DD += rows.double().T @ rows.double()
    return summed_DD


def rank_of_gram(gram: Tensor) -> Tensor:
    """`effective_rank` of the matrix whose Gram matrix this is."""
    sigma = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    return _entropy(sigma / sigma.sum().clamp_min(torch.finfo(sigma.dtype).tiny)).exp()


def mean_prediction_entropy(p_NK: Tensor) -> Tensor:
    """Entropy in nats of the mean of N predictions: ln K where classes are used alike, 0 where one takes all."""
    return _entropy(p_NK.mean(dim=0))


def share_of_uniform(entropy_nats: float, num_classes: int) -> float:
    """An entropy as a share of ln K, the largest there is; 1 for a single class."""
    return entropy_nats / math.log(num_classes) if num_classes > 1 else 1.0


def prediction_confidence(p_NK: Tensor) -> Tensor:
    """Mean over images of the largest class probability."""
    return p_NK.amax(dim=1).mean()


def _entropy(p: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(p).sum()
    return entropy
