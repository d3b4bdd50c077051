"""SemPPL: contrastive learning whose positives also come from images that are labelled, or believed to be, alike.

Paper      Bosnjak et al., ICLR 2023, arXiv 2301.05158, on ReLICv2 (Tomasev et al., arXiv 2201.05119)
Code       google-deepmind/semppl at 45cb07d, which evaluates only: how to train was never released. What the paper
           leaves open is a setting below, with what speaks for its default; optimiser, averages and heads are BYOL's
           as released (google-deepmind/deepmind-research)
Command    fastssl train semppl.rn50_300ep --data PATH --gpus 64
Published  ResNet-50, 300 epochs, fine-tuned: 68.5 % with 1 % of the labels, 76.0 % with 10 %
Hours      13 on 64 TPUv3 cores (the authors')

Embeddings of labelled images wait in queues, one for each large view. The nearest ones vote on what an unlabelled image
is, and then every view of an image is drawn to its other views and to some queued images of its class. Without that
(`alpha` 0) it is ReLICv2, BYOL or SimCLR: `base` says which.

Where the paper is silent, or its parts do not agree, and no setting below says what is done:
- Positives are taken from each of the four queues, as the divisor 96 has it; the listing's loop uses the last one.
- A small view's semantic term is of that view; the listing prints the large view's output.
- Every copy draws its mask anew; in the listing an image once masked stays so.
- Negatives, and a queue's positives, are drawn once an image and shared by its views' pairs; the listing draws anew.
- Solarising inverts from half on, as in the release; appendix E.6 says black and white.
- Blur of 96-pixel views has 9 taps, a tenth of the side as in the release; appendix E.5 says 23 for all.
- Every view is cropped, as appendix E says; table 12 has half of them.
- ResNets are v1, as in the release; the text calls them pre-activation.
- Without voting the first view asks; appendix D.2 picks one at random.
- Fine-tuning's classifier begins at zero; appendix A.1 draws it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastssl.dist import gather_rows, gather_rows_together, mean_over_ranks, rank, world_size
from fastssl.errors import ConfigError
from fastssl.losses.keyed_draws import distinct, random_bits
from fastssl.losses.nearest import Majority, Ties, majority, nearest
from fastssl.losses.queues import LabelledQueues
from fastssl.losses.semppl import Base, Byol, Positives, Relic, SimClr, semppl_loss
from fastssl.methods.base import (
    DTYPES,
    Artefact,
    Config,
    Epochs,
    Facts,
    Horizon,
    Method,
    Nets,
    autocast,
    in_full,
    through,
)
from fastssl.nn.ema import copy_of, cosine_decay, follow
from fastssl.nn.encoders.encoder import Encoder
from fastssl.nn.encoders.resnet import ByolResNet
from fastssl.nn.heads import byol_head, simclr_head
from fastssl.nn.norm.lockstep import LockstepSequential
from fastssl.optim.lars import Lars
from fastssl.optim.optimiser import Optimiser
from fastssl.optim.rates import Rate, Scaling, WarmupCosine
from loaders.batch import Batch
from loaders.plan.draws import tag
from loaders.plan.ops import TF_LUMA, Flip, GaussianKernelBlur, Grayscale, Op, Solarise, TfColourJitter
from loaders.plan.plan import Plan
from loaders.plan.views import (
    All,
    ClampedRrc,
    Filter,
    SaliencyMask,
    Shuffled,
    Stream,
    View,
    parse_subset,
)

# --------------------------------------------------------------------------------------------------------- settings


def _view(name: str, size: int, area: tuple[float, float], copies: int, odd: bool, mask: bool) -> View:
    """The paper's views, of two kinds of colours."""
    taps = GaussianKernelBlur.taps_for(size)
    ops: tuple[Op, ...] = (
        Flip(),
        TfColourJitter(0.8, offset=0.4, contrast=0.4, saturation=0.2, hue=0.1),
        Grayscale(0.2, TF_LUMA),
        GaussianKernelBlur(0.1 if odd else 1.0, taps=taps),
    )
    if odd:
        ops += (Solarise(0.2, (0.5, 0.5)),)
    filter, masked = Filter.BICUBIC_ALIASED, SaliencyMask() if mask else None
    return View(name, size, ClampedRrc(area), ops, filter=filter, copies=copies, mask=masked)


