"""S4L: a classifier of few labelled images that also learns, from all images, what self-supervision asks of it.

Paper      Zhai, Oliver, Kolesnikov and Beyer, ICCV 2019, arXiv 1905.03670
Code       google-research/s4l at 8f1cf05 (TensorFlow 1, TPUs), which reproduces the published numbers; where paper and
           code differ, this follows the code and says so, but for its bugs
Command    fastssl train s4l.rotation --data PATH --gpus 8
Published  ResNet-50 v2, 10 % of the labels, top-5: supervised 80.4 %, pseudo-labels 82.4 %, VAT 82.8 %, VAT + entropy
           minimisation 83.4 %, S4L-Rotation 83.8 %, S4L-Exemplar 83.7 %; MOAM, four times as wide: 88.8 %, all of its
           three steps 91.2 % (top-1 73.2 %)
Hours      unpublished; 100,000 steps on 32 TPU cores

Every step has as many labelled images as it has of all images, the labelled ones among them, in one joint forward pass;
epochs are counted in labelled images. The terms beside the class's cross-entropy, each with a weight:

rotation   by how many quarter turns an image is turned; all four turns of every image are shown
exemplar   an image's eight distorted copies stay nearer each other than to other images: batch-hard triplets
vat        predictions stay as they are under the perturbation that would change them most; such a step is eager, as
           torch compiles neither forward-mode derivatives nor, for either product, the switch to full float32
entropy    predictions are sure of themselves

Batch norm and triplets know the images of one TPU core alone, `core_images` labelled ones and as many of all; ranks
must share the cores evenly. With `core_images=none` they know the whole batch, which is another loss for exemplar.

Label lists are the release's, with 128 and 13 images a class, `s4l-10` and `s4l-1`: not SimCLR's, which `--labels
simclr-10` takes. Images with a label keep it where the paper's text gives every image a pseudo-label, as the release.

Resizing is Pillow's bilinear filter, which widens when it shrinks an image, for the release's legacy bilinear in
training and its area filter in evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from fastssl import dist
from fastssl.errors import ConfigError
from fastssl.losses.adversarial import (
    curvature_product,
    difference_product,
    divergence,
    entropy,
    full_float32,
    unit,
    unit_unless_small,
)
from fastssl.losses.keyed_draws import normals
from fastssl.losses.triplet import exemplar_loss
from fastssl.methods.base import Artefact, Config, Epochs, Facts, Horizon, Method, Nets, Span, autocast, in_full
from fastssl.methods.pseudo_labels import PseudoLabels, pseudo_labels
from fastssl.methods.virtual_cores import cores_of_this_rank, refuse_without_groups
from fastssl.nn.ema import copy_of, follow
from fastssl.nn.encoders.encoder import Encoder
from fastssl.nn.encoders.resnet import S4lResNet
from fastssl.nn.initialisers import glorot_uniform, initialise
from fastssl.nn.norm.group_batch_norm import GroupBatchNorm
from fastssl.nn.norm.running_stats import frozen_running_stats, set_batch_norm_mode
from fastssl.nn.trunks.resnet_v2 import S4L_NORM
from fastssl.nn.trunks.stem import Norm
from fastssl.optim.optimiser import Optimiser
from fastssl.optim.rates import Rate, WarmupStairs
from fastssl.optim.sgd import Sgd
from loaders.batch import Batch, Part
from loaders.plan.draws import tag
from loaders.plan.ops import Flip
from loaders.plan.plan import Plan
from loaders.plan.views import SIGNED, Centre, DistortedBox, Sequential, Shuffled, Stream, View, parse_subset

TURNS = (0, 1, 2, 3)  # quarter turns, counter-clockwise as numpy.rot90's
RELEASE_XI = 1e-6  # the release's step, by which the lengths of its gradients count: semi_supervised/vat_utils.py
_NOISE = tag("vat")

CROP = View("crop", 224, DistortedBox((0.05, 1.0), (0.75, 1.33)), (Flip(),), SIGNED)
EVAL = View("eval", 224, Centre(resize=256), pixels=SIGNED)


# ----------------------------------------------------------------------------------------------------------- losses


def rotation_loss(logits_NT: Tensor, num_turns: int = 4) -> Tensor:
    """Mean cross-entropy of telling an image's turns apart: row n of N, turn-major, shows turn n // (N / num_turns)."""
    turn_N = torch.arange(num_turns, device=logits_NT.device).repeat_interleave(len(logits_NT) // num_turns)
    return F.cross_entropy(logits_NT, turn_N)


# ---------------------------------------------------------------------------------------------------- configuration


@dataclass(frozen=True)
class Rotation:
    """Telling quarter turns apart: the mean of the losses of labelled and of all images, times `weight`."""

    weight: float = 1.0


@dataclass(frozen=True)
class Exemplar:
    """Telling images apart by copies of them: the mean of the losses of labelled and of all images, times `weight`."""

    weight: float = 1.0
    features: int = 1000
    compat_identities: bool = False  # the release's: see `fastssl.losses.triplet.exemplar_identities`


@dataclass(frozen=True)
class Vat:
    """Virtual adversarial training: KL(p(x + r) || p(x)), r of length `epsilon`, gradient through the former alone.

    product     "exact": derivatives; "differences": the release's quotient of step `xi` (there 1e-6, which float32 does
                not resolve), of which a step of 1e-3 to 1e-2 is nearly the same
    divergence  "release": as above; "paper": KL(p(x) || p(x + r)), as section 3.2 prints it
    normaliser  "unit": r has its length; "compat": the release's, which leaves gradients below 1e-6 small, so that r is
                shorter than it says (the metric `perturbation` tells): those of the mean over a core's rows, 16 in the
                release, at its step of 1e-6 whatever `xi` is. Without virtual cores all rows of the batch count
    """

    weight: float = 0.5
    epsilon: float = 40.0
    product: Literal["exact", "differences"] = "exact"
    xi: float = 1e-3
    normaliser: Literal["unit", "compat"] = "unit"
    divergence: Literal["release", "paper"] = "release"

    def between(self, adversarial_NK: Tensor, clean_NK: Tensor) -> Tensor:
        """Of perturbed and clean logits, [N]; the latter without gradient."""
        pair = adversarial_NK, clean_NK.detach()
        return divergence(*(pair if self.divergence == "release" else reversed(pair)))


@dataclass(frozen=True)
class S4lConfig(Config):
    """Settings of the joint training; the defaults are the release's supervised baseline for 10 % of ImageNet's labels.
    An epoch is a pass over the labelled images, or where it learns pseudo-labels over all."""

    encoder: Encoder = S4lResNet(50)
    view: View = CROP
    batch_global: int = 256  # labelled images, and as many of all
    core_images: int | None = None  # a virtual core's labelled images; None: one core, as large as the batch
    # Of the class's cross-entropy; at 0, without VAT and entropy, nothing labelled is shown: self-supervision alone.
    class_weight: float = 1.0
    class_on: Literal["turns", "upright"] = "turns"  # whether turned copies are classified, too (section 4.4)
    self_supervised_on: Literal["all", "unlabelled"] = "all"  # whose turns and copies are told apart (section 4.4)
    trained: Literal["all", "classifier"] = "all"  # the latter on a trunk that stays as it is: a linear evaluation
    rotation: Rotation | None = None
    exemplar: Exemplar | None = None
    vat: Vat | None = None
    entropy_weight: float = 0.0
    smoothed: Literal["all", "unlabelled"] = "all"  # whose predictions VAT and entropy are about
    pseudo_labels: bool = False  # learn those of the input "labels", made for every image, in place of the data's
    optimizer: Optimiser = Sgd(weight_decay=1e-3)
    # The release's rates fall one step later: TensorFlow's `piecewise_constant` keeps its bounds.
    rate: Rate = WarmupStairs(0.1, (Epochs(140), Epochs(160), Epochs(180)), warmup=Epochs(5))
    half_life: Span | None = None  # of a weight in the average that is evaluated; None: no average

    def __post_init__(self) -> None:
        super().__post_init__()
        core = self.batch_global if self.core_images is None else self.core_images
        if self.batch_global % core:
            raise ConfigError(f"batch_global {self.batch_global} does not divide into virtual cores of {core} images")
        if self.exemplar is not None and (core < 2 or self.view.copies < 2):
            raise ConfigError(
                f"exemplar tells images apart by their copies: it needs two images or more in a core, not {core}, and "
                f"two copies or more of each (view.copies), not {self.view.copies}"
            )

    @property
    def sees_labelled(self) -> bool:
        """Whether any term is about classes."""
        return self.class_weight > 0 or self.vat is not None or self.entropy_weight > 0

    @property
    def turned_view(self) -> View:
        """What is shown of every image."""
        return self.view if self.rotation is None else replace(self.view, turns=TURNS)

    @property
    def sees_unlabelled(self) -> bool:
        """Whether any term is about unlabelled images."""
        terms = (self.rotation, self.exemplar, self.vat)
        return any(term is not None for term in terms) or self.entropy_weight > 0

    def build(self, facts: Facts, inputs: Mapping[str, Artefact]) -> S4l:
        return S4l(self, facts, inputs)


@dataclass(frozen=True)
class LabelConfig(S4lConfig):
    """Settings of the stage in between, which labels every image by the networks of the stage before: `label_view`'s
    copies and turns of an image vote by their mean logits. Images whose largest probability is below
    `least_confidence` get no label; the paper tried .5 (section 4.2)."""

    label_view: View = EVAL
    least_confidence: float = 0.0

    def build(self, facts: Facts, inputs: Mapping[str, Artefact]) -> Labeller:
        return Labeller(self, facts, inputs)


# --------------------------------------------------------------------------------------------------------- networks


class S4lNet(nn.Module):
    """Trunk, classifier `fc` and, for the terms that need them, the heads `turn` and `embedding`; all linear."""

    def __init__(self, config: S4lConfig, facts: Facts):
        super().__init__()
        self.vat, self.num_cores = config.vat, cores_of_this_rank(config.batch_global, config.core_images)
        norm: Norm = S4L_NORM  # in whatever encoder
        if self.num_cores is not None:
            norm = partial(GroupBatchNorm, num_groups=self.num_cores, **S4L_NORM.keywords)
        self.trunk = config.encoder.build(facts.channels, norm)
        if self.num_cores is not None and config.exemplar is None:
            refuse_without_groups(self.trunk, config.encoder.name, config.core_images)
        heads = []
        if config.sees_labelled:
            self.fc = nn.Linear(self.trunk.num_features, facts.num_classes)
            heads.append(self.fc)
        if config.rotation is not None:
            self.turn = nn.Linear(self.trunk.num_features, len(TURNS))
            heads.append(self.turn)
        if config.exemplar is not None:
            self.embedding = nn.Linear(self.trunk.num_features, config.exemplar.features)
            heads.append(self.embedding)
        for head in heads:
            initialise(head, glorot_uniform)

    def forward(self, x: Tensor, num_images: int, noise: Tensor | None = None) -> dict[str, Tensor]:
        """This rank's images of all streams, each stream's rows view-major: [views * num_images, C, H, W] -> by name

        logits        [N, num_classes] of all rows,
        turn          [N, 4], and
        embedding     [N, D], where there are such heads
        adversarial   where `noise` is given, as large as the last rows of x: the logits of these when perturbed, by
                      batch statistics that do not count in the running ones
        perturbation  [rows of noise], the perturbations' lengths
        """
        features = self.features(x, num_images)
        names = {"fc": "logits", "turn": "turn", "embedding": "embedding"}
        found = {names[name]: head(features) for name, head in self.named_children() if name in names}
        if noise is not None:
            clean = x[-len(noise) :]
            with frozen_running_stats(self):
                r = self._perturbation(clean, noise, num_images)
                found["adversarial"] = self.fc(self.features(clean + r, num_images))
            found["perturbation"] = torch.linalg.vector_norm(r.flatten(1), dim=1)
        return found

    def features(self, x: Tensor, num_images: int) -> Tensor:
        """[views * num_images, C, H, W], of whatever streams, -> [views * num_images, D]."""
        if self.num_cores is None or self.num_cores == 1:
            rows: Tensor = self.trunk(x)
            return rows
        # What a core holds must stand together: its images of the first view, of the second, ...
        views = [view.chunk(self.num_cores) for view in x.split(num_images)]
        rows = self.trunk(torch.cat([share for core in zip(*views, strict=True) for share in core]))
        features: Tensor = rows.unflatten(0, (self.num_cores, len(views), -1)).transpose(0, 1).flatten(0, 2)
        return features

    def _perturbation(self, x: Tensor, noise: Tensor, num_images: int) -> Tensor:
        """The adversarial perturbation of each row, without gradient, in full precision."""
        vat = self.vat
        assert vat is not None

        def classify(x: Tensor) -> Tensor:
            logits: Tensor = self.fc(self.features(x, num_images))
            return logits

        with full_float32(x.device):
            d = unit(noise)
            if vat.product == "exact":
                product = curvature_product(classify, x, d)
            else:
                product = difference_product(classify, x, d, vat.xi)
            if vat.normaliser == "unit":
                return vat.epsilon * unit(product)
            rows = len(x) // self.num_cores if self.num_cores is not None else len(x) * dist.world_size()
            return vat.epsilon * unit_unless_small(product * (RELEASE_XI / rows))  # the gradient of the core's mean


# ----------------------------------------------------------------------------------------------------------- method


class S4l(Method[S4lConfig, S4lNet]):
    """The class's cross-entropy on labelled images, and terms that need no labels on all."""

    taps: tuple[str, ...] = ("backbone", "turned-logits", "logits")
    needs_classes = True

    def __init__(self, config: S4lConfig, facts: Facts, inputs: Mapping[str, Artefact]):
        if not config.sees_labelled:
            self.needs_classes, self.taps = False, ("backbone",)
        super().__init__(config, facts, inputs)

    def plan(self) -> Plan:
        c = self.config
        if c.pseudo_labels:
            labelled = Stream("labelled", "train", (c.turned_view,), Shuffled(), c.batch_global)
        else:
            labelled = Stream(
                "labelled",
                "labelled",
                (c.turned_view,),
                Shuffled(),
                c.batch_global,
                ids=parse_subset(c.labels),
                every_image=True,
                every_class=True,
            )
        unlabelled = Stream("unlabelled", "unlabelled", (c.turned_view,), Shuffled(), c.batch_global)
        if not c.sees_labelled:
            return Plan((unlabelled,), "unlabelled", self.facts.seed)
        return Plan((labelled, unlabelled) if c.sees_unlabelled else (labelled,), "labelled", self.facts.seed)

    def nets(self) -> Nets[S4lNet]:
        c, online = self.config, S4lNet(self.config, self.facts)
        if c.trained == "classifier":
            set_batch_norm_mode(online.trunk.requires_grad_(False), "frozen")
        return Nets(
            online,
            target=None if c.half_life is None else copy_of(online),
            frozen=PseudoLabels() if c.pseudo_labels else None,
        )

    def load_inputs(self, nets: Nets[S4lNet]) -> None:
        super().load_inputs(nets)
        if self.config.pseudo_labels:
            assert isinstance(nets.frozen, PseudoLabels)
            nets.frozen.load(pseudo_labels(self.facts, self.inputs))

    def optimizer(self, nets: Nets[S4lNet]) -> Optimizer:
        """Over what is trained."""
        return self.config.optimizer.build([[nets.online.fc if self.config.trained == "classifier" else nets.online]])

    def loss(self, nets: Nets[S4lNet], batch: Batch) -> dict[str, Tensor]:
        c = self.config
        parts = [batch.parts[name] for name in ("labelled", "unlabelled") if name in batch.parts]
        num_images = len(parts[0].ids)
        x = torch.cat([part.x[c.view.name] for part in parts]) if len(parts) > 1 else parts[0].x[c.view.name]
        smoothed = parts if c.smoothed == "all" else parts[1:]
        noise = None if c.vat is None else torch.cat([_noise(part, x) for part in smoothed])
        with autocast(batch.step.device, c.precision):
            found = nets.online(x, num_images, noise)
        found = {name: in_full(rows) for name, rows in found.items()}

        num_rows, values = len(x) // len(parts), {}
        total = x.new_zeros(())
        of_images = parts[-1:] if c.self_supervised_on == "unlabelled" else parts  # whose turns and copies count
        if c.sees_labelled:
            logits = found["logits"]
            values["class"] = self._class_loss(nets, logits[:num_rows], parts[0])
            total = c.class_weight * values["class"]
        if c.rotation is not None:
            turns = found["turn"].split(num_rows)[-len(of_images) :]
            values["rotation"] = torch.stack([rotation_loss(rows) for rows in turns]).mean()
            total = total + c.rotation.weight * values["rotation"]
        if c.exemplar is not None:
            num_cores, compat = cores_of_this_rank(c.batch_global, c.core_images), c.exemplar.compat_identities
            copies = found["embedding"].split(num_rows)[-len(of_images) :]
            of_streams = [exemplar_loss(rows, num_images, num_cores, compat=compat) for rows in copies]
            values["exemplar"] = torch.stack(of_streams).mean()
            total = total + c.exemplar.weight * values["exemplar"]
        if c.vat is not None or c.entropy_weight > 0:
            clean = logits if c.smoothed == "all" else logits[num_rows:]
        if c.vat is not None:
            values["vat"] = c.vat.between(found["adversarial"], clean).mean()
            values["perturbation"] = found["perturbation"].mean()
            total = total + c.vat.weight * values["vat"]
        if c.entropy_weight > 0:
            values["entropy"] = entropy(clean).mean()
            total = total + c.entropy_weight * values["entropy"]
        return {"total": total, **values}

    def _class_loss(self, nets: Nets[S4lNet], logits_NK: Tensor, labelled: Part) -> Tensor:
        """Mean cross-entropy of the rows that count: of the upright ones where the settings say so, and of images whose
        pseudo-label is believed."""
        label_B = labelled.labels if nets.frozen is None else nets.frozen(labelled.ids)
        if self.config.class_on == "upright":
            logits_NK = logits_NK[: len(logits_NK) // len(self.config.turned_view.turns)]
        label_N = label_B.repeat(len(logits_NK) // len(label_B))
        if not isinstance(nets.frozen, PseudoLabels) or not nets.frozen.partial:
            return F.cross_entropy(logits_NK, label_N)
        count = dist.mean_over_ranks((label_N >= 0).to(logits_NK.dtype).sum()).clamp_min(1.0)
        return F.cross_entropy(logits_NK, label_N, ignore_index=-1, reduction="sum") / count

    def after_step(self, nets: Nets[S4lNet], step: int, horizon: Horizon) -> None:
        """The average of the weights since the start, of which half is from the last `half_life`: begun at zero and
        divided by what it has seen, as TensorFlow's `zero_debias`. Running statistics are those of the moment."""
        if self.config.half_life is not None:
            assert nets.target is not None
            decay = 0.5 ** (1.0 / horizon.steps(self.config.half_life))
            follow(nets.target, nets.online, 1.0 - (1.0 - decay) / (1.0 - decay ** (step + 1)))
            if statistics := list(nets.target.buffers()):  # a trunk without batch norms has none
                torch._foreach_copy_(statistics, list(nets.online.buffers()))

    def embed(self, nets: Nets[S4lNet], x: Tensor, tap: str) -> Tensor:
        """ "turned-logits" are the mean of the logits of an image's four turns."""
        net = nets.online if nets.target is None else nets.target
        turns = TURNS if tap == "turned-logits" else (0,)
        found = []
        with autocast(x.device, self.config.precision):
            for turn in turns:
                features = net.trunk(x.rot90(turn, (2, 3)) if turn else x)
                found.append(in_full(features if tap == "backbone" else net.fc(features)))
        return torch.stack(found).mean(dim=0)


class Labeller(S4l):
    """Labels every image of the training set by the networks it starts from; images whose label shows keep it."""

    config: LabelConfig

    def plan(self) -> Plan:
        c = self.config
        stream = Stream(
            "images", "train", (c.label_view,), Sequential(), c.batch_global, visible=parse_subset(c.labels)
        )
        return Plan((stream,), "images", self.facts.seed)

    def produce(self, nets: Nets[S4lNet], batch: Batch) -> dict[str, Tensor]:
        part, view = batch.parts["images"], self.config.label_view
        logits = self.embed(nets, part.x[view.name], "logits")
        votes = logits.unflatten(0, (view.copies * len(view.turns), len(part.ids))).mean(dim=0)
        confidence_B, voted_B = votes.softmax(dim=1).max(dim=1)
        believed_B = torch.where(confidence_B >= self.config.least_confidence, voted_B, -1)
        return {"pseudo_label": torch.where(part.labels >= 0, part.labels, believed_B)}


def _noise(part: Part, like: Tensor) -> Tensor:
    """Normal noise for every row of `part`'s views, each image's own; a function of its key."""
    shape, num_images = like.shape[1:], len(part.ids)
    num_views = sum(len(x) for x in part.x.values()) // num_images
    draws = normals(part.keys, _NOISE, num_views * shape.numel())
    return draws.view(num_images, num_views, *shape).transpose(0, 1).flatten(0, 1).to(like.dtype)
