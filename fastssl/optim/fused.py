"""torch's own optimisers, told to read what a step gives them where that lies."""

from __future__ import annotations

import torch
from torch.optim import SGD, AdamW, Optimizer


def fuse(optimizer: Optimizer, device: torch.device) -> None:
    """On a GPU, have torch's SGD or AdamW take its whole step in one kernel: the same arithmetic.

    Only then does it read on the device a rate that is a tensor, as a captured graph needs, and fp16's verdict on the
    gradients: else the host waits for either. To be called anew after `load_state_dict`, which puts back what suited
    the device of the checkpoint. Other optimisers are left as they are.
    """
    if device.type != "cuda" or not isinstance(optimizer, SGD | AdamW):
        return
    optimizer._step_supports_amp_scaling = True  # GradScaler asks for it
    for group in (optimizer.defaults, *optimizer.param_groups):
        group.update(fused=True, foreach=False)
        if isinstance(optimizer, AdamW):
            group["capturable"] = True  # its count of steps lies on the device, too
