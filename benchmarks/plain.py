"""PAWS's training step as others write it: what `benchmarks.step` measures fastssl against.

Authors   behaves as PAWS's released code does (facebookresearch/suncet at 731547d): NCHW, a list of views of which
          those of one size are concatenated, float16 with a gradient scaler on a GPU and float32 on a CPU, label
          products and similarities as whole matrices, LARS tensor by tensor, the host waiting at every turn
Plain     what a careful user of today's PyTorch writes: channels-last, bfloat16, foreach LARS, no waiting; optionally
          the network and the loss under `torch.compile`

The two share networks and mathematics. State-dict keys are those of `fastssl`'s networks, so that weights go across.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import optimizer
from benchmarks.optimizer import DECAY, EPS, MOMENTUM, TRUST
from fastssl.optim.param_groups import lars_groups

# --------------------------------------------------------------------------------------------------------- networks


class WideBlock(nn.Module):
    """Pre-activation, biased convolutions, the stride in the second."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1)
        changes = stride > 1 or in_channels != channels
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x), inplace=True))
        out = self.conv2(F.relu(self.bn2(out), inplace=True))
        return out + self.shortcut(x)


class WideResNet(nn.Module):
    """WRN-depth-widen: [N, in_channels, H, W] -> [N, 64 * widen]."""

    def __init__(self, depth: int = 28, widen: int = 2, in_channels: int = 3):
        super().__init__()
        blocks, channels, self.num_features = (depth - 4) // 6, 16, 64 * widen
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        groups = []
        for group in range(3):
            layers = []
            for index in range(blocks):
                stride = 2 if group > 0 and index == 0 else 1
                layers.append(WideBlock(channels, 16 * widen * 2**group, stride))
                channels = 16 * widen * 2**group
            groups.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3 = groups
        self.bn1 = nn.BatchNorm2d(channels, momentum=0.99)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return F.relu(self.bn1(x), inplace=True).mean((2, 3))


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride, 1x1 to four times the channels."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.downsample = nn.Sequential()
        if stride > 1 or in_channels != 4 * channels:
            projection = nn.Conv2d(in_channels, 4 * channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(4 * channels))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        return F.relu(self.bn3(self.conv3(out)) + self.downsample(x), inplace=True)


class ResNet50(nn.Module):
    """[N, 3, H, W] -> [N, 32 * base_width]; ResNet-50 at the default width."""

    def __init__(self, base_width: int = 64):
        super().__init__()
        self.conv1 = nn.Conv2d(3, base_width, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(base_width)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        channels, groups = base_width, []
        for group, blocks in enumerate((3, 4, 6, 3)):
            layers = []
            for index in range(blocks):
                stride = 2 if group > 0 and index == 0 else 1
                layers.append(Bottleneck(channels, base_width * 2**group, stride))
                channels = 4 * base_width * 2**group
            groups.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3, self.layer4 = groups
        self.num_features = channels

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x)), inplace=True))
        return self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3))


