"""What a protocol measures: the images of a run by the part they play, and a method's networks' embeddings of them.

Embeddings are computed once for each (role, tap), so protocols that look at the same ones share the pass.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastssl import dist
from fastssl.errors import ConfigError, FastsslError
from fastssl.evaluation.shards import BLOCK, share
from fastssl.methods.base import NO_LABEL, Method, Nets
from loaders.errors import StoreError
from loaders.loader import Bound, Loader, bind
from loaders.plan.plan import Plan
from loaders.plan.views import Crop, Sequential, Stream, parse_subset
from loaders.store.data import LABELLED, VALIDATION, DataSets
from loaders.store.source import Source


@dataclass(frozen=True)
class Features:
    """Embeddings of N images on the CPU, ids ascending; of several ranks each has its own, after those of the ranks
    before it.

    values  float32 [N, D], as the method gives them (not normalised)
    labels  int64 [N], -1 where the data has none
    ids     int64 [N], index into the source
    """

    values: Tensor
    labels: Tensor
    ids: Tensor


class Roles:
    """The images of a run's data by the part they play. A role is a source key; `labelled` means the images of that
    source whose labels the method sees, or those that `labels` (a subset as users write it) says in their place; any
    other role all images of its source. Where `held_out` is given (likewise), `validation` means those images of the
    labelled source instead. `batch` counts the images that are embedded at once. `sets` are published sets to measure
    on, by key, not opened yet.
    """

    def __init__(
        self,
        method: Method[Any, Any],
        data: DataSets,
        *,
        batch: int = BLOCK,
        held_out: str | None = None,
        labels: str | None = None,
        sets: Mapping[str, Path] | None = None,
    ):
        self.method, self.data, self.batch, self.sets = method, data, batch, sets or {}
        self.held_out, self.labels = held_out, method.config.labels if labels is None else labels
        self._bound: dict[str, Bound] = {}

    def given(self, known: Iterable[str]) -> dict[str, Path]:
        """Those of `sets` that are `known`. Raises ConfigError where there are none."""
        known = list(known)
        found = {key: self.sets[key] for key in known if key in self.sets}
        if not found:
            raise ConfigError(f"nothing to measure on: give --data KEY=PATH with KEY one of {', '.join(known)}")
        return found

    def check(self) -> None:
        """Raises ConfigError where the data cannot be evaluated on, before anything is read of its images."""
        self._check_labelled()
        self.check_validation()

    def check_validation(self) -> None:
        """Raises ConfigError where there are no validation images, or some without a label."""
        missing = self._bind(VALIDATION).subsets[VALIDATION].count - self._num_labelled(VALIDATION)
        if missing:
            raise ConfigError(f"{missing} validation images carry no label, so nothing can be measured on them")

    def _check_labelled(self) -> None:
        if not self._num_labelled(LABELLED):
            raise ConfigError(NO_LABEL)

    def check_apart(self) -> None:
        """Raises as `check` does, and ConfigError where held-out images are among the labelled ones."""
        self.check()
        if self.held_out is None:
            return  # two sources
        subsets = [self._bind(role).subsets[role] for role in (LABELLED, VALIDATION)]
        learnt, held = (np.arange(subset.count) if subset.ids is None else subset.ids for subset in subsets)
        if both := len(np.intersect1d(learnt, held)):
            raise ConfigError(
                f"{both} of {len(held)} held-out images are among the {len(learnt)} labelled ones ({subsets[0].name}): "
                f"give --labels not:{self.held_out}, or --data for other validation images"
            )

    def labels_and_ids(self, role: str) -> tuple[Tensor, Tensor]:
        """int64 [N] each, of the role's images that carry a label, as `features` has them."""
        bound = self._bind(role)
        labels, ids = bound.sources[role].labels, bound.subsets[role].ids
        ids = np.arange(len(labels)) if ids is None else ids
        ids = ids[labels[ids] >= 0]
        return torch.from_numpy(labels[ids]), torch.from_numpy(ids)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Of the labelled images, in the order of their labels' numbers."""
        return self.source_of(LABELLED).class_names

    def source_of(self, role: str) -> Source:
        """What the role's images are a part of, or all of."""
        return self._bind(role).sources[role]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def looked_at(self) -> tuple[str, ...]:
        """The roles that anything was asked about so far."""
        return tuple(self._bound)

    @property
    def bounds(self) -> tuple[Bound, ...]:
        """By what images of these roles are drawn."""
        return tuple(self._bound.values())

    def provenance(self, roles: tuple[str, ...] = (LABELLED, VALIDATION)) -> dict[str, dict[str, Any]]:
        """Which images stand behind the numbers, by role; plain values."""
        return {role: self._describe(role) for role in roles}

    def _describe(self, role: str) -> dict[str, Any]:
        source, resolved = self._bind(role).sources[role], self._bind(role).subsets[role]
        return {
            "data": source.name,
            "fingerprint": source.fingerprint(),
            "split": resolved.name,
            "split_sha256": resolved.sha256,
            "count": resolved.count,
            "count_labelled": self._num_labelled(role),
            "classes": source.num_classes,
        }

    def _num_labelled(self, role: str) -> int:
        return len(self.labels_and_ids(role)[0])

    def _bind(self, role: str) -> Bound:
        if role == VALIDATION and self.held_out is None and self.data.get(VALIDATION) is None:
            raise ConfigError("no validation split: give --data validation=PATH")
        if role not in self._bound:
            config = self.method.config
            subset = {LABELLED: self.labels, VALIDATION: self.held_out}.get(role)
            stream = Stream(
                name=role,
                source=LABELLED if subset is not None else role,
                views=(config.eval_view,),
                order=Sequential(),
                batch_global=self.batch,
                ids=parse_subset(subset or "all"),
            )
            self._bound[role] = bind(Plan((stream,), epoch_of=role, seed=0), self.data)
        return self._bound[role]


