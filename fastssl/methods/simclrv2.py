"""SimCLRv2: an image's two views find each other among the views of all other images. Pre-training, fine-tuning and
distillation are its three stages; the loss here is the first one's.

Paper      Chen et al., NeurIPS 2020, arXiv 2006.10029
Code       google-research/simclr at 383d414. The settings are the paper's; what the paper does not say, and how the
           loss is scaled, images are augmented and tensors adapted, is the code's
Command    fastssl train simclrv2.rn50_800ep --data PATH --gpus 64
Published  ResNet-50: 71.7 % linear; fine-tuned 57.9 / 68.4 / 76.3 % with 1 / 10 / 100 % of the labels. These are with
           the momentum memory, which was never released; without it their author got 71.1 % linear (simclr#77)
Hours      6 a hundred epochs of ResNet-50 on 32 TPU v3 (the authors')

Three things are not as in the code. An epoch is 312 whole batches: 800 epochs are 249,600 steps with 12,480 of warm-up,
where the code cuts the endless stream into 250,228 and 12,511. Blur's width is drawn for each image, not for each
device's batch. No linear classifier is trained along: the protocols measure that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastssl.dist import gather_rows, gather_rows_together, mean_over_ranks, rank
from fastssl.errors import ConfigError
from fastssl.methods.base import (
    Artefact,
    Config,
    Facts,
    Horizon,
    Method,
    Nets,
    autocast,
    in_full,
)
from fastssl.nn.ema import copy_of, follow
from fastssl.nn.encoders.encoder import Encoder
from fastssl.nn.encoders.resnet import SimclrResNet
from fastssl.nn.heads import simclr_head
from fastssl.optim.horizon import Share
from fastssl.optim.lars import Lars
from fastssl.optim.optimiser import Optimiser
from fastssl.optim.rates import Rate, Scaling, WarmupCosine
from loaders.batch import Batch
from loaders.plan.ops import TF_LUMA, Flip, GaussianKernelBlur, Grayscale, TfColourJitter
from loaders.plan.plan import Plan
from loaders.plan.views import UNIT, Centre, DistortedBox, Filter, Shuffled, Stream, View

MIN_NORM = 1e-6  # simclr divides by the root of max(Σx², 1e-12)


def colours(strength: float) -> tuple[TfColourJitter, Grayscale]:
    """SimCLR's colour distortion; ImageNet's strength is 1, CIFAR-10's 0.5."""
    s = strength
    return TfColourJitter(0.8, 0.8 * s, contrast=0.8 * s, saturation=0.8 * s, hue=0.2 * s), Grayscale(0.2, TF_LUMA)


VIEW = View(
    name="global",
    size=224,
    crop=DistortedBox((0.08, 1.0)),
    ops=(Flip(), *colours(1.0), GaussianKernelBlur(0.5, taps=GaussianKernelBlur.taps_for(224))),
    pixels=UNIT,
    filter=Filter.BICUBIC_ALIASED,
    copies=2,
)
# The code crops .875 of the shorter side and scales that to 224, which is scaling to 256 and cropping 224.
EVAL_VIEW = View("eval", 224, Centre(resize=256), pixels=UNIT, filter=Filter.BICUBIC_ALIASED)


def nt_xent(z1_ND: Tensor, z2_ND: Tensor, *, tau: float) -> Tensor:
    """SimCLR's normalised, temperature-scaled cross-entropy: 0-dim, of this rank's images.

    z1_ND, z2_ND   [N, D] this rank's images in one view and in the other, any length; float32 or float64

    Each of the 2N rows looks for its image's other view among the 2·N_global - 1 other rows of all ranks, by softmax
    over cosine / tau. The result is the sum of both views' means, as in the authors' code: twice the mean over 2N
    anchors. LARS does not feel the factor, but biases, norms and the balance with weight decay do.

    Differentiable in both. Every rank must call it; rows are gathered with gradient, so averaging the parameters'
    gradients over ranks gives that of the global batch. Needs [2N, 2·N_global] numbers.
    """
    unit = _unit(z1_ND), _unit(z2_ND)
    all_views = gather_rows_together(*unit)
    num_images = len(all_views[0])
    image_N = _own_rows(z1_ND)
    positive_Q = torch.cat([image_N + num_images, image_N])
    image_K = torch.arange(num_images, device=z1_ND.device).repeat(2)
    return 2 * _cross_entropy(torch.cat(unit), image_N.repeat(2), torch.cat(all_views), image_K, positive_Q, tau)


