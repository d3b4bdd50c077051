"""Training a classifier on labelled images alone: the plain baseline, and the fine-tuning of what others pre-trained.

Commands   fastssl train supervised.rn50_100pct --data PATH --gpus 8
           fastssl train supervised.paws_rn50_finetune_10pct --init-from RUN --data PATH --gpus 8
Published  ResNet-50: 76.6 % from scratch (SimCLRv2, arXiv 2006.10029); fine-tuned with 1 / 10 % of the labels, PAWS
           66.5 / 75.5 % (2104.13963), SimCLRv2 57.9 / 68.4 %, SemPPL 68.5 / 76.0 % (2301.05158)
Hours      of one V100, by a step's arithmetic at the pace of PAWS's 8.5 hours on 64: ResNet-50 from scratch 100,
           fine-tuned for 50 epochs with 10 % of the labels 6, with 1 % 0.6 (modelled)

Cross-entropy; SGD with Nesterov momentum, or LARS. Fine-tuning keeps the pre-trained trunk and, where `head` says so,
the first layers of its projection head; the classifier above starts at zero. The whole network is trained. An epoch is
whole batches: with 1 % of ImageNet's labels 12 of 1,024 images, where 12.5 would be a pass.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from fastssl import dist
from fastssl.errors import ConfigError
from fastssl.methods import paws
from fastssl.methods.base import (
    Artefact,
    Config,
    Epochs,
    Facts,
    Horizon,
    Method,
    Nets,
    autocast,
    in_full,
    setting_of,
    with_classes,
)
from fastssl.nn.encoders.encoder import Encoder
from fastssl.nn.encoders.resnet import ResNet, SimclrResNet
from fastssl.nn.norm.global_batch_norm import BatchNormMode, GlobalBatchNorm
from fastssl.nn.norm.lockstep import LockstepSequential
from fastssl.nn.norm.running_stats import average_running_stats, set_batch_norm_mode
from fastssl.optim.lars import Lars
from fastssl.optim.optimiser import Optimiser
from fastssl.optim.rates import Rate, Scaling, WarmupCosine
from fastssl.optim.sgd import Sgd
from fastssl.weights.read import Weights, load_whole
from fastssl.weights.tensor_files import WeightsError
from loaders.batch import Batch
from loaders.plan.plan import Plan
from loaders.plan.views import (
    Pixels,
    Shuffled,
    Stream,
    View,
    parse_subset,
)


@dataclass(frozen=True)
class FirstLayer:
    """The first of a projection head's `layers`, kept below the classifier: linear, batch norm, ReLU. As wide as the
    pre-training method made them."""

    features: int
    bias: bool
    layers: int = 1

    def __post_init__(self) -> None:
        if self.layers < 1:
            raise ConfigError("head.layers 0: --set head=none starts from the trunk")

    @classmethod
    def found_in(cls, first: Mapping[str, Tensor]) -> FirstLayer | None:
        """That of a classifier's part "first"; None where it has none."""
        if "fc1.weight" not in first:
            return None
        layers = sum(name.startswith("bn") and name.endswith(".weight") for name in first)
        return cls(len(first["fc1.weight"]), "fc1.bias" in first, layers)


@dataclass(frozen=True)
class SupervisedConfig(Config):
    """Settings of a classifier's training; an epoch is a pass over the labelled images."""

    view: View = paws.GLOBAL_VIEW
    encoder: Encoder = ResNet(50)
    head: FirstLayer | None = None  # None: the classifier stands on the trunk
    batch_norm: BatchNormMode = "train"  # "local" is the one mode in which the number of ranks changes the results
    batch_global: int = 256
    optimizer: Optimiser = Sgd(nesterov=True, weight_decay=5e-4)
    rate: Rate = WarmupCosine(0.1, Epochs(5))
    head_peak: float | None = None  # the peak of the classifier's rate; None: that of the encoder's
    scaling: Scaling = "none"  # how both peaks follow the batch
    label_smoothing: float = 0.1

    @property
    def rates(self) -> tuple[Rate, Rate]:
        """Of the encoder and of the classifier."""
        head = self.rate if self.head_peak is None else self.rate.with_peak(self.head_peak)
        return self.rate.scaled(self.batch_global, self.scaling), head.scaled(self.batch_global, self.scaling)

    def build(self, facts: Facts, inputs: Mapping[str, Artefact]) -> Supervised:
        return Supervised(self, facts, inputs)


