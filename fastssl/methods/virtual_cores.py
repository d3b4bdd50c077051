"""Virtual cores: S4L's TPU cores as groups of a rank's rows; batch norm and triplets know their own images alone."""

from __future__ import annotations

from torch import nn

from fastssl import dist
from fastssl.errors import ConfigError
from fastssl.nn.norm.group_batch_norm import GroupBatchNorm


def cores_of_this_rank(batch_global: int, core_images: int | None) -> int | None:
    """How many of a batch's cores this rank has; None where the batch is one. Raises ConfigError where ranks cannot
    share them evenly."""
    if core_images is None:
        return None
    num_cores, world = batch_global // core_images, dist.world_size()
    if num_cores % world:
        raise ConfigError(
            f"batches of {batch_global} images are {num_cores} virtual cores of {core_images}, which {world} ranks "
            f"cannot share evenly: take a number of ranks that divides {num_cores}, or --set core_images=none, which "
            "makes one core of the batch"
        )
    return num_cores // world


def refuse_without_groups(trunk: nn.Module, encoder: str, core_images: int | None) -> None:
    """Raise ConfigError where the trunk has no batch norm by groups: nothing in it would know of cores."""
    if not any(isinstance(layer, GroupBatchNorm) for layer in trunk.modules()):
        raise ConfigError(
            f"{encoder} has no batch norm, so virtual cores of {core_images} images mean nothing: "
            "--set core_images=none"
        )
