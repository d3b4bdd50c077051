"""Selective kernels (Li et al. 2019): two branches of a convolution, and how much of each an image wants, per channel.

The bottleneck of a ResNet in two forms, which differ in the branches only:

- SimCLRv2's: both 3x3, as one convolution of twice the channels. Belongs in a ResNet-D.
- SKNet's own, as SemPPL has it: 3x3 and 3x3 of dilation 2, both in 32 groups and twice as wide as a ResNet's.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.nn.norm.lockstep import Lockstep
from fastssl.nn.trunks.stem import Norm

_RATIO = 16  # SimCLRv2's ratio of 0.0625; SKNet's reduction
_MIN_HIDDEN = 32  # both


def _two_3x3(channels: int, stride: int) -> nn.Module:
    return nn.Conv2d(channels, 2 * channels, 3, stride, padding=1, bias=False)


class NearAndFar(nn.Module):
    """Branches of dilation 1 and 2, in groups: [N, channels, H, W] -> [N, 2 * channels, H / stride, W / stride].

    Side by side, for one norm and one message; that copies them once each way.
    """

    groups = 32

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.near, self.far = (
            nn.Conv2d(
                channels, channels, 3, stride, padding=dilation, dilation=dilation, groups=self.groups, bias=False
            )
            for dilation in (1, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.near(x), self.far(x)], 1)


class Selection(Lockstep):
    """Weighted sum of two branches: [N, 2 * channels, H, W] -> [N, channels, H, W].

    The weights of each channel are a softmax over the branches, computed from the mean over pixels of their sum.
    """

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        hidden = max(channels // _RATIO, _MIN_HIDDEN)
        self.fc1 = nn.Linear(channels, hidden, bias=False)
        self.bn1 = norm(hidden)
        self.fc2 = nn.Linear(hidden, 2 * channels, bias=False)

    def lockstep(self, xs: Sequence[Tensor]) -> list[Tensor]:
        pooled = [x.mean((2, 3)).unflatten(1, (2, -1)).sum(1) for x in xs]
        hidden = self.bn1.lockstep([self.fc1(x) for x in pooled], relu=True)
        return [_select(x, self.fc2(h)) for x, h in zip(xs, hidden, strict=True)]


def _select(x: Tensor, logits: Tensor) -> Tensor:
    # In the type of x: autocast computes softmax in float32, which would widen whole feature maps.
    weights = logits.unflatten(1, (2, -1)).softmax(1).to(x.dtype)[..., None, None]
    (near, far), (of_near, of_far) = x.chunk(2, dim=1), weights.unbind(1)
    selected: Tensor = near * of_near + far * of_far
    return selected


class SelectiveKernelBottleneck(Lockstep):
    """`fastssl.nn.trunks.resnet.Bottleneck` with two branches in the 3x3's place, SimCLRv2's form."""

    expansion = 4
    widening = 1  # of the channels between the 1x1 convolutions
    branches: Callable[[int, int], nn.Module] = staticmethod(_two_3x3)

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm, downsample: Lockstep) -> None:
        super().__init__()
        inner, out_channels = channels * self.widening, channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = norm(inner)
        self.conv2 = self.branches(inner, stride)
        self.bn2 = norm(2 * inner)  # one norm for both branches: one message
        self.selection = Selection(inner, norm)
        self.conv3 = nn.Conv2d(inner, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)
        self.downsample = downsample

    @property
    def last_norm(self) -> GlobalBatchNorm:
        return self.bn3

    def lockstep(self, xs: Sequence[Tensor]) -> list[Tensor]:
        outs = self.bn1.lockstep([self.conv1(x) for x in xs], relu=True)
        outs = self.bn2.lockstep([self.conv2(out) for out in outs], relu=True)
        outs = self.selection.lockstep(outs)
        return self.bn3.lockstep([self.conv3(out) for out in outs], self.downsample.lockstep(xs), relu=True)


class SKNeXtBottleneck(SelectiveKernelBottleneck):
    """SKNet's form."""

    widening = 2
    branches = NearAndFar
