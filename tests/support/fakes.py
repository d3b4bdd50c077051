"""Four tiny methods, one per family, that the contract must carry: what each asks of it is what the real ones will.

PAWS     an unlabelled stream beside a class-balanced one
SemPPL   one stream with hidden labels, six views, an EMA target and a queue
SimCLRv2 three chained stages, a frozen teacher, two learning rates
S4L      two streams, quarter turns and exemplar copies, a gradient with respect to the input, pseudo-labels
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl import dist
from fastssl.engine.job import Job
from fastssl.methods.base import Artefact, Config, Epochs, Facts, Horizon, Method, Nets, Ref, Stage, Stages, Steps
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from loaders.batch import Batch
from loaders.plan.ops import Noise
from loaders.plan.plan import Plan
from loaders.plan.views import UNIT, Balanced, PerClass, Rrc, Sequential, Shuffled, Stream, View, Whole

VIEW = View("global", 8, Rrc((0.5, 1.0)), (Noise(),), UNIT, copies=2)
EVAL = View("eval", 8, Whole(), pixels=UNIT)


def job(stages: Stages, out: Path, **changes) -> Job:
    """A CPU job on the embedded digits."""
    settings = {"recipe": "fake", "changes": (), "data": ("digits",), "seed": 0, "device": "cpu", "world": 1}
    return Job(stages=stages, out=out, **(settings | changes))


class TinyNet(nn.Module):
    def __init__(self, num_outputs: int, size: int = 8):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(size * size, 16), GlobalBatchNorm(16), nn.ReLU())
        self.head = nn.Linear(16, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@dataclass(frozen=True)
class TinyConfig(Config):
    family: str = "paws"
    lr: float = 0.05
    batch_global: int = 48

    def build(self, facts: Facts, inputs: Mapping[str, Artefact]) -> Method:
        return FAMILIES[self.family](self, facts, inputs)


def config(family: str, **changes) -> TinyConfig:
    return TinyConfig("digits", EVAL, labels="per-class=10", precision="fp32", family=family, **changes)


class Tiny(Method):
    """What the fakes share."""

    config: TinyConfig
    taps = ("backbone", "z")
    num_outputs = 10

    def nets(self) -> Nets:
        return Nets(TinyNet(self.num_outputs))

    def optimizer(self, nets: Nets) -> torch.optim.Optimizer:
        return torch.optim.SGD(nets.online.parameters(), lr=self.config.lr, momentum=0.9)

    def rates(self, step: int, horizon: Horizon) -> tuple[float, ...]:
        return (self.config.lr * (1 - step / horizon.total_steps),)

    def embed(self, nets: Nets, x: Tensor, tap: str) -> Tensor:
        return nets.online.body(x) if tap == "backbone" else nets.online(x)


class TinyPaws(Tiny):
    def plan(self) -> Plan:
        streams = (
            Stream("unlabelled", "unlabelled", (VIEW,), Shuffled(), self.config.batch_global),
            Stream("support", "labelled", (VIEW,), Balanced(10, 4), 40, ids=PerClass(10)),
        )
        return Plan(streams, "unlabelled", self.facts.seed)

    def loss(self, nets: Nets, batch: Batch) -> dict[str, Tensor]:
        unlabelled, support = batch.parts["unlabelled"], batch.parts["support"]
        z = F.normalize(nets.online(torch.cat([unlabelled.x["global"], support.x["global"]])), dim=1)
        anchors, supports = z.split([len(unlabelled.x["global"]), len(support.x["global"])])
        columns = F.one_hot(dist.gather_rows(support.columns.repeat(2)), 10).to(anchors)
        p = torch.softmax(anchors @ dist.gather_rows(supports).T / 0.1, dim=1) @ columns
        first, second = p.chunk(2)
        loss = -(second.detach() * first.clamp_min(1e-6).log()).sum(dim=1).mean()
        return {"total": loss, "cross_entropy": loss}


class Queue(nn.Module):
    """Embeddings of labelled images: a ring buffer with its pointer, equal on all ranks."""

    def __init__(self, capacity: int, width: int):
        super().__init__()
        self.register_buffer("z", torch.zeros(capacity, width))
        self.register_buffer("label", torch.full((capacity,), -1))
        self.register_buffer("next", torch.zeros((), dtype=torch.int64))

    def put(self, z: Tensor, label: Tensor) -> None:
        at = (self.next + torch.arange(len(z))) % len(self.z)
        self.z[at], self.label[at] = z, label
        self.next += len(z)


class TinySemppl(Tiny):
    def plan(self) -> Plan:
        views = (
            View("odd", 8, Rrc((0.14, 1)), pixels=UNIT, copies=2),
            View("even", 8, Rrc((0.08, 1)), pixels=UNIT, copies=2),
            View("small_odd", 8, Rrc((0.05, 0.14)), pixels=UNIT),
            View("small_even", 8, Rrc((0.05, 0.14)), pixels=UNIT),
        )
        stream = Stream("images", "train", views, Shuffled(), self.config.batch_global, visible=PerClass(10))
        return Plan((stream,), "images", self.facts.seed)

    def nets(self) -> Nets:
        online = TinyNet(10)
        target = TinyNet(10).requires_grad_(False)
        target.load_state_dict(online.state_dict())
        return Nets(online, target=target, state=Queue(64, 10))

    def loss(self, nets: Nets, batch: Batch) -> dict[str, Tensor]:
        part = batch.parts["images"]
        x = torch.cat(list(part.x.values()))
        online = F.normalize(nets.online(x), dim=1)
        with torch.no_grad():
            target = F.normalize(nets.target(x), dim=1)
        first, labels = dist.gather_rows(target[: len(part.labels)]), dist.gather_rows(part.labels)
        nets.state.put(first[labels >= 0], labels[labels >= 0])
        attract = (2 - 2 * (online * target.roll(len(part.labels), 0)).sum(dim=1)).mean()
        semantic = (2 - 2 * (online @ nets.state.z.T).amax(dim=1)).mean()
        return {"total": attract + semantic, "attract": attract, "semantic": semantic}

    def after_step(self, nets: Nets, step: int, horizon: Horizon) -> None:
        with torch.no_grad():
            for average, new in zip(nets.target.parameters(), nets.online.parameters(), strict=True):
                average.lerp_(new, 0.01)

    def metrics(self, nets: Nets, batch: Batch, truth: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"hidden": (batch.parts["images"].labels < truth["images"]).float().mean()}


class TinyContrast(Tiny):
    """SimCLRv2's first stage."""

    def plan(self) -> Plan:
        stream = Stream("images", "train", (VIEW,), Shuffled(), self.config.batch_global)
        return Plan((stream,), "images", self.facts.seed)

    def loss(self, nets: Nets, batch: Batch) -> dict[str, Tensor]:
        first, second = F.normalize(nets.online(batch.parts["images"].x["global"]), dim=1).chunk(2)
        logits = first @ dist.gather_rows(second).T / 0.5
        own = torch.arange(len(first)) + dist.rank() * len(first)
        return {"total": F.cross_entropy(logits, own)}