class Subject(Roles):
    """A method's networks beside a run's data. `leave_out_damaged` says of images that cannot be used that they have
    no row; else they are errors.

    Every rank must ask for the same features in the same order, and each gets its share of the rows.
    """

    def __init__(
        self,
        method: Method[Any, Any],
        nets: Nets[Any],
        data: DataSets,
        *,
        device: torch.device | str = "cpu",
        threads: int | None = None,
        renderer: str = "auto",
        tap: str | None = None,
        leave_out_damaged: bool = False,
        **roles: Any,
    ):
        super().__init__(method, data, **roles)
        self.tap, self.leave_out_damaged = tap, leave_out_damaged
        self.nets, self.device, self.threads, self.renderer = nets, torch.device(device), threads, renderer
        self._features: dict[tuple[str, str], Features] = {}

    def features(self, role: str, tap: str) -> Features:
        """This rank's share of the images of `role`, each once, in the method's evaluation view, embedded at `tap` in
        eval mode.

        Raises ConfigError where the run has no such data, FastsslError where an embedding is not finite.
        """
        if tap not in self.method.taps:
            raise ConfigError(f"{type(self.method).__name__} has no tap {tap!r}; it has {', '.join(self.method.taps)}")
        if (role, tap) not in self._features:
            self._features[role, tap] = self._embed(self._bind(role), role, tap)
        return self._features[role, tap]

    def chosen_tap(self, usual: str) -> str:
        """Where a protocol takes its features: as was asked for, else its usual tap."""
        return self.tap or usual

    def features_of(self, source: Source, tap: str, crop: Crop | None = None) -> Features:
        """Every image of a source that is none of the run's, with the labels it has there; not kept. `crop` takes the
        place of the evaluation view's. Raises ConfigError where the network takes images of other channels."""
        if source.channels != self.method.facts.channels:
            takes = f"the network takes images of {self.method.facts.channels}"
            raise ConfigError(f"{source.name} has images of {source.channels} channels; {takes}")
        view = self.method.config.eval_view
        view = replace(view, crop=crop or view.crop)
        stream = Stream("images", "images", (view,), Sequential(), self.batch)
        bound = bind(Plan((stream,), epoch_of="images", seed=0), DataSets({"images": source}))
        return self._embed(bound, "images", tap)

    def labelled(self, tap: str) -> Features:
        """The labelled images at `tap`, none without a label. Raises ConfigError where there are none."""
        self._check_labelled()
        labelled = self.features(LABELLED, tap)
        known = labelled.labels >= 0
        if not known.all():
            labelled = Features(labelled.values[known], labelled.labels[known], labelled.ids[known])
        return labelled

    def labelled_and_validation(self, tap: str) -> tuple[Features, Features]:
        """The labelled images and the validation images at `tap`, none without a label. Raises as
        `check_apart` does."""
        self.check_apart()
        return self.labelled(tap), self.features(VALIDATION, tap)

    def _embed(self, bound: Bound, role: str, tap: str) -> Features:
        view = self.method.config.eval_view.name
        first, last = share(bound.plan.steps_per_epoch)
        count = max(0, min(last * self.batch, bound.subsets[role].count) - first * self.batch)
        values_ND, marks_N2, done = torch.empty(count, 0), torch.empty(count, 2, dtype=torch.int64), 0
        loader = Loader(
            bound,  # batch by batch as one rank alone would: so embeddings are the same to the last bit
            device=self.device,
            threads=self.threads,
            renderer=self.renderer,
            replace_damaged=True,  # on one rank alone: all must come to the end of the pass to answer alike
        )
        with loader, eval_mode(self.nets), torch.no_grad():
            behind: deque[tuple[Tensor, Tensor, torch.cuda.Event | None]] = deque()
            for number, batch in enumerate(loader.batches(first, last), first + 1):
                part = batch.parts[role]
                rows_BD = self.method.embed(self.nets, part.x[view], tap).float()
                behind.append(_on_the_way(rows_BD, torch.stack([part.labels, part.ids], dim=1)))
                if number == first + 1:
                    values_ND = torch.empty(count, rows_BD.shape[1])
                # A GPU works on a batch while the last is fetched. On a CPU nothing waits: rows may be the batch's own.
                while len(behind) > (self.device.type == "cuda" and number < last):
                    rows_BD, marks_B2, there = behind.popleft()
                    if there is not None:
                        there.synchronize()
                    values_ND[done : done + len(rows_BD)], marks_N2[done : done + len(rows_BD)] = rows_BD, marks_B2
                    done += len(rows_BD)
                batch.release()
        assert done == count, f"{done} embeddings of {count} images"
        if not dist.all_true(bool(torch.isfinite(values_ND).all())):
            raise FastsslError(f"embeddings of the {role} images at {tap!r} are not finite: the training has diverged")
        width = max(dist.gather_objects(values_ND.shape[1]))  # a rank without images has not seen any
        values_ND = values_ND if count else torch.empty(0, width)
        found = Features(values_ND, labels=marks_N2[:, 0].contiguous(), ids=marks_N2[:, 1].contiguous())
        return self._without_substitutes(found, bound, role, first * self.batch)

    def _without_substitutes(self, found: Features, bound: Bound, role: str, first: int) -> Features:
        """The rows of the images that were asked for, this rank's from number `first` on: one that stands in for a
        damaged image would count twice. A line says how many are left out; where none may be, StoreError is raised, on
        every rank alike."""
        source, ids = bound.sources[role], bound.subsets[role].ids
        numbers_N = torch.arange(first, first + len(found.ids))
        asked_N = numbers_N if ids is None else torch.from_numpy(ids)[numbers_N]
        own_N = found.ids == asked_N
        lost = sum(dist.gather_objects(asked_N[~own_N].tolist()), [])
        if not lost:
            return found
        said = f"{len(lost)} of {bound.subsets[role].count} {role} images cannot be used, first "
        said += f"{source.path_of(lost[0])} of {source.name}"
        if not self.leave_out_damaged:
            raise StoreError(f"{said}: mend or remove them")
        if dist.is_main():
            print(f"warning: {said}; they are left out", file=sys.stderr, flush=True)
        return Features(found.values[own_N], found.labels[own_N], found.ids[own_N])


def _on_the_way(rows_BD: Tensor, marks_B2: Tensor) -> tuple[Tensor, Tensor, torch.cuda.Event | None]:
    """Both on the host, once the event is there."""
    if not rows_BD.is_cuda:
        return rows_BD, marks_B2, None
    pair = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in (rows_BD, marks_B2)]
    for host, there in zip(pair, (rows_BD, marks_B2), strict=True):
        host.copy_(there, non_blocking=True)
    return pair[0], pair[1], torch.cuda.current_stream(rows_BD.device).record_event()


@contextmanager
def eval_mode(nets: Nets[Any]) -> Iterator[None]:
    """Every module in eval mode; afterwards each one back in the mode it was in (a frozen part stays frozen)."""
    modes = {part: part.training for module in nets.modules().values() for part in module.modules()}
    try:
        for module in nets.modules().values():
            module.eval()
        yield
    finally:
        for part, training in modes.items():
            part.training = training
