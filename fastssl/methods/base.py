"""The contract between a method and the engine.

A method is one file beside this one: a `Config`, a loss as a pure function, a `Method`; its recipes are a file of the
same name in `fastssl/recipes`. The engine knows only what is here and names no method; where a method needs more, this
contract is widened.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Literal, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastssl import dist
from fastssl.config.plain import from_plain, type_name
from fastssl.errors import ConfigError, refuse_negative
from fastssl.nn.encoders.encoder import Encoder
from fastssl.optim.horizon import Epochs, Horizon, Span, Steps
from fastssl.optim.optimiser import Optimiser
from fastssl.optim.rates import Rate, WarmupCosine
from fastssl.optim.sgd import Sgd
from fastssl.weights.read import Weights, parts_of, read_weights
from fastssl.weights.tensor_files import WeightsError
from loaders.batch import Batch
from loaders.plan.plan import Plan
from loaders.plan.views import View, parse_subset

Precision = Literal["fp32", "bf16", "fp16"]

NO_LABEL = "no image of the labelled data carries a label: give --data labelled=PATH"


@dataclass(frozen=True)
class Facts:
    """What a method may know of the data and the run before it is built.

    num_classes, class_names and channels are those of the labelled images; train_fingerprint identifies the plain
    training set, and is empty where there is none; all_labelled says whether every image of that set carries a label;
    one_set whether labelled and unlabelled images are the same set.
    """

    num_classes: int
    channels: int
    seed: int
    train_fingerprint: str = ""
    all_labelled: bool = True
    class_names: tuple[str, ...] = ()  # in the order of their numbers; empty where nobody said
    one_set: bool = True


@dataclass(frozen=True)
class Artefact:
    """A file that an earlier stage or run produced (final networks, pseudo-labels), with its hash."""

    path: Path
    sha256: str
    unsafe_pickle: bool = False  # whether code in it may run: see fastssl.weights.tensor_files

    def load(self) -> dict[str, Any]:
        """The stored tensors and plain values, on the CPU."""
        content: dict[str, Any] = torch.load(self.path, map_location="cpu", weights_only=True)
        return content

    def made_of(self) -> dict[str, Any]:
        """Of what a stage that produces made this file, as is noted beside it: {"sha256": of the file, "inputs": {name:
        sha256}, "data": {stream: the fingerprint of its source}, "num_images": of the source whose images the rows
        are}. Empty where nothing is noted. Raises ConfigError where what is noted is not of this file."""
        noted = self.path.parent / "result.json"
        try:
            made: dict[str, Any] = json.loads(noted.read_text()).get("made_of", {})
        except FileNotFoundError:
            return {}
        if made and made.get("sha256") != self.sha256:
            why = "is not the file" if "sha256" in made else "is older than the digests, so it may not be the file"
            raise ConfigError(
                f"{self.path} {why} that {noted} tells of: make it anew. Remove {noted.parent}, and the result.json of "
                "its run if that is finished, and give the run's command again"
            )
        return made

    def weights(self) -> Weights:
        """The networks in it, on the CPU. Raises WeightsError where it holds none."""
        return read_weights(self.path, self.unsafe_pickle)


AnyConfig = TypeVar("AnyConfig", bound="Config")
Net = TypeVar("Net", bound=nn.Module)


@dataclass
class Nets(Generic[Net]):
    """A method's modules.

    online   trained; the engine wraps it for gradient averaging, so call it once a loss, with all its inputs
    target   an average of online, or None; saved, gets no gradient
    frozen   a teacher; not saved (its artefact's hash is), gets no gradient
    state    queues and pointers, equal on all ranks; saved
    """

    online: Net
    target: Net | None = None
    frozen: nn.Module | None = None
    state: nn.Module | None = None

    def modules(self) -> dict[str, nn.Module]:
        """Those that exist, by name."""
        named = {"online": self.online, "target": self.target, "frozen": self.frozen, "state": self.state}
        return {name: module for name, module in named.items() if module is not None}

    def saved(self) -> dict[str, nn.Module]:
        """Those that a checkpoint holds."""
        return {name: module for name, module in self.modules().items() if name != "frozen"}


@dataclass(frozen=True)
class Config(ABC):
    """Base of every method's configuration. Counts are global: over all ranks."""

    dataset: str  # a key of fastssl.recipes.datasets.KNOWN_SETS: what the recipe was written for
    eval_view: View  # how images are seen when they are embedded or classified
    labels: str = "all"  # which images show their label: see loaders.plan.views.parse_subset
    precision: Precision = "bf16"
    optimizer: Optimiser = Sgd()
    rate: Rate = WarmupCosine(0.1)

    def __post_init__(self) -> None:
        parse_subset(self.labels)
        refuse_negative(self)

    def following(self, said: Collection[str]) -> Config:
        """What this becomes where a user has set `said`, dotted names of its fields: with what its paper derives from
        those of them that he did set, in those that he did not. Here: as it is."""
        return self

    def for_classes(self, num_classes: int) -> Self:
        """These settings for data of so many classes: what no data of fewer could have is lowered. Here: all stay."""
        return self

    @abstractmethod
    def build(self, facts: Facts, inputs: Mapping[str, Artefact]) -> Method[Any, Any]:
        """The method of this configuration."""


@dataclass(frozen=True)
class About:
    """How stored networks are built and fed: `to_plain` of this stands beside them."""

    method: str
    config: Config
    facts: Facts


def about_of(plain: Mapping[str, Any]) -> About:
    """What stands beside networks, read back. Raises ConfigError where that is not whole, or names what is gone."""
    about: About = from_plain(About, {"type": type_name(About), **plain})  # which early commits did not write
    return about


def setting_of(weights: Weights, kind: Any, *path: str) -> Any:
    """What the weights' makers said of their config's setting at `path`, of type `kind`; None where they did not. Read
    apart from all else, which may be of a method that is not here. Raises WeightsError where today's code has no such
    thing."""
    value: Any = weights.about.get("config")
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    try:
        return None if value is None else from_plain(kind, value, path=path[-1])
    except ConfigError as error:
        raise WeightsError(f"{weights.source}: {error}; nothing loaded") from None


def _refuse_sizes(config: Config) -> None:
    """Raise ConfigError where the config's encoder cannot take one of its views."""
    encoder = getattr(config, "encoder", None)
    if not isinstance(encoder, Encoder):
        return
    for name, view in vars(config).items():
        if isinstance(view, View) and (why := encoder.refused_size(view.size)):
            raise ConfigError(f"{name}.size is {view.size}, which {encoder.name} does not take: {why}")


def rows_of_classes(weights: Weights, facts: Facts) -> list[int] | None:
    """Which row of the weights' classifier `fc` tells each class of the data, by name; by number where either did not
    say its names. None where they tell other classes apart, or none."""
    theirs, ours = tuple(weights.about.get("facts", {}).get("class_names", ())), facts.class_names
    num_rows = len(weights.part("fc").get("bias", ()))
    if theirs and ours:
        return [theirs.index(name) for name in ours] if set(theirs) == set(ours) else None
    return list(range(num_rows)) if num_rows == facts.num_classes else None


def with_classes(weights: Weights, facts: Facts) -> Weights:
    """`weights` whose classifier `fc` tells the data's classes, in their order; without it, and a line says so, where
    it tells others."""
    if not weights.part("fc"):
        return weights
    rows = rows_of_classes(weights, facts)
    if rows is None and dist.is_main():
        print(f"a new classifier for {facts.num_classes} classes: {other_classes(weights, facts)}", flush=True)

    def taken(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        kept = {name: t for name, t in tensors.items() if rows is not None or not name.startswith("fc.")}
        return {name: t[rows] if name.startswith("fc.") else t for name, t in kept.items()}

    return replace(weights, nets={name: taken(tensors) for name, tensors in weights.nets.items()})


def other_classes(weights: Weights, facts: Facts) -> str:
    """How the classes of the weights' classifier differ from the data's, in words."""
    theirs, ours = tuple(weights.about.get("facts", {}).get("class_names", ())), facts.class_names
    strange = [name for name in ours if theirs and name not in theirs]
    return (
        f"{weights.source} tells {len(weights.part('fc')['bias'])} classes apart, the labelled data has "
        f"{facts.num_classes}" + (f", among them {strange[0]!r}, which it does not know" if strange else "")
    )


class Method(ABC, Generic[AnyConfig, Net]):
    """One learning method. Draws nothing itself: initial weights come from torch's generator, seeded by the engine;
    anything random in a step is keyed by the batch."""

    taps: tuple[str, ...] = ("backbone",)  # what `embed` offers; the last is the one nearest the loss
    needs_classes = False  # whether it classifies, so that labelled images without any label are refused at the door

    def __init__(self, config: AnyConfig, facts: Facts, inputs: Mapping[str, Artefact]):
        if self.needs_classes and not facts.num_classes:
            raise ConfigError(NO_LABEL)
        _refuse_sizes(config)
        self.config, self.facts, self.inputs = config, facts, inputs

    @abstractmethod
    def plan(self) -> Plan:
        """The streams of a training step."""

    @abstractmethod
    def nets(self) -> Nets[Net]:
        """Freshly initialised modules on the CPU, whatever the inputs."""

    def about(self) -> About:
        """What stands beside the networks wherever they are stored."""
        return About(type(self).__name__, self.config, self.facts)

    def load_inputs(self, nets: Nets[Net]) -> None:
        """Put what `inputs` hold (weights to start from, a teacher's) into fresh `nets`, before any checkpoint of this
        stage is loaded over them. `nets` itself must work without inputs: runs are opened again without. Here: the
        input called "init"."""
        if "init" in self.inputs:
            self.start_from(nets, self.inputs["init"].weights())

    def start_from(self, nets: Nets[Net], weights: Weights) -> None:
        """Put another run's weights into fresh `nets`: `--init-from`. Raises WeightsError where they do not fit, with
        nothing loaded. Here: every part (trunk, projection, ...) that both have must fit whole; a line names those
        that only one has. A target is an average of `online`, so it starts from the other run's, or where that had
        none from its online network. A classifier of other classes than the data's is one of those that are left
        out."""
        if "fc" in parts_of(nets.online.state_dict()):
            weights = with_classes(weights, self.facts)
        found = [(nets.online, weights.shared_parts(nets.online))]
        if nets.target is not None:
            name = "target" if "target" in weights.nets else "online"
            found.append((nets.target, weights.shared_parts(nets.target, name)))
        own, theirs = parts_of(nets.online.state_dict()), parts_of(weights.nets["online"])
        for module, tensors in found:
            module.load_state_dict(tensors, strict=False)
        taken = found[0][1]
        resized = [key for key, t in weights.nets["online"].items() if key in taken and t.shape != taken[key].shape]
        if resized and dist.is_main():
            print(f"interpolated: {', '.join(resized)}", flush=True)
        if own != theirs and dist.is_main():
            named = [", ".join(sorted(parts)) or "none" for parts in (own & theirs, own - theirs, theirs - own)]
            print("taken: {}; as they were drawn: {}; left out: {}".format(*named), flush=True)

    def optimizer(self, nets: Nets[Net]) -> Optimizer:
        """Over nets.online (and whatever else is trained), in any number of groups. Here: the config's."""
        return self.config.optimizer.build([[nets.online]])

    def rates(self, step: int, horizon: Horizon) -> tuple[float, ...]:
        """The learning rate of each parameter group at `step`. Here: the config's, of both groups."""
        rate = self.config.rate.at(step, horizon)
        return rate, rate

    def decay(self, step: int, horizon: Horizon) -> float | None:
        """The weight decay at `step` of the first of each two groups; None where it never moves. Here: the config's."""
        return self.config.optimizer.decay_at(step, horizon)

    @abstractmethod
    def loss(self, nets: Nets[Net], batch: Batch) -> dict[str, Tensor]:
        """0-dim tensors: "total", which is minimised, and its parts by name. Owns its autocast; similarities,
        softmax and losses in fp32. On several ranks: the mean over ranks of `total` is the objective."""

    def after_step(self, nets: Nets[Net], step: int, horizon: Horizon) -> None:  # noqa: B027
        """Averages and queue pointers, after each step, those included that fp16's scaler left out."""

    def metrics(self, nets: Nets[Net], batch: Batch, truth: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """0-dim tensors worth a look, on logging steps, without gradient; `truth` has each stream's true labels."""
        return {}

    @abstractmethod
    def embed(self, nets: Nets[Net], x: Tensor, tap: str) -> Tensor:
        """Images [N, C, H, W] -> float32 [N, D] at one of `taps`. The caller sets eval mode and no_grad."""

    def produce(self, nets: Nets[Net], batch: Batch) -> dict[str, Tensor]:
        """What a `Produce` stage stores for each image: tensors with B rows (pseudo-labels, masks)."""
        raise NotImplementedError(f"{type(self).__name__} produces nothing")


@dataclass(frozen=True)
class Ref:
    """Where an input comes from: an earlier stage of this run by name, or a path (of a run, a checkpoint or a file).
    With neither, the user must say: `--init-from PATH` for "init", `--set NAME=PATH` for others."""

    stage: str | None = None
    path: str | None = None


@dataclass(frozen=True)
class Stage:
    """One leg of a recipe: train a method, or let it produce something for each image of its plan's streams."""

    name: str
    config: Config  # of its method
    length: Span
    do: Literal["train", "produce"] = "train"
    needs: Mapping[str, Ref] = field(default_factory=dict)
    evaluate: tuple[str, ...] = ("soft-nn", "knn")  # protocols run while training and at the end
    evaluate_every: Span = Epochs(10)
    log_every: Span = Steps(10)
    checkpoint_every: Span = Epochs(1)
    keep_checkpoints: int = 2
    milestone_every: Span | None = None  # such checkpoints stay for ever
    gradients: Literal["fp32", "bf16"] = "fp32"  # what they travel between ranks as

    def __post_init__(self) -> None:
        if self.length.count < 1:
            raise ConfigError(f"a stage of {self.length} does nothing")
        if self.keep_checkpoints < 1:
            raise ConfigError(f"keep_checkpoints is {self.keep_checkpoints}, but the newest must be kept")

    def with_settings(self, **changes: Any) -> Stage:
        """The stage with these settings of its method changed. Raises TypeError for one that the method has not."""
        return replace(self, config=replace(self.config, **changes))

    def settings(self, *names: str) -> dict[str, Any]:
        """Those of the method's settings, for another method to be given."""
        return {name: getattr(self.config, name) for name in names}


Stages = tuple[Stage, ...]


DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The autocast context of a precision; a no-op for fp32."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


def in_full(x: Tensor) -> Tensor:
    """Half-precision values in float32, for losses and similarities; float64, as tests of exactness use it, stays."""
    return x if x.dtype == torch.float64 else x.float()


def through(layers: Sequence[nn.Module], x: Tensor, precision: Precision) -> Tensor:
    """x after one of `layers` after the other, under autocast, and then in full precision."""
    with autocast(x.device, precision):
        for layer in layers:
            x = layer(x)
    return in_full(x)