class TinyFineTune(Tiny):
    """SimCLRv2's second stage: body and head at their own rates, from the first stage's weights."""

    def plan(self) -> Plan:
        stream = Stream("labelled", "labelled", (VIEW,), Shuffled(), self.config.batch_global, ids=PerClass(10))
        return Plan((stream,), "labelled", self.facts.seed)

    def load_inputs(self, nets: Nets) -> None:
        nets.online.load_state_dict(self.inputs["init"].load()["nets"]["online"])
        nn.init.zeros_(nets.online.head.weight)

    def optimizer(self, nets: Nets) -> torch.optim.Optimizer:
        groups = [{"params": nets.online.body.parameters()}, {"params": nets.online.head.parameters()}]
        return torch.optim.SGD(groups, lr=self.config.lr)

    def rates(self, step: int, horizon: Horizon) -> tuple[float, ...]:
        return self.config.lr / 10, self.config.lr

    def loss(self, nets: Nets, batch: Batch) -> dict[str, Tensor]:
        part = batch.parts["labelled"]
        return {"total": F.cross_entropy(nets.online(part.x["global"]), part.labels.repeat(2))}


class TinyDistil(TinyContrast):
    """SimCLRv2's third stage: a student learns from a frozen teacher."""

    def nets(self) -> Nets:
        return Nets(TinyNet(10), frozen=TinyNet(10).requires_grad_(False))

    def load_inputs(self, nets: Nets) -> None:
        nets.frozen.load_state_dict(self.inputs["teacher"].load()["nets"]["online"])

    def loss(self, nets: Nets, batch: Batch) -> dict[str, Tensor]:
        x = batch.parts["images"].x["global"]
        assert not nets.frozen.training
        with torch.no_grad():
            taught = nets.frozen(x).softmax(dim=1)
        return {"total": F.cross_entropy(nets.online(x), taught)}