class KeyMemory(nn.Module):
    """The newest `size` keys and whose images they are: a ring, equal on all ranks; image -1 marks an empty place."""

    key_MD: Tensor
    image_M: Tensor
    num_put: Tensor

    def __init__(self, size: int, width: int):
        super().__init__()
        self.register_buffer("key_MD", torch.zeros(size, width))
        self.register_buffer("image_M", torch.full((size,), -1))
        self.register_buffer("num_put", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def put(self, key_KD: Tensor, image_K: Tensor) -> Tensor:
        """Write K rows over the oldest ones, K at most the ring's size; their places, int64 [K]."""
        place_K = (self.num_put + torch.arange(len(key_KD), device=key_KD.device)) % len(self.key_MD)
        self.key_MD.index_copy_(0, place_K, key_KD)
        self.image_M.index_copy_(0, place_K, image_K)
        self.num_put += len(key_KD)
        return place_K


def momentum_nt_xent(
    z1_ND: Tensor, z2_ND: Tensor, key1_ND: Tensor, key2_ND: Tensor, image_N: Tensor, memory: KeyMemory, *, tau: float
) -> Tensor:
    """`nt_xent` of this rank's views `z` against a momentum encoder's `key`s of the same images and of past batches.

    First the keys of all ranks enter the memory, view 1 before view 2, each in rank order. Then each row looks for its
    image's other view among the memory's keys of other images: `Memory` tells why. `image_N`: int64, one number an
    image. Differentiable in z. Every rank must call it. Scaled as `nt_xent`. Needs [2N, memory size] numbers.
    """
    keys = gather_rows_together(_unit(key1_ND).detach(), _unit(key2_ND).detach())
    place1_K, place2_K = memory.put(torch.cat(keys), gather_rows(image_N).repeat(2)).chunk(2)
    own_N = _own_rows(z1_ND)
    positive_Q = torch.cat([place2_K[own_N], place1_K[own_N]])
    query_QD = torch.cat([_unit(z1_ND), _unit(z2_ND)])
    return 2 * _cross_entropy(query_QD, image_N.repeat(2), memory.key_MD, memory.image_M, positive_Q, tau)


def _cross_entropy(
    query_QD: Tensor, image_Q: Tensor, key_KD: Tensor, image_K: Tensor, positive_Q: Tensor, tau: float
) -> Tensor:
    """Mean over queries of -log softmax(cosine / tau) at their positive, among it and the keys of other images."""
    place_K = torch.arange(len(key_KD), device=key_KD.device)
    left_out_QK = (image_Q[:, None] == image_K) & (positive_Q[:, None] != place_K) | (image_K < 0)
    logits_QK = (query_QD @ key_KD.T).div_(tau).masked_fill_(left_out_QK, -torch.inf)
    return F.cross_entropy(logits_QK, positive_Q)


def _unit(x_ND: Tensor) -> Tensor:
    return F.normalize(x_ND, dim=1, eps=MIN_NORM)


def _own_rows(x_ND: Tensor) -> Tensor:
    """Where this rank's rows are among those of all ranks."""
    return torch.arange(len(x_ND), device=x_ND.device) + rank() * len(x_ND)


@torch.no_grad()
def contrast(query_ND: Tensor, key_ND: Tensor, *, tau: float) -> dict[str, Tensor]:
    """How well an image's view finds its other one among those of all ranks' images; as the authors' code logs it.

    contrast_top1     share of the queries whose most similar key is their own
    contrast_entropy  mean entropy, in nats, of softmax(cosine / tau) over keys

    No gradients; every rank must call it, and all get the same numbers.
    """
    log_p_NK = torch.log_softmax(_unit(query_ND) @ gather_rows(_unit(key_ND)).T / tau, dim=1)
    found = log_p_NK.argmax(dim=1) == _own_rows(query_ND)
    entropy_N = -(log_p_NK.exp() * log_p_NK).sum(dim=1)
    return {
        "contrast_top1": mean_over_ranks(found.to(log_p_NK.dtype).mean()),
        "contrast_entropy": mean_over_ranks(entropy_N.mean()),
    }


@dataclass(frozen=True)
class Memory:
    """Negatives of past batches. It was never released: the paper gives two numbers, and its author says that what is
    contrasted with comes from the momentum encoder, from current and past batches, consistent with MoCo (simclr#115).

    What that leaves open is settled so:
    - Both views are queries in turn, of the trained network, and their positive is the momentum encoder's key of the
      other view: the symmetry of NT-Xent.
    - Both views' keys enter the memory, and the current batch's are there when its queries come: a batch of 4,096 adds
      8,192, so `size` spans eight steps.
    - The image's own other keys are left out, not negatives: the key of the same view, as NT-Xent leaves out a row's
      product with itself (the same pixels must not repel each other), and those that an earlier epoch left in the
      memory, which matter for sets as small as CIFAR-10.
    - Both networks take the statistics of the global batch in each norm. MoCo's shuffling guards against statistics of
      one device's rows, which there are none of.
    """

    size: int = 65_536  # "64K" (paper, section 3.1): keys
    decay: float = 0.999  # of the average that the momentum encoder is, at every step (paper, section 3.1)


@dataclass(frozen=True)
class Simclrv2Config(Config):
    """Settings of the first stage; the defaults are those of the paper's ImageNet runs. Of `labels` training sees
    nothing: the protocols do."""

    eval_view: View = EVAL_VIEW
    encoder: Encoder = SimclrResNet(50)
    head_layers: int = 3
    hidden_features: int | None = None  # of the head's layers but the last; none: the trunk's (section 2, note 2)
    out_features: int = 128
    view: View = VIEW
    batch_global: int = 4096
    tau: float = 0.1  # the code's default; the paper does not say
    memory: Memory | None = None
    # The code leaves out of LARS what is called bias or batch_normalization: all that has one axis.
    optimizer: Optimiser = Lars("simclr", weight_decay=1e-4)
    rate: Rate = WarmupCosine(0.1, Share(0.05))  # its peak is `peak_rate`'s base, and follows the batch
    scaling: Scaling = "sqrt"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau <= 0:
            raise ConfigError(f"tau {self.tau}: a temperature, above zero")
        if self.head_layers < 2:
            raise ConfigError(f"head_layers {self.head_layers}: fine-tuning keeps the first of two or more")
        if self.hidden_features == 0:
            raise ConfigError("hidden_features 0: a head that lets nothing through; none is as wide as the trunk")
        if self.view.copies != 2:
            raise ConfigError(f"view.copies {self.view.copies}: SimCLR compares two views of each image")
        if self.memory is not None and not 0 <= self.memory.decay < 1:
            raise ConfigError(f"memory.decay {self.memory.decay}: the momentum encoder follows for 0 to below 1")
        if self.memory is not None and self.memory.size < 2 * self.batch_global:
            raise ConfigError(
                f"memory.size {self.memory.size}: both views of a batch of {self.batch_global} have to find room"
            )

    def build(self, facts: Facts, inputs: Mapping[str, Artefact]) -> Simclrv2:
        return Simclrv2(self, facts, inputs)


class SimclrNet(nn.Module):
    """Trunk and projection head."""

    def __init__(self, config: Simclrv2Config, channels: int):
        super().__init__()
        self.trunk = config.encoder.build(channels)
        self.projection = simclr_head(
            self.trunk.num_features, config.out_features, config.head_layers, hidden_features=config.hidden_features
        )

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] -> z [N, out_features] in full precision."""
        return in_full(self.projection(self.trunk(x)))


class Simclrv2(Method[Simclrv2Config, SimclrNet]):
    """Contrastive pre-training."""

    taps = ("backbone", "proj1", "z")  # proj1: after the first projection layer, from which fine-tuning starts

    def plan(self) -> Plan:
        c = self.config
        stream = Stream("unlabelled", "unlabelled", (c.view,), Shuffled(), c.batch_global)
        return Plan((stream,), epoch_of="unlabelled", seed=self.facts.seed)

    def nets(self) -> Nets[SimclrNet]:
        c = self.config
        online = SimclrNet(c, self.facts.channels)
        if c.memory is None:
            return Nets(online)
        return Nets(online, target=copy_of(online), state=KeyMemory(c.memory.size, c.out_features))

    def rates(self, step: int, horizon: Horizon) -> tuple[float, ...]:
        c = self.config
        rate = c.rate.scaled(c.batch_global, c.scaling).at(step, horizon)
        return rate, rate

    def loss(self, nets: Nets[SimclrNet], batch: Batch) -> dict[str, Tensor]:
        c, part = self.config, batch.parts["unlabelled"]
        x = part.x[c.view.name]
        with autocast(batch.step.device, c.precision):
            z1_ND, z2_ND = nets.online(x).chunk(2)
        if nets.target is None:
            self._seen = z1_ND.detach(), z2_ND.detach()
            return {"total": nt_xent(z1_ND, z2_ND, tau=c.tau)}
        with torch.no_grad(), autocast(batch.step.device, c.precision):
            key1_ND, key2_ND = nets.target(x).chunk(2)
        self._seen = z1_ND.detach(), key2_ND
        assert isinstance(nets.state, KeyMemory)
        return {"total": momentum_nt_xent(z1_ND, z2_ND, key1_ND, key2_ND, part.ids, nets.state, tau=c.tau)}

    def after_step(self, nets: Nets[SimclrNet], step: int, horizon: Horizon) -> None:
        if self.config.memory is not None and nets.target is not None:
            follow(nets.target, nets.online, self.config.memory.decay)

    def metrics(self, nets: Nets[SimclrNet], batch: Batch, truth: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return contrast(*self._seen, tau=self.config.tau)

    def embed(self, nets: Nets[SimclrNet], x: Tensor, tap: str) -> Tensor:
        net = nets.online
        with autocast(x.device, self.config.precision):
            features = net.trunk(x)
            if tap != "backbone":
                features = (net.projection if tap == "z" else net.projection[:3])(features)
        return in_full(features)
