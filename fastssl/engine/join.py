"""A stage joined with what it needs: the facts of its data, its method, what earlier stages made, and its plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from fastssl import dist
from fastssl.engine.job import Job
from fastssl.engine.signals import StopRequest
from fastssl.errors import ConfigError
from fastssl.evaluation import check_protocol
from fastssl.evaluation.subject import Roles
from fastssl.methods.base import Artefact, Facts, Method, Stage
from fastssl.run_dir.checkpoint import STATE, Checkpoints, verified_sha256
from fastssl.run_dir.files import CHECKPOINTS, PRODUCED, RESOLVED, read_json
from fastssl.weights.read import BACKBONE
from loaders.files import sha256_of
from loaders.loader import Bound, Loader, bind
from loaders.store.data import LABELLED, TRAIN, VALIDATION, DataSets


@dataclass(frozen=True)
class Here:
    """With what this rank does its job."""

    job: Job
    data: DataSets
    device: torch.device
    threads: int
    stop: StopRequest = field(default_factory=StopRequest)


@dataclass(frozen=True)
class Joined:
    """A stage on this rank, and the folder in which it leaves what it makes."""

    here: Here
    stage: Stage
    folder: Path
    method: Method[Any, Any]
    bound: Bound

    @property
    def checkpoints(self) -> Checkpoints:
        stays = self.stage.milestone_every
        every = None if stays is None else max(1, stays.steps(self.bound.plan.steps_per_epoch))
        return Checkpoints(self.folder / CHECKPOINTS, self.stage.keep_checkpoints, every)

    @property
    def protocols(self) -> tuple[str, ...]:
        return protocols_of(self.here.job, self.stage, self.here.data)

    def loader(self) -> Loader:
        return Loader(
            self.bound,
            rank=dist.rank(),
            world=dist.world_size(),
            device=self.here.device,
            threads=self.here.threads,
            renderer=self.here.job.loader,
            replace_damaged=self.here.job.damaged == "replace",
            cache_bytes=int(self.here.job.cache_gib * 2**30),
        )


def join(here: Here, stage: Stage, artefacts: Mapping[str, Artefact]) -> Joined:
    """`stage` with what it needs of `artefacts`, which earlier stages made. Raises as `joined` does."""
    torch.manual_seed(here.job.seed)
    method, bound = joined(here.job, stage, here.data, inputs_of(here.job, stage, artefacts))
    return Joined(here, stage, here.job.folder(stage), method, bound)


def joined(job: Job, stage: Stage, data: DataSets, inputs: Mapping[str, Artefact]) -> tuple[Method[Any, Any], Bound]:
    """`stage`'s method, and its plan joined with `data`; nothing in `inputs` is opened, none need be there. Raises
    FastsslError or LoaderError where method, data, number of ranks and evaluations do not fit."""
    method = stage.config.build(facts_of(data, job.seed), inputs)
    bound = bind(method.plan(), data)
    bound.plan.check_world(job.world)
    _evaluated(job, stage, method, data)
    return method, bound


def fitted(job: Job, data: DataSets) -> tuple[Job, list[str]]:
    """The job for as many classes as `data` has, and what is said of it: settings of the recipe that want more classes
    are lowered, but for those that the user has set, which are refused where they do not fit."""
    num_classes = data.get(LABELLED).num_classes
    typed = {change.partition("=")[0].strip().rpartition(".")[2] for change in job.changes}
    stages, said = [], []
    for stage in job.stages:
        lowered = stage.config.for_classes(num_classes) if num_classes else stage.config
        changes = {
            each.name: (before, after)
            for each in fields(lowered)
            if (before := getattr(stage.config, each.name)) != (after := getattr(lowered, each.name))
        }
        if typed & changes.keys():
            changes, lowered = {}, stage.config
        said += [
            f"{name} is {after} in place of {before}: the data has {num_classes} classes"
            for name, (before, after) in changes.items()
        ]
        stages.append(replace(stage, config=lowered))
    return replace(job, stages=tuple(stages)), said


def bounds_of(job: Job, stage: Stage, data: DataSets) -> list[Bound]:
    """All that `stage` draws images by, in training and for its evaluations. Raises as `joined` does."""
    method, bound = joined(job, stage, data, {})
    return [bound, *_evaluated(job, stage, method, data).bounds]


def _evaluated(job: Job, stage: Stage, method: Method[Any, Any], data: DataSets) -> Roles:
    """The roles in which the stage's evaluations look at images, found fit for it."""
    roles = Roles(method, data, held_out=job.held_out)
    protocols = protocols_of(job, stage, data)
    for protocol in protocols:
        check_protocol(protocol, roles)
    for role in (LABELLED, VALIDATION) if protocols else ():
        roles.source_of(role)  # a result says which images these were
    return roles


def protocols_of(job: Job, stage: Stage, data: DataSets) -> tuple[str, ...]:
    """Which evaluate `stage`: none where there is nothing to evaluate on, and nothing is evaluated."""
    can_be = VALIDATION in data.sources or job.held_out is not None
    return stage.evaluate if can_be and stage.do == "train" and job.replay is None else ()


def facts_of(data: DataSets, seed: int) -> Facts:
    """What a method may know of `data` before it is built."""
    labelled, train = data.get(LABELLED), data.sources.get(TRAIN)
    fingerprint, all_labelled = ("", True) if train is None else (train.fingerprint(), bool((train.labels >= 0).all()))
    one_set = not {LABELLED, "unlabelled"} & data.sources.keys()
    return Facts(
        labelled.num_classes, labelled.channels, seed, fingerprint, all_labelled, labelled.class_names, one_set
    )


def inputs_of(job: Job, stage: Stage, artefacts: Mapping[str, Artefact]) -> dict[str, Artefact]:
    """What `stage` needs, by name; but for weights to start from that `--init-from` gives."""
    found = {}
    for name, ref in stage.needs.items():
        if ref.stage is not None:
            found[name] = artefacts[ref.stage]
        elif ref.path is not None:
            path = weights_file(Path(ref.path), print)
            found[name] = Artefact(path, sha256_of(path), job.unsafe_pickle)
    return found


def weights_file(source: Path, warn: Callable[[str], None]) -> Path:
    """The file in which a run, a checkpoint, an exported folder or a file itself holds its networks. `warn` is told of
    damaged checkpoints that are passed over. Raises FastsslError where there is none."""
    if not source.is_dir():
        if not source.exists():
            raise ConfigError(f"{source} is not there")
        return source
    if (source / STATE).exists():
        verified_sha256(source)
        return source / STATE
    if (source / BACKBONE).exists():
        return source / BACKBONE
    folder = source / CHECKPOINTS
    if not folder.is_dir() and (source / RESOLVED).exists():  # a run of several stages: its last one
        folder = source / read_json(source / RESOLVED)["stages"][-1]["name"] / CHECKPOINTS
    return Checkpoints(folder).newest_whole(warn) / STATE


def made_by(stage: Stage, folder: Path) -> Artefact:
    """What `stage` left for later ones. Raises CheckpointError where it is damaged."""
    if stage.do == "produce":
        return Artefact(folder / PRODUCED, sha256_of(folder / PRODUCED))
    newest = Checkpoints(folder / CHECKPOINTS).newest()
    return Artefact(newest / STATE, verified_sha256(newest))
