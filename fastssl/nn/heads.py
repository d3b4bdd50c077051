"""PAWS's two heads. Layer names hold "bn" or "bias" exactly where LARS and weight decay leave a parameter alone."""

from collections import OrderedDict
from collections.abc import Callable

from torch import nn

from fastssl.nn.global_batch_norm import GlobalBatchNorm, LockstepSequential

Norm = Callable[[int], GlobalBatchNorm]


def projection_head(in_features: int, out_features: int, norm: Norm = GlobalBatchNorm) -> LockstepSequential:
    """Three linear layers with bias, batch norm and ReLU between: [N, in_features] -> [N, out_features].

    Hidden layers are as wide as the input. PAWS: 2048-2048-2048 for ResNet-50, 128-128-128 for WRN-28-2.
    """
    return LockstepSequential(
        OrderedDict(
            fc1=nn.Linear(in_features, in_features),
            bn1=norm(in_features),
            relu1=nn.ReLU(inplace=True),
            fc2=nn.Linear(in_features, in_features),
            bn2=norm(in_features),
            relu2=nn.ReLU(inplace=True),
            fc3=nn.Linear(in_features, out_features),
        )
    )


def prediction_head(num_features: int, norm: Norm = GlobalBatchNorm) -> LockstepSequential:
    """Batch norm, then a bottleneck of a quarter of the width: [N, num_features] -> [N, num_features]."""
    return LockstepSequential(
        OrderedDict(
            bn1=norm(num_features),
            fc1=nn.Linear(num_features, num_features // 4),
            bn2=norm(num_features // 4),
            relu=nn.ReLU(inplace=True),
            fc2=nn.Linear(num_features // 4, num_features),
        )
    )
