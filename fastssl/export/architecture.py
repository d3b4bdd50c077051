"""What a trunk is, for those who build it without fastssl: its facts, and how torchvision's ResNet becomes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastssl.config.plain import to_plain
from fastssl.nn.encoders.encoder import Encoder
from fastssl.weights.read import fitting


def architecture(encoder: Encoder, channels: int, trunk: Mapping[str, Tensor], source: str) -> dict[str, Any]:
    """Plain facts of the trunk that `encoder` builds for images of `channels`; `trunk` are its tensors.

    "torchvision" holds lines of Python that make its ResNet into this one, and "differs_from_torchvision" what they
    change; without lines, it cannot be made so. "timm" is the name of timm's model where that is the same, and
    "timm_settings" what its `create_model` is given besides.
    Raises WeightsError where the tensors are not this trunk's.
    """
    with torch.device("meta"):  # shapes alone
        module = encoder.build(channels)
    fitting(module.state_dict(), trunk, source)
    likeness = encoder.from_torchvision(channels)
    resized = {"dynamic_img_size": True} if likeness.resizes else {}
    return {
        "name": encoder.name,
        "encoder": to_plain(encoder),
        "num_features": module.num_features,
        "num_parameters": sum(p.numel() for p in module.parameters()),
        "differs_from_torchvision": list(likeness.differs),
        "torchvision": list(likeness.lines),
        "timm": likeness.timm,
        "timm_settings": {"num_classes": 0, "in_chans": channels} | resized if likeness.timm else {},
    }
