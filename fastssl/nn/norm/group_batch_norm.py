"""Batch norm by groups of rows: the statistics that networks have whose devices were never synchronised."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl import dist
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm


class GroupBatchNorm(GlobalBatchNorm):
    """As `GlobalBatchNorm`, but in training this rank's rows are `num_groups` runs of equally many consecutive rows,
    and each run is normalised by its own statistics. S4L's TPU cores, each of which knew its own images only.

    Outputs and gradients depend on which rows stand together and not on the number of ranks. Running statistics move
    once a pass, by the mean over all groups of all ranks, for which ranks send one message; they stay equal on all.
    Has forward-mode derivatives. Raises ValueError where the groups do not divide the rows, or a group has one value a
    channel.
    """

    def __init__(
        self, num_features: int, num_groups: int, eps: float = 1e-5, momentum: float = 0.1, affine: bool = True
    ) -> None:
        super().__init__(num_features, eps, momentum, affine)
        self.num_groups = num_groups

    def lockstep(
        self, xs: Sequence[Tensor], residuals: Sequence[Tensor] | None = None, *, relu: bool = False
    ) -> list[Tensor]:
        if not self._by_batch:
            return super().lockstep(xs, residuals, relu=relu)
        for x in xs:
            self._check_input_dim(x)
            if len(x) % self.num_groups:
                raise ValueError(f"{len(x)} rows are no {self.num_groups} groups of equally many")
            if x.numel() == self.num_groups * self.num_features:
                raise ValueError("batch norm needs more than one row in a group to have a variance")
        groups = [group for x in xs for group in x.chunk(self.num_groups)]
        shortcuts = [group for residual in residuals or () for group in residual.chunk(self.num_groups)]
        ys, (mean_RC, var_RC, n_R1) = self._normalised(groups, shortcuts, relu, None)
        if self.update_running_stats:
            self._follow(self._mean(mean_RC), self._mean(var_RC * (n_R1 / (n_R1 - 1))))
        return [torch.cat(ys[i : i + self.num_groups]) for i in range(0, len(ys), self.num_groups)]

    def _mean(self, statistics_RC: Tensor) -> Tensor:
        """Over the groups of each x, of all ranks: [num_groups * R, C] -> [R, C]."""
        mean_RC: Tensor = statistics_RC.unflatten(0, (-1, self.num_groups)).mean(dim=1)
        if dist.world_size() == 1:
            return mean_RC
        return dist.sum_over_group(mean_RC, dist.statistics_group().group_name) / dist.world_size()
