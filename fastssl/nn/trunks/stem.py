"""What stands before a ResNet's blocks: convolutions, and the max-pools by which published networks differ."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.nn.norm.lockstep import LockstepSequential

Norm = Callable[[int], GlobalBatchNorm]
Stem = Literal["imagenet", "cifar"]
MaxPool = Callable[[Tensor], Tensor]


def stem_convolution(stem: Stem, in_channels: int, channels: int) -> nn.Conv2d:
    """ "imagenet": 7x7 of stride 2; "cifar", for images up to 32: 3x3 of stride 1."""
    if stem == "imagenet":
        return nn.Conv2d(in_channels, channels, 7, 2, padding=3, bias=False)
    if stem == "cifar":
        return nn.Conv2d(in_channels, channels, 3, 1, padding=1, bias=False)
    raise ValueError(f'no stem "{stem}"; there are "imagenet" and "cifar"')


def deep_stem(in_channels: int, channels: int, norm: Norm) -> LockstepSequential:
    """ResNet-D's three 3x3 convolutions in the 7x7's place, the first of stride 2; the first two of half the channels,
    each with norm and ReLU."""
    return LockstepSequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, channels // 2, 3, 2, padding=1, bias=False),
            bn1=norm(channels // 2),
            relu1=nn.ReLU(inplace=True),
            conv2=nn.Conv2d(channels // 2, channels // 2, 3, padding=1, bias=False),
            bn2=norm(channels // 2),
            relu2=nn.ReLU(inplace=True),
            conv3=nn.Conv2d(channels // 2, channels, 3, padding=1, bias=False),
        )
    )


# Each pool is 3x3 of stride 2: [N, C, H, W] -> [N, C, ceil(H / 2), ceil(W / 2)].


def symmetric_max_pool(x: Tensor) -> Tensor:
    """Padded by -inf on all sides: torchvision's and PAWS's."""
    return F.max_pool2d(x, 3, 2, padding=1)


def same_max_pool(x: Tensor) -> Tensor:
    """TensorFlow's "SAME", SimCLRv2's and BYOL's: an even side is padded by -inf at the bottom or right only."""
    odd = x.shape[2] % 2, x.shape[3] % 2  # an odd side has one of padding at each end
    return F.max_pool2d(x, 3, 2, padding=odd, ceil_mode=True)


def zero_padded_max_pool(x: Tensor) -> Tensor:
    """Padded by zeros on all sides, which count as values: S4L's, where x may be negative."""
    return F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 2)


def no_pool(x: Tensor) -> Tensor:
    return x