@dataclass(frozen=True)
class SimclrFineTuning(SupervisedConfig):
    """Fine-tuning as SimCLRv2's section 3.1 has it. Of encoder and labels follow the peak of the rate, .005 times the
    root of the batch for a plain ResNet and .002 for one that is wider or has selective kernels, and where the
    classifier stands: with all labels on the trunk, else on the first projection layer."""

    optimizer: Optimiser = Lars("simclr")
    rate: Rate = WarmupCosine(0.005)
    scaling: Scaling = "sqrt"
    batch_global: int = 1024
    label_smoothing: float = 0.0

    def following(self, said: Collection[str]) -> SimclrFineTuning:
        roots = {name.partition(".")[0] for name in said}
        if not isinstance(self.encoder, SimclrResNet):
            return self
        config, encoder = self, self.encoder
        if "rate" not in roots:
            plain = encoder.width == 1 and not encoder.selective_kernel
            config = replace(config, rate=config.rate.with_peak(0.005 if plain else 0.002))
        if "head" not in roots:
            features = (2048 if encoder.depth >= 50 else 512) * encoder.width * encoder.base_width // 64
            config = replace(config, head=None if self.labels == "all" else FirstLayer(features, bias=False))
        return config


class Classifier(nn.Module):
    """Trunk, the first projection layers where they are kept, and linear classifier."""

    def __init__(self, config: SupervisedConfig, facts: Facts):
        super().__init__()
        self.trunk = config.encoder.build(facts.channels)
        features = self.trunk.num_features
        self.first = LockstepSequential()
        for layer in range(1, 1 + (config.head.layers if config.head else 0)):
            assert config.head is not None
            self.first.add_module(f"fc{layer}", nn.Linear(features, config.head.features, config.head.bias))
            self.first.add_module(f"bn{layer}", GlobalBatchNorm(config.head.features))
            self.first.add_module(f"relu{layer}", nn.ReLU(inplace=True))
            features = config.head.features
        self.fc = nn.Linear(features, facts.num_classes)
        set_batch_norm_mode(self, config.batch_norm)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] -> logits [N, num_classes]."""
        logits: Tensor = self.fc(self.first(self.trunk(x)))
        return logits


class Supervised(Method[SupervisedConfig, Classifier]):
    """Cross-entropy on labelled images."""

    taps = ("backbone", "logits")
    needs_classes = True

    def plan(self) -> Plan:
        c = self.config
        stream = Stream("labelled", "labelled", (c.view,), Shuffled(), c.batch_global, ids=parse_subset(c.labels))
        return Plan((stream,), epoch_of="labelled", seed=self.facts.seed)

    def nets(self) -> Nets[Classifier]:
        return Nets(Classifier(self.config, self.facts))

    def start_from(self, nets: Nets[Classifier], weights: Weights) -> None:
        """From a pre-training run: its trunk and, for `head`, the first layer of its projection head; the classifier
        becomes zero. From a classifier without projection head: all of it, but for the classifier where the
        data has other classes. Raises WeightsError, which says what to set, where that does not fit; then nothing is
        loaded."""
        net = nets.online
        check_same_input(weights, self.config.eval_view)
        check_encoder(weights, self.config.encoder)
        projection = weights.part("projection")
        if projection:
            layers = self.config.head.layers if self.config.head else 0
            kept = tuple(f"{kind}{layer}." for kind in ("fc", "bn") for layer in range(1, 1 + layers))
            first = {name: tensor for name, tensor in projection.items() if name.startswith(kept)}
        else:
            first = weights.part("first")
        _check_first_layer(weights, first, self.config.head)
        # Beside a projection head a classifier is a probe.
        classifier = {} if projection else with_classes(weights, self.facts).part("fc")
        if not classifier:
            classifier = {name: torch.zeros_like(tensor) for name, tensor in net.fc.state_dict().items()}
        parts = {"trunk": weights.part("trunk"), "first": first, "fc": classifier}
        whole = {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
        load_whole(net, whole, weights.source)

    def optimizer(self, nets: Nets[Classifier]) -> Optimizer:
        """Four groups: kernels and the rest, of the encoder and of the classifier."""
        net = nets.online
        return self.config.optimizer.build([[net.trunk, net.first], [net.fc]])

    def rates(self, step: int, horizon: Horizon) -> tuple[float, ...]:
        encoder, classifier = (rate.at(step, horizon) for rate in self.config.rates)
        return encoder, encoder, classifier, classifier

    def loss(self, nets: Nets[Classifier], batch: Batch) -> dict[str, Tensor]:
        part, c = batch.parts["labelled"], self.config
        with autocast(batch.step.device, c.precision):
            logits = in_full(nets.online(part.x[c.view.name]))
        return {"total": F.cross_entropy(logits, part.labels, label_smoothing=c.label_smoothing)}

    def after_step(self, nets: Nets[Classifier], step: int, horizon: Horizon) -> None:
        if self.config.batch_norm == "local" and dist.world_size() > 1:  # what is saved and evaluated must be of all
            average_running_stats(nets.online)

    def embed(self, nets: Nets[Classifier], x: Tensor, tap: str) -> Tensor:
        net = nets.online
        with autocast(x.device, self.config.precision):
            return in_full(net.trunk(x) if tap == "backbone" else net(x))


# ------------------------------------------------------------------------------------------------ what does not fit


def check_same_input(weights: Weights, view: View) -> None:
    """Raise WeightsError where the networks were trained on pixels that were normalised otherwise than `view`'s."""
    theirs, ours = setting_of(weights, Pixels, "eval_view", "pixels"), view.pixels
    if theirs is not None and theirs != ours:
        wanted = " ".join(
            f"--set {setting}.pixels.{name}={','.join(map(str, getattr(theirs, name)))}"
            for setting in ("view", "eval_view")
            for name in ("mean", "std")
        )
        raise WeightsError(
            f"{weights.source} was trained on pixels of mean {list(theirs.mean)} and std {list(theirs.std)}, this "
            f"recipe has mean {list(ours.mean)} and std {list(ours.std)}: {wanted} would do as they did; nothing loaded"
        )


