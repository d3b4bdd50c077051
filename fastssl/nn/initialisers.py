"""How the published networks draw their first weights; each function fills one tensor [out, in, ...] in place."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Init = Callable[[Tensor], object]

# Standard deviation of a standard normal distribution cut at -2 and 2.
_STD_OF_TRUNCATED = 0.87962566103423978


def kaiming_fan_out(weight: Tensor) -> None:
    """Normal, variance 2 / fan-out: torchvision's and PAWS's convolutions."""
    nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")


def variance_scaling(weight: Tensor) -> None:
    """Truncated normal, variance 1 / fan-in: TensorFlow's `VarianceScaling`, SimCLRv2's convolutions."""
    _truncated_normal(weight, _fan_in(weight) ** -0.5 / _STD_OF_TRUNCATED)


def haiku_default(weight: Tensor) -> None:
    """Normal of variance 1 / fan-in, cut at two standard deviations and not scaled back: Haiku's default, BYOL's."""
    _truncated_normal(weight, _fan_in(weight) ** -0.5)


def glorot_uniform(weight: Tensor) -> None:
    """Uniform, variance 2 / (fan-in + fan-out): the default of TensorFlow's layers, S4L's."""
    nn.init.xavier_uniform_(weight)


def small_normal(weight: Tensor) -> None:
    """Normal, standard deviation 0.01: SimCLRv2's head."""
    nn.init.normal_(weight, std=0.01)


def initialise(module: nn.Module, init: Init) -> None:
    """Draw the weights of all convolutions and linear layers within `module`, in their order; their biases become 0.
    Layers of a dry run have shapes and no values: there is nothing to draw, which would take most of its time."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) and not layer.weight.is_meta:
            init(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


@torch.no_grad()
def _truncated_normal(weight: Tensor, std: float) -> None:
    """Normal, cut at two standard deviations: the inverse of its distribution at uniform numbers. torch's own draws
    until all values lie within, which a dry run's shapes, having no values, never tell."""
    within = math.erf(2**0.5)  # share of a normal distribution that is not cut off
    weight.uniform_(-within, within).erfinv_().mul_(std * 2**0.5).clamp_(-2 * std, 2 * std)


def _fan_in(weight: Tensor) -> int:
    return weight[0].numel()