class TinyS4l(Tiny):
    """Rotation, exemplar and VAT terms; labels everything when asked to produce."""

    num_outputs = 14  # ten classes, four rotations

    def plan(self) -> Plan:
        turned = View("turned", 8, Rrc((0.5, 1.0)), pixels=UNIT, turns=(0, 1, 2, 3))
        copies = View("copies", 8, Rrc((0.5, 1.0)), (Noise(),), UNIT, copies=8)
        streams = (
            Stream("labelled", "labelled", (turned,), Shuffled(), 48, ids=PerClass(10)),
            Stream("unlabelled", "unlabelled", (turned, copies), Shuffled(), self.config.batch_global),
        )
        return Plan(streams, "labelled", self.facts.seed)

    def loss(self, nets: Nets, batch: Batch) -> dict[str, Tensor]:
        labelled, unlabelled = batch.parts["labelled"], batch.parts["unlabelled"]
        clean = unlabelled.x["turned"].requires_grad_()
        logits = nets.online(torch.cat([labelled.x["turned"], clean]))
        num_labelled = len(labelled.x["turned"])
        supervised = F.cross_entropy(logits[:num_labelled, :10], labelled.labels.repeat(4))
        turn = torch.arange(4).repeat_interleave(len(unlabelled.ids))
        rotation = F.cross_entropy(logits[num_labelled:, 10:], turn)
        (towards,) = torch.autograd.grad(rotation, clean, retain_graph=True)
        step = F.normalize(towards.flatten(1), dim=1).view_as(clean)
        smoothness = (step * clean.detach()).square().mean()  # stands for VAT's use of an input gradient
        return {"total": supervised + rotation + smoothness, "supervised": supervised, "rotation": rotation}


class TinyLabeller(Tiny):
    """S4L's middle stage: labels every training image."""

    def plan(self) -> Plan:
        return Plan((Stream("images", "train", (EVAL,), Sequential(), 256),), "images", 0)

    num_outputs = 14

    def load_inputs(self, nets: Nets) -> None:
        nets.online.load_state_dict(self.inputs["init"].load()["nets"]["online"])

    def loss(self, nets: Nets, batch: Batch) -> dict[str, Tensor]:
        raise AssertionError("this stage does not train")

    def produce(self, nets: Nets, batch: Batch) -> dict[str, Tensor]:
        return {"pseudo_label": nets.online(batch.parts["images"].x["eval"])[:, :10].argmax(dim=1)}


class TinyRelearn(TinyContrast):
    """S4L's last stage: learns the pseudo-labels of the stage before."""

    def loss(self, nets: Nets, batch: Batch) -> dict[str, Tensor]:
        part, made = batch.parts["images"], self.inputs["labels"].load()
        return {"total": F.cross_entropy(nets.online(part.x["global"]), made["pseudo_label"][part.ids].repeat(2))}


FAMILIES: dict[str, type[Tiny]] = {
    "paws": TinyPaws,
    "semppl": TinySemppl,
    "contrast": TinyContrast,
    "finetune": TinyFineTune,
    "distil": TinyDistil,
    "s4l": TinyS4l,
    "labeller": TinyLabeller,
    "relearn": TinyRelearn,
}

_SHORT = {"log_every": Steps(1), "evaluate_every": Epochs(1), "checkpoint_every": Steps(3)}


def stages(family: str, steps: int = 6) -> Stages:
    """A short run of one family."""
    length = Steps(steps)
    if family == "simclrv2":
        return (
            Stage("pretrain", config("contrast"), length, **_SHORT),
            Stage("finetune", config("finetune"), length, needs={"init": Ref(stage="pretrain")}, **_SHORT),
            Stage("distil", config("distil"), length, needs={"teacher": Ref(stage="finetune")}, **_SHORT),
        )
    if family == "s4l":
        return (
            Stage("joint", config("s4l"), length, **_SHORT),
            Stage("label", config("labeller"), length, do="produce", needs={"init": Ref(stage="joint")}),
            Stage("relearn", config("relearn"), length, needs={"labels": Ref(stage="label")}, **_SHORT),
        )
    return (Stage("pretrain", config(family), length, **_SHORT),)