def check_encoder(weights: Weights, encoder: Encoder) -> None:
    """Also where all shapes agree: encoders of two names differ in what they pad."""
    theirs = setting_of(weights, Encoder, "encoder")
    if theirs is None or theirs == encoder:
        return
    says = f"{weights.source} has another encoder"
    names = [type(each).__name__ for each in (theirs, encoder)]
    if type(theirs) is not type(encoder):
        raise WeightsError(f"{says}, {names[0]}, where this recipe has {names[1]}; nothing loaded")
    other = {f.name: getattr(theirs, f.name) for f in fields(theirs)}
    settings = " ".join(f"--set encoder.{k}={v}" for k, v in other.items() if v != getattr(encoder, k))
    raise WeightsError(f"{says}: {settings} would take it; nothing loaded")


def _check_first_layer(weights: Weights, first: Mapping[str, Tensor], head: FirstLayer | None) -> None:
    if head is None:
        if first:
            raise WeightsError(
                f"{weights.source} classifies what a first projection layer makes, which this recipe has none of "
                "(head); nothing loaded"
            )
        return
    if "fc1.weight" not in first:
        parts = sorted({name.partition(".")[0] for name in weights.nets["online"]})
        raise WeightsError(
            f"{weights.source} has no first projection layer to start from, but {', '.join(parts)}: --set head=none "
            "starts from the trunk; nothing loaded"
        )
    if setting_of(weights, str, "activation") == "gelu":
        raise WeightsError(
            f"{weights.source} has GELU in its projection head, where fine-tuning from its layers has ReLU: --set "
            "head=none starts from the trunk; nothing loaded"
        )
    found = FirstLayer.found_in(first)
    assert found is not None
    if found == head:
        return
    if found.layers < head.layers:
        raise WeightsError(
            f"{weights.source} has {found.layers} of the {head.layers} projection layers that this recipe keeps: --set "
            f"head.layers={found.layers} or fewer; nothing loaded"
        )
    theirs = replace(found, layers=max(found.layers, head.layers))
    settings = {name: value for name, value in vars(theirs).items() if name != "layers" or theirs.layers != head.layers}
    takes = " ".join(f"--set head.{name}={value}" for name, value in settings.items())
    raise WeightsError(f"{weights.source} has another first projection layer: {takes} would take it; nothing loaded")
