"""Heads on a trunk's features: PAWS's, SimCLRv2's, BYOL's.

Layer names hold "bn" or "bias" exactly where LARS and weight decay leave a parameter alone. The first three layers,
`head[:3]`, are linear, norm and ReLU in all that project: what fine-tuning "from the first projection layer" keeps.
"""

from collections import OrderedDict

import torch
from torch import nn

from fastssl.nn.initialisers import haiku_default, initialise, small_normal
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.nn.norm.lockstep import LockstepSequential
from fastssl.nn.trunks.stem import Norm


def projection_head(in_features: int, out_features: int, norm: Norm = GlobalBatchNorm) -> LockstepSequential:
    """PAWS's: three linear layers with bias, batch norm and ReLU between: [N, in_features] -> [N, out_features].

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
    """PAWS's: batch norm, then a bottleneck of a quarter of the width: [N, num_features] -> [N, num_features]."""
    return LockstepSequential(
        OrderedDict(
            bn1=norm(num_features),
            fc1=nn.Linear(num_features, num_features // 4),
            bn2=norm(num_features // 4),
            relu=nn.ReLU(inplace=True),
            fc2=nn.Linear(num_features // 4, num_features),
        )
    )


def simclr_head(
    in_features: int, out_features: int = 128, num_layers: int = 3, norm: Norm = GlobalBatchNorm
) -> LockstepSequential:
    """SimCLRv2's: linear layers without bias, each with batch norm: [N, in_features] -> [N, out_features].

    All but the last are as wide as the input and have a ReLU; the last one's norm has a weight and no bias. Weights
    start at N(0, 0.01^2). CIFAR-10's head has two layers (paper, appendix).
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index in range(1, num_layers):
        layers[f"fc{index}"] = nn.Linear(in_features, in_features, bias=False)
        layers[f"bn{index}"] = norm(in_features)
        layers[f"relu{index}"] = nn.ReLU(inplace=True)
    layers[f"fc{num_layers}"] = nn.Linear(in_features, out_features, bias=False)
    layers[f"bn{num_layers}"] = _without_bias(norm(out_features))
    head = LockstepSequential(layers)
    initialise(head, small_normal)
    return head


def byol_head(
    in_features: int, hidden_features: int = 4096, out_features: int = 256, norm: Norm = GlobalBatchNorm
) -> LockstepSequential:
    """BYOL's projector and predictor, and SemPPL's: linear, batch norm, ReLU, linear without bias.

    [N, in_features] -> [N, out_features]. Weights start as Haiku draws them, the bias at 0.
    """
    head = LockstepSequential(
        OrderedDict(
            fc1=nn.Linear(in_features, hidden_features),
            bn1=norm(hidden_features),
            relu1=nn.ReLU(inplace=True),
            fc2=nn.Linear(hidden_features, out_features, bias=False),
        )
    )
    initialise(head, haiku_default)
    return head


def _without_bias(norm: GlobalBatchNorm) -> GlobalBatchNorm:
    """The norm with its bias held at 0: no parameter, and no entry in state dicts."""
    zeros_C = torch.zeros_like(norm.bias)
    del norm.bias
    norm.register_buffer("bias", zeros_C, persistent=False)
    return norm
