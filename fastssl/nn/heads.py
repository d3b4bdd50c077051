"""Heads on a trunk's features: PAWS's, SimCLRv2's, BYOL's.

Layer names hold "bn" or "bias" exactly where LARS and weight decay leave a parameter alone. The first three layers,
`head[:3]`, are linear, norm and ReLU in all that project: what fine-tuning "from the first projection layer" keeps.
"""

from collections import OrderedDict
from typing import Literal

import torch
from torch import nn

from fastssl.nn.initialisers import haiku_default, initialise, small_normal
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.nn.norm.lockstep import LockstepSequential
from fastssl.nn.trunks.stem import Norm

Activation = Literal["relu", "gelu"]


def projection_head(
    in_features: int,
    out_features: int,
    hidden_features: int | None = None,
    activation: Activation = "relu",
    norm: Norm = GlobalBatchNorm,
) -> LockstepSequential:
    """PAWS's: three linear layers with bias, batch norm and ReLU between: [N, in_features] -> [N, out_features].

    Hidden layers are as wide as the input unless `hidden_features` says otherwise. PAWS: 2048-2048-2048 for ResNet-50,
    128-128-128 for WRN-28-2, and for ViT-S 256-256-256 with GELU.
    """
    hidden = hidden_features or in_features
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index, features in ((1, in_features), (2, hidden)):
        layers[f"fc{index}"] = nn.Linear(features, hidden)
        layers[f"bn{index}"] = norm(hidden)
        layers[f"{activation}{index}"] = _activation(activation)
    layers["fc3"] = nn.Linear(hidden, out_features)
    return LockstepSequential(layers)


def prediction_head(
    num_features: int,
    hidden_features: int | None = None,
    activation: Activation = "relu",
    norm: Norm = GlobalBatchNorm,
) -> LockstepSequential:
    """PAWS's: batch norm, then two linear layers: [N, num_features] -> [N, num_features]. The hidden one is a quarter
    as wide unless `hidden_features` says otherwise; for ViT-S it is 256-256."""
    hidden = hidden_features or num_features // 4
    layers: OrderedDict[str, nn.Module] = OrderedDict(bn1=norm(num_features), fc1=nn.Linear(num_features, hidden))
    layers |= {"bn2": norm(hidden), activation: _activation(activation), "fc2": nn.Linear(hidden, num_features)}
    return LockstepSequential(layers)


def _activation(name: Activation) -> nn.Module:
    return nn.ReLU(inplace=True) if name == "relu" else nn.GELU()


def simclr_head(
    in_features: int,
    out_features: int = 128,
    num_layers: int = 3,
    norm: Norm = GlobalBatchNorm,
    hidden_features: int | None = None,
) -> LockstepSequential:
    """SimCLRv2's: linear layers without bias, each with batch norm: [N, in_features] -> [N, out_features].

    All but the last are as wide as the input, or as `hidden_features`, and have a ReLU; the last one's norm has a
    weight and no bias. Weights start at N(0, 0.01^2). CIFAR-10's head has two layers (paper, appendix).
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    width = in_features
    for index in range(1, num_layers):
        hidden = hidden_features or in_features
        layers[f"fc{index}"] = nn.Linear(width, hidden, bias=False)
        layers[f"bn{index}"] = norm(hidden)
        layers[f"relu{index}"] = nn.ReLU(inplace=True)
        width = hidden
    layers[f"fc{num_layers}"] = nn.Linear(width, out_features, bias=False)
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