class Attention(nn.Module):
    """torch's fused attention between two linear layers."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        images, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(images, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v)
        return self.proj(seen.transpose(1, 2).reshape(images, tokens, width))


class VitBlock(nn.Module):
    """Pre-norm, an MLP four times as wide."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential()
        self.mlp.add_module("fc1", nn.Linear(width, 4 * width))
        self.mlp.add_module("act", nn.GELU())
        self.mlp.add_module("fc2", nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """[N, 3, H, W] -> the class token behind the last norm, [N, width]; ViT-S/16 by default."""

    def __init__(self, size: int = 224, patch: int = 16, width: int = 384, depth: int = 12, heads: int = 6):
        super().__init__()
        self.side, self.num_features = size // patch, width
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.side**2 + 1, width))
        self.patch_embed = nn.Sequential()
        self.patch_embed.add_module("proj", nn.Conv2d(3, width, patch, patch))
        self.blocks = nn.Sequential(*(VitBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embed(x)
        positions = self.pos_embed[:, 1:]
        if patches.shape[-1] != self.side:
            grid = positions.transpose(1, 2).unflatten(2, (self.side, self.side))
            grid = F.interpolate(grid, patches.shape[-2:], mode="bicubic", antialias=True)
            positions = grid.flatten(2).transpose(1, 2)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        tokens = torch.cat([first, patches.flatten(2).transpose(1, 2) + positions], dim=1)
        return self.norm(self.blocks(tokens)[:, 0])


INPLACE_RELU = functools.partial(nn.ReLU, inplace=True)


class PawsNet(nn.Module):
    """Trunk, projection head and, where asked for, prediction head: images of one size -> h, z, [N, out_features].
    `hidden` is the width of the heads' hidden layers; None: PAWS's for ResNets."""

    def __init__(
        self,
        trunk: WideResNet | ResNet50 | ViT,
        out_features: int,
        prediction: bool,
        hidden: int | None = None,
        activation: Callable[[], nn.Module] = INPLACE_RELU,
    ):
        super().__init__()
        wide, within = hidden or trunk.num_features, hidden or out_features // 4
        self.trunk = trunk
        self.projection = nn.Sequential()
        for name, layer in {
            "fc1": nn.Linear(trunk.num_features, wide),
            "bn1": nn.BatchNorm1d(wide),
            "act1": activation(),
            "fc2": nn.Linear(wide, wide),
            "bn2": nn.BatchNorm1d(wide),
            "act2": activation(),
            "fc3": nn.Linear(wide, out_features),
        }.items():
            self.projection.add_module(name, layer)
        self.prediction = nn.Sequential()
        if prediction:
            self.prediction.add_module("bn1", nn.BatchNorm1d(out_features))
            self.prediction.add_module("fc1", nn.Linear(out_features, within))
            self.prediction.add_module("bn2", nn.BatchNorm1d(within))
            self.prediction.add_module("act", activation())
            self.prediction.add_module("fc2", nn.Linear(within, out_features))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.projection(self.trunk(x))
        return h, self.prediction(h)


def encode(net: Callable[[Tensor], tuple[Tensor, Tensor]], views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """h and z of all views, rows in their order; a pass, with batch statistics of its own, for each run of views of one
    size."""
    sizes = [list(group) for _, group in itertools.groupby(views, lambda view: view.shape[-1])]
    h, z = zip(*(net(torch.cat(same)) for same in sizes), strict=True)
    return torch.cat(h), torch.cat(z)


# ------------------------------------------------------------------------------------------------------------- loss


def smoothed(columns_S: Tensor, num_columns: int, smoothing: float, dtype: torch.dtype) -> Tensor:
    """Label matrix [S, K]."""
    return F.one_hot(columns_S, num_columns).to(dtype) * (1 - smoothing) + smoothing / num_columns


def soft_nearest_neighbours(query_ND: Tensor, support_SD: Tensor, labels_SK: Tensor, tau: float) -> Tensor:
    query_ND, support_SD = F.normalize(query_ND), F.normalize(support_SD)
    return torch.softmax(query_ND @ support_SD.T / tau, dim=1) @ labels_SK


def sharpen(p_NK: Tensor, temperature: float) -> Tensor:
    p_NK = p_NK ** (1 / temperature)
    return p_NK / p_NK.sum(dim=1, keepdim=True)


def authors_times_log(t: Tensor, p: Tensor) -> Tensor:
    """t log p, in the form that gives 0 for t = p = 0."""
    return -torch.log(p ** (-t))


def times_log(t: Tensor, p: Tensor) -> Tensor:
    return t * p.log()


def paws_loss(
    h_ND: Tensor,
    z_ND: Tensor,
    labels_SK: Tensor,
    images: int,
    times_log: Callable[[Tensor, Tensor], Tensor],
    tau: float = 0.1,
    sharpen_T: float = 0.25,
) -> Tensor:
    """Cross-entropy to the other view's sharpened prediction, less the mean prediction's entropy. Rows of h and z are
    the supports, then whole views of `images` images, the two global ones first."""
    num_support = len(labels_SK)
    with torch.no_grad():
        support, first, second, _ = h_ND.split([num_support, images, images, len(h_ND) - num_support - 2 * images])
        target = sharpen(soft_nearest_neighbours(torch.cat([second, first]), support, labels_SK, tau), sharpen_T)
        num_crops = (len(z_ND) - num_support) // images - 2
        mean = (target[:images] + target[images:]) / 2
        target = torch.cat([target, *num_crops * [mean]])
        target = torch.where(target < 1e-4, 0.0, target)
    p = soft_nearest_neighbours(z_ND[num_support:], z_ND[:num_support], labels_SK, tau)
    cross_entropy = -times_log(target, p).sum(dim=1).mean()
    mean_p = sharpen(p, sharpen_T).mean(dim=0)
    return cross_entropy + times_log(mean_p, mean_p).sum()


# ------------------------------------------------------------------------------------------------------------- LARS


class LarsByTensor(torch.optim.Optimizer):
    """The authors' step of `benchmarks.optimizer`, as a gradient scaler takes it."""

    def __init__(self, net: nn.Module):
        super().__init__(lars_groups(net, "authors"), {"lr": 0.0})
        self._take = optimizer.authors(lars_groups(net, "authors"))

    def step(self, closure: None = None) -> None:
        self._take(self.param_groups[0]["lr"])


class LarsForeach(torch.optim.Optimizer):
    """The same rule in torch's foreach operations, without waiting."""

    def __init__(self, net: nn.Module):
        super().__init__(lars_groups(net, "authors"), {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            params = group["params"]
            grads = [p.grad for p in params]
            if not group["lars_exclude"]:
                weight_norm, grad_norm = (torch.stack(torch._foreach_norm(ts)) for ts in (params, grads))
                ratio = TRUST * weight_norm / (grad_norm + weight_norm * DECAY + EPS)
                adapts = (weight_norm != 0) & (grad_norm != 0)
                torch._foreach_add_(grads, torch._foreach_mul(params, (DECAY * adapts).unbind()))
                torch._foreach_mul_(grads, torch.where(adapts, ratio, 1.0).unbind())
            if params[0] not in self.state:
                for p in params:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum"] for p in params]
            torch._foreach_mul_(momenta, MOMENTUM)
            torch._foreach_add_(momenta, grads, alpha=-group["lr"])
            torch._foreach_add_(params, momenta)


def adamw(net: nn.Module, betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """torch's own, of two groups: what is decayed, and norms, biases, tokens and positions."""
    spared = {"trunk.cls_token", "trunk.pos_embed"}
    decayed = {name for name, p in net.named_parameters() if p.ndim > 1} - spared
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": 1.0}, {"params": [], "weight_decay": 0.0}]
    for name, p in net.named_parameters():
        groups[name not in decayed]["params"].append(p)
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps)


# ------------------------------------------------------------------------------------------------------------ steps


class Authors:
    """One step after the other on views that are separate tensors: supports first, two global views, small views."""

    def __init__(self, net: PawsNet, device: torch.device, half: bool = True):
        self.net = net.to(device)
        self.device = device
        self.half = half and device.type == "cuda"
        self.optimizer = LarsByTensor(net)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.half)

    def loss(self, views: Sequence[Tensor], labels_SK: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.float16, enabled=self.half):
            h, z = encode(self.net, views)
        if self.half:
            h, z = h.float(), z.float()
        return paws_loss(h, z, labels_SK, len(views[-1]), authors_times_log)

    def step(self, views: Sequence[Tensor], labels_SK: Tensor, lr: float) -> float:
        self._synchronize()  # their timer does, once the batch is on the device
        self.optimizer.zero_grad()
        loss = self.loss(views, labels_SK)
        self.scaler.scale(loss).backward()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._synchronize()
        return loss.item()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Plain:
    """The same on views of one size in one tensor: supports and global views, small views. `optimizer` is LARS unless
    it is given."""

    def __init__(
        self,
        net: PawsNet,
        device: torch.device,
        half: bool = True,
        compiled: bool = False,
        optimizer: torch.optim.Optimizer | None = None,
    ):
        self.net = net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.device = device
        self.half = half
        self.optimizer = optimizer or LarsForeach(net)
        self.encode = torch.compile(net, dynamic=False) if compiled else net
        self.paws_loss = torch.compile(paws_loss, dynamic=False) if compiled else paws_loss

    def loss(self, views: Sequence[Tensor], labels_SK: Tensor, images: int) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            h, z = encode(self.encode, views)
        if self.half:
            h, z = h.float(), z.float()
        return self.paws_loss(h, z, labels_SK, images, times_log)

    def step(
        self, views: Sequence[Tensor], labels_SK: Tensor, images: int, lr: float, decay: float | None = None
    ) -> Tensor:
        loss = self.loss(views, labels_SK, images)
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
            if decay is not None and group["weight_decay"]:
                group["weight_decay"] = decay
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()
