"""What a trunk is, for those who build it without fastssl: its facts, and how torchvision's ResNet becomes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastssl.config.plain import to_plain
from fastssl.nn.encoders import ByolResNet, Encoder, S4lResNet, SimclrResNet, WideResNet
from fastssl.nn.trunks.stem import same_max_pool
from fastssl.weights.read import fitting

_UNNAMED = {10: ("BasicBlock", [1, 1, 1, 1]), 200: ("Bottleneck", [3, 24, 36, 3])}  # torchvision has no such functions


def architecture(encoder: Encoder, channels: int, trunk: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Plain facts of the trunk that `encoder` builds for images of `channels`; `trunk` are its tensors.

    "torchvision" holds lines of Python that make its ResNet into this one, and "differs_from_torchvision" what they
    change; without lines, it cannot be made so. "timm" is the name of timm's model where that is the same.
    Raises WeightsError where the tensors are not this trunk's.
    """
    with torch.device("meta"):  # shapes alone
        module = encoder.build(channels)
    fitting(module.state_dict(), trunk, source)
    differs, lines = _from_torchvision(encoder, channels, getattr(module, "maxpool", None) is same_max_pool)
    return {
        "name": name_of(encoder),
        "encoder": to_plain(encoder),
        "num_features": module.num_features,
        "num_parameters": sum(p.numel() for p in module.parameters()),
        "differs_from_torchvision": differs,
        "torchvision": lines,
        "timm": None if differs else f"resnet{encoder.depth}",
    }


def name_of(encoder: Encoder) -> str:
    """`ResNet-50`, `ResNet-152 3x with selective kernels`, `ResNet-10 with 16 channels for 64`, `WRN-28-2`."""
    if isinstance(encoder, WideResNet):
        return f"WRN-{encoder.depth}-{encoder.widen}"
    kind = "ResNet-v2" if isinstance(encoder, S4lResNet) else "ResNet"
    width = f" {encoder.width}x" if encoder.width > 1 else ""
    kernels = " with selective kernels" if _has_selective_kernels(encoder) else ""
    narrow = f" with {encoder.base_width} channels for 64" if encoder.base_width != 64 else ""
    return f"{kind}-{encoder.depth}{width}{kernels}{narrow}"


def _from_torchvision(encoder: Encoder, channels: int, pads_one_end: bool) -> tuple[list[str], list[str]]:
    """What is not torchvision's about the trunk, and the lines that build it, none where there are no such lines."""
    if isinstance(encoder, WideResNet):
        return ["pre-activation blocks in three groups, and convolutions with biases"], []
    width, cifar = encoder.base_width * encoder.width, encoder.stem == "cifar"
    differs, lines = [], [f"model = torchvision.models.resnet{encoder.depth}()"]
    if encoder.depth in _UNNAMED:
        block, blocks = _UNNAMED[encoder.depth]
        differs.append(f"depth {encoder.depth}, {blocks} blocks")
        lines = [f"model = torchvision.models.resnet.ResNet(torchvision.models.resnet.{block}, {blocks})"]
    if width != 64:
        differs.append(f"{width} channels after the first convolution instead of 64, all others in proportion")
    if channels != 3:
        differs.append(f"images of {channels} channel{'s' * (channels > 1)} instead of 3")
    if cifar:
        differs.append("a first convolution of 3x3 and stride 1, and no max-pool")
        lines.append("model.maxpool = torch.nn.Identity()")
    if cifar or channels != 3:
        shape = "3, 1, 1" if cifar else "7, 2, 3"
        lines.append(f"model.conv1 = torch.nn.Conv2d({channels}, 64, {shape}, bias=False)")
    if pads_one_end:
        differs.append("a max-pool that pads even sides at the bottom and right only, as TensorFlow's does")
        lines.append("model.maxpool = torch.nn.MaxPool2d(3, 2, ceil_mode=True)  # for sizes that are multiples of 4")
    if isinstance(encoder, SimclrResNet | ByolResNet) and encoder.depth < 50:  # else it needs one anyway
        differs.append("a projection on the first block's shortcut")
        layers = "torch.nn.Conv2d(64, 64, 1, bias=False), torch.nn.BatchNorm2d(64)"
        lines.append(f"model.layer1[0].downsample = torch.nn.Sequential({layers})")
    if isinstance(encoder, S4lResNet):
        differs.append("pre-activation blocks (ResNet v2), and a max-pool padded by zeros, which count as values")
    if _has_selective_kernels(encoder):
        kind = "SKNet's, in 32 groups" if isinstance(encoder, ByolResNet) else "SimCLRv2's, with ResNet-D's shortcuts"
        differs.append(f"selective kernels: {kind}")
    if width != 64 or isinstance(encoder, S4lResNet) or _has_selective_kernels(encoder):
        return differs, []
    return differs, [*lines, "model.fc = torch.nn.Identity()"]


def _has_selective_kernels(encoder: Encoder) -> bool:
    return isinstance(encoder, SimclrResNet | ByolResNet) and encoder.selective_kernel