def large(name: str, least_area: float, copies: int, odd: bool) -> View:
    return _view(name, 224, (least_area, 1.0), copies, odd, mask=True)


def _small(name: str, odd: bool) -> View:
    """Their areas stand in table 12's odd column."""
    return _view(name, 96, (0.05, 0.14), copies=1, odd=odd, mask=False)


@dataclass(frozen=True)
class SempplConfig(Config):
    """SemPPL's settings; the defaults are those of the paper's ImageNet runs.

    Large views are the copies of `odd_view`, then those of `even_view`; each gives targets, has a queue and, with
    `voting`, votes. Small views are seen by the online network alone.
    """

    base: Base = Relic()
    encoder: Encoder = ByolResNet(50)
    hidden_features: int = 4096
    out_features: int = 256
    odd_view: View = large("odd", 0.14, copies=2, odd=True)
    even_view: View = large("even", 0.08, copies=2, odd=False)
    small_odd_view: View | None = _small("small_odd", odd=True)
    small_even_view: View | None = _small("small_even", odd=False)
    batch_global: int = 4096
    masks: Literal["given", "off"] = "given"  # large views' foreground, given with the data; off: nothing is masked

    alpha: float = 0.2  # weight of semantic positives; 0: none at all, and no queues and votes either
    positives: int = 3  # of each queue, drawn for each image and shared by its views
    # Entries of each queue; none: 20 batches. The paper's 20 are taken as each queue's: its listing makes every one of
    # that size, and its table calls it 80,000.
    capacity: int | None = None
    # The paper fills queues with random vectors, their labels unstated. With 1 % of the labels these would linger for
    # six epochs and pass for positives: queues begin empty, and semantic terms wait for entries.
    start: Literal["empty", "random"] = "empty"
    # Whether a labelled image, queued before positives are drawn, may draw the entry it has just made: as printed. What
    # it left there in earlier epochs it may draw in any case.
    own_entry: bool = True
    neighbours: int = 1
    voting: bool = True
    # Whether images without a label in sight get one by vote. Otherwise labelled images alone have semantic positives:
    # the middle of the paper's table 4b.
    pseudo_labels: bool = True
    ties: Ties = "similarity"  # unstated: of equally many votes, the nearest; "lowest": the lowest class
    # Equation 10 has alpha on the contrast with semantic positives, and not on their divergence.
    alpha_on_kl: bool = False
    # An online view with the target of the same view: so in ReLICv2's listing and in the paper's number of terms.
    same_view_pairs: bool = True
    # What the sum is divided by; none: the number of its terms, (4 + 2)·4·(1 + 3) = 96, as in the paper. LARS would
    # hardly notice, but biases and norms take the raw gradient.
    normaliser: int | None = None

    ema: float = 0.996
    ema_ramp: bool = False  # BYOL's way from `ema` to 1; the paper says a constant 0.996
    optimizer: Optimiser = Lars("byol", weight_decay=1e-6)
    rate: Rate = WarmupCosine(4.8, Epochs(10))
    scaling: Scaling = "none"  # how the peak follows the batch; the paper's 0.3 for each 256 images is "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.base, Byol) and self.base.tau <= 0:
            raise ConfigError(f"tau {self.base.tau} is a temperature, above zero")
        if self.ema > 1:
            raise ConfigError(f"ema {self.ema}: the share of the old average that stays, 1 at most")
        if isinstance(self.base, Relic) and not 1 <= self.base.num_negatives < self.batch_global:
            raise ConfigError(
                f"{self.base.num_negatives} negatives for an image cannot be had from a batch of {self.batch_global}: "
                f"batch_global must be {self.base.num_negatives + 1} or more"
            )
        if not self.same_view_pairs and sum(view.copies for view in self.views) < 2:
            raise ConfigError("same_view_pairs=false leaves no pair where there is one view")
        if isinstance(self.base, SimClr) and (self.same_view_pairs or len(self.views) > 2):
            raise ConfigError("SimCLR compares large views of an image with each other: no small views, and set "
                              "same_view_pairs=false")  # fmt: skip
        if self.alpha and self.num_entries < self.batch_global:
            raise ConfigError(
                f"a queue of {self.capacity} cannot take the labelled images of a batch, which may be all "
                f"{self.batch_global}: capacity must be {self.batch_global} or more"
            )
        if self.alpha and self.neighbours > self.num_entries:
            raise ConfigError(f"{self.neighbours} neighbours cannot be had from a queue of {self.num_entries}")

    @property
    def num_entries(self) -> int:
        """Of each queue."""
        return 20 * self.batch_global if self.capacity is None else self.capacity

    @property
    def views(self) -> tuple[View, ...]:
        """Large ones first, masked as the settings have it."""
        views = (self.odd_view, self.even_view, self.small_odd_view, self.small_even_view)
        there = tuple(view for view in views if view is not None)
        return there if self.masks == "given" else tuple(replace(view, mask=None) for view in there)

    @property
    def num_large(self) -> int:
        return self.odd_view.copies + self.even_view.copies

    def build(self, facts: Facts, inputs: Mapping[str, Artefact]) -> Semppl:
        return Semppl(self, facts, inputs)


# ------------------------------------------------------------------------------------------------------- the method


def vote(
    z_LBD: Tensor, queues: LabelledQueues, *, neighbours: int = 1, voting: bool = True, ties: Ties = "similarity"
) -> Majority:
    """What the queues take each image for. Every large view asks every queue, L² votes in all: the most frequent label
    among its `neighbours` nearest entries. Without `voting`, the first view asks the first queue. Empty queues: -1."""
    num_asked = len(z_LBD) if voting else 1
    queries_ND = z_LBD[:num_asked].flatten(0, 1).to(queues.z_LCD.dtype)
    found = []
    for bank_CD in queues.z_LCD[:num_asked]:
        similarity_Nk, slot_Nk = nearest(queries_ND, bank_CD, queues.used_C, neighbours)
        found.append(majority(queues.label_C[slot_Nk], similarity_Nk, ties))
    label_BV, similarity_BV = (
        torch.cat([each.unflatten(0, (num_asked, -1)) for each in of_queues]).T
        for of_queues in ([m.label_N for m in found], [m.similarity_N for m in found])
    )
    return majority(label_BV, similarity_BV, ties)


class SempplNet(nn.Module):
    """Trunk, projection head and prediction head."""

    def __init__(self, config: SempplConfig, channels: int):
        super().__init__()
        self.one_batch = isinstance(config.base, SimClr)
        self.trunk = config.encoder.build(channels)
        self.prediction = LockstepSequential()
        if isinstance(config.base, SimClr):
            self.projection = simclr_head(self.trunk.num_features, config.out_features, num_layers=2)
        else:
            widths = config.hidden_features, config.out_features
            self.projection = byol_head(self.trunk.num_features, *widths)
            self.prediction = byol_head(config.out_features, *widths)

    def forward(self, views: Sequence[Tensor]) -> list[Tensor]:
        """Images of each view -> [N, out_features] of each, in full precision. Views go through in lockstep, each with
        batch statistics of its own, as in BYOL's code and in the papers' listings, which pass them one by one; on
        SimCLR's base, as in its code, they are one batch."""
        if self.one_batch:
            rows = in_full(self.projection(self.trunk(torch.cat(list(views)))))
            return list(rows.chunk(len(views)))
        z = self.prediction.lockstep(self.projection.lockstep(self.trunk.lockstep(views)))
        return [in_full(each) for each in z]


class Semppl(Method[SempplConfig, SempplNet]):
    """Semantic positives from pseudo-labels, on one of three bases."""

    taps = ("backbone", "h", "z")

    def __init__(self, config: SempplConfig, facts: Facts, inputs: Mapping[str, Artefact]):
        if config.alpha and not facts.num_classes:
            raise ConfigError("no image carries a label, and without any there are no semantic positives: give a set "
                              "with labels, or set alpha=0")  # fmt: skip
        super().__init__(config, facts, inputs)
        every_label = facts.all_labelled and parse_subset(config.labels) == All()
        self.votes = bool(config.alpha) and config.pseudo_labels and not every_label
        self._seen: tuple[Tensor, Tensor, Tensor, Majority | None]  # of the last loss, for `metrics`

    def plan(self) -> Plan:
        c = self.config
        stream = Stream("images", "train", c.views, Shuffled(), c.batch_global)
        if c.alpha:
            stream = replace(stream, visible=parse_subset(c.labels), every_class=True)
        return Plan((stream,), epoch_of="images", seed=self.facts.seed)

    def nets(self) -> Nets[SempplNet]:
        c = self.config
        online = SempplNet(c, self.facts.channels)
        target = queues = None
        if not isinstance(c.base, SimClr):
            target = copy_of(online)
            target.prediction = LockstepSequential()
        if c.alpha:
            random_start = c.start == "random"
            queues = LabelledQueues(c.num_large, c.num_entries, c.out_features, self.facts.num_classes, random_start)
        return Nets(online, target=target, state=queues)

    def rates(self, step: int, horizon: Horizon) -> tuple[float, ...]:
        c = self.config
        rate = c.rate.scaled(c.batch_global, c.scaling).at(step, horizon)
        return rate, rate

    def loss(self, nets: Nets[SempplNet], batch: Batch) -> dict[str, Tensor]:
        """The ranks exchange target embeddings of all images, from which negatives and the queues' new entries are
        taken: L·D numbers an image, 8.4 MB a step for 4,096 images in half precision, and their labels."""
        c, part = self.config, batch.parts["images"]
        views = [x for view in c.views for x in part.x[view.name].chunk(view.copies)]
        with autocast(batch.step.device, c.precision):
            z = nets.online(views)
            large = z[: c.num_large]
            if nets.target is not None:
                with torch.no_grad():
                    large = nets.target(views[: c.num_large])
        # What half-precision networks put out travels as such, and loses nothing.
        dtype = None if c.precision == "fp32" else DTYPES[c.precision]
        (rows,) = gather_rows_together(torch.stack(large, dim=1).flatten(1), dtype=dtype)
        z_VBD = _unit(torch.stack(z))
        target_GLD = _unit(rows.unflatten(1, (c.num_large, -1)))
        row_B = rank() * len(part.ids) + torch.arange(len(part.ids), device=part.ids.device)

        negative_BN = None
        if isinstance(c.base, Relic):
            num_others = len(part.ids) * world_size() - 1
            shift_BN = 1 + distinct(random_bits(part.keys, tag("negatives"), c.base.num_negatives), num_others)
            negative_BN = (row_B[:, None] + shift_BN) % (num_others + 1)
        positives = None
        self._seen = z_VBD.detach(), target_GLD.detach(), row_B, None
        if c.alpha:
            assert isinstance(nets.state, LabelledQueues)
            positives = self._positives(nets.state, *self._seen[:3], part.labels, part.keys)
        return semppl_loss(
            z_VBD,
            target_GLD,
            row_B,
            negative_BN,
            positives,
            base=c.base,
            alpha=c.alpha,
            alpha_on_kl=c.alpha_on_kl,
            same_view_pairs=c.same_view_pairs,
            normaliser=c.normaliser,
        )

    def _positives(
        self, queues: LabelledQueues, z_VBD: Tensor, target_GLD: Tensor, row_B: Tensor, label_B: Tensor, keys_B: Tensor
    ) -> Positives:
        """Put labelled images into the queues, take the vote on the others, draw from their classes; in this order."""
        c = self.config
        slot_G = queues.put(target_GLD, gather_rows(label_B))
        if self.votes:
            voted = vote(z_VBD[: c.num_large], queues, neighbours=c.neighbours, voting=c.voting, ties=c.ties)
            self._seen = *self._seen[:3], voted
            label_B = torch.where(label_B >= 0, label_B, voted.label_N)
        bits_BM = random_bits(keys_B, tag("positives"), c.num_large * c.positives)
        slot_BM, found_B = queues.draw(label_B, bits_BM, None if c.own_entry else slot_G[row_B])
        slot_BLP = slot_BM.unflatten(1, (c.num_large, c.positives))
        queue_L1 = torch.arange(c.num_large, device=slot_BLP.device)[:, None]
        return Positives(queues.z_LCD[queue_L1, slot_BLP].to(z_VBD.dtype), found_B)

    def after_step(self, nets: Nets[SempplNet], step: int, horizon: Horizon) -> None:
        c, online, target = self.config, nets.online, nets.target
        if target is not None:
            decay = cosine_decay(step, horizon.total_steps, c.ema) if c.ema_ramp else c.ema
            follow(target.trunk, online.trunk, decay)
            follow(target.projection, online.projection, decay)

    def metrics(self, nets: Nets[SempplNet], batch: Batch, truth: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Signs of collapse; how full queues are; and where the truth is known, how right pseudo-labels are.

        agreement        mean cosine of large online views with their image's targets
        spread           1 - |mean target|^2: 0 where all images are one point
        queue_fill       share of the slots in use
        pseudo_label_accuracy         of this batch's images whose label is hidden
        pseudo_label_precision_TofV   the same among those whose label has T votes of V at least; 0 where there is none
        pseudo_label_recall_TofV      those of them that are right, as a share of all hidden
        """
        z_VBD, target_GLD, row_B, voted = self._seen
        num_large = self.config.num_large
        own_BLD = target_GLD[row_B]
        found = {
            "agreement": (z_VBD[:num_large].transpose(0, 1) @ own_BLD.transpose(1, 2)).mean(),
            "spread": 1 - target_GLD.mean(dim=(0, 1)).square().sum(),
        }
        if isinstance(nets.state, LabelledQueues):
            found["queue_fill"] = nets.state.used_C.double().mean()
        if voted is None:
            return found
        true_B = truth["images"]
        hidden_B = (batch.parts["images"].labels < 0) & (true_B >= 0)
        right_B = hidden_B & (voted.label_N == true_B)
        num_votes = num_large**2 if self.config.voting else 1
        least_votes = sorted({-(-num_votes * quarter // 4) for quarter in (1, 2, 3, 4)})
        sure_BT = voted.votes_N[:, None] >= torch.tensor(least_votes, device=true_B.device)
        counts = torch.stack([(sure_BT & of_B[:, None]).sum(dim=0) for of_B in (right_B, hidden_B)]).double()
        totals = torch.stack([right_B.sum(), hidden_B.sum()]).double()
        right, hidden = mean_over_ranks(totals).unbind()
        right_T, hidden_T = mean_over_ranks(counts).unbind()
        if not hidden:  # equal on all ranks
            return found
        found["pseudo_label_accuracy"] = right / hidden
        for least, sure_right, sure in zip(least_votes, right_T, hidden_T, strict=True):
            found[f"pseudo_label_precision_{least}of{num_votes}"] = sure_right / sure.clamp_min(1e-9)
            found[f"pseudo_label_recall_{least}of{num_votes}"] = sure_right / hidden
        return found

    def embed(self, nets: Nets[SempplNet], x: Tensor, tap: str) -> Tensor:
        net = nets.online
        layers = (net.trunk, net.projection, net.prediction)
        return through(layers[: 1 + self.taps.index(tap)], x, self.config.precision)


def _unit(x: Tensor) -> Tensor:
    """Rows of length 1; shorter ones than 1e-6 are divided by that, as in the released code."""
    return F.normalize(x, dim=-1, eps=1e-6)
