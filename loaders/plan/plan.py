"""The plan of a run's data: a pure function from (stream, step, rank, world) to ids, boxes and parameters.

`Plan` is a method's description; bound to the facts of the data it becomes a `BoundPlan`, which renderers and finishes
follow. Everything is keyed by the position in the stream: the same global batches come out on any number of ranks,
and any step can be planned without planning those before it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from loaders.errors import PlanError
from loaders.plan.boxes import boxes
from loaders.plan.draws import mix, mixed_on, tag, uniforms
from loaders.plan.order import ClassIndex, balanced, shuffled
from loaders.plan.views import Balanced, Centre, FiveCrops, SaliencyMask, Sequential, Stream, View


@dataclass(frozen=True)
class StreamFacts:
    """What the plan must know of the images a stream draws from.

    ids        int64 [n], the images allowed, ascending; None for all of the source
    labels     int64 [N], by source index, -1 where hidden from the method
    sizes      int32 [N, 2], height and width
    num_classes  labels are below it
    foreground  float64 [N], the share of each image that is foreground; None where no view has a mask
    """

    ids: np.ndarray | None
    labels: np.ndarray
    sizes: np.ndarray
    num_classes: int
    foreground: np.ndarray | None = None

    @property
    def num_images(self) -> int:
        return len(self.sizes) if self.ids is None else len(self.ids)


@dataclass(frozen=True)
class ViewRows:
    """One view of B images: boxes [copies * B, 4] and one parameter table [copies * B, columns] an op, copy-major.

    `greys`, int16 [copies * B], is the level that stands outside a copy's mask, -1 where the copy is not masked; None
    where the view has no mask. `policy`, int8 [copies * B, 3], is what `AutoAugment.chosen` chose; None where the view
    has no policy.
    """

    view: View
    boxes: np.ndarray
    tables: tuple[np.ndarray, ...]
    greys: np.ndarray | None = None
    policy: np.ndarray | None = None


@dataclass(frozen=True)
class Rows:
    """One rank's rows of one stream at one step; see `loaders.batch.Part` for the arrays of length B."""

    stream: str
    step: int
    positions: np.ndarray
    ids: np.ndarray
    labels: np.ndarray
    columns: np.ndarray | None
    keys: np.ndarray  # uint64 [B]
    views: tuple[ViewRows, ...]

    def is_masked(self, b: int) -> bool:
        """Whether any copy of image `b`, in whatever view, is masked."""
        return any(v.greys is not None and (v.greys[b :: len(self.ids)] >= 0).any() for v in self.views)


@dataclass(frozen=True)
class Plan:
    """A method's streams; `epoch_of` names the stream whose images make an epoch."""

    streams: tuple[Stream, ...]
    epoch_of: str
    seed: int

    def stream(self, name: str) -> Stream:
        return next(s for s in self.streams if s.name == name)

    def bind(self, facts: Mapping[str, StreamFacts]) -> BoundPlan:
        """Join with the facts of each stream's data, by stream name. Raises PlanError where they do not fit."""
        return BoundPlan(self, facts)


class BoundPlan:
    """A plan that knows its data."""

    def __init__(self, plan: Plan, facts: Mapping[str, StreamFacts]):
        self.asked, self.facts = plan, dict(facts)
        self._keys = {s.name: mix(plan.seed, tag(s.name)) for s in plan.streams}
        self._class_index: dict[str, ClassIndex] = {}
        for stream in plan.streams:
            self._check(stream, self.facts[stream.name])

    @property
    def steps_per_epoch(self) -> int:
        return self.num_steps(self.asked.epoch_of)

    def num_steps(self, stream_name: str) -> int:
        """Steps in which the stream passes over its images once (a sequential stream's last one may be short)."""
        stream, facts = self.asked.stream(stream_name), self.facts[stream_name]
        whole, rest = divmod(facts.num_images, stream.batch_global)
        return whole + (rest > 0 and isinstance(stream.order, Sequential))

    def check_world(self, world: int) -> None:
        """Raises PlanError where `world` ranks cannot share the batches evenly; names the nearest counts that can."""
        counts = [s.batch_global for s in self.asked.streams if not isinstance(s.order, Sequential)]
        check_world(world, counts)

    def rows(
        self, stream_name: str, step: int, rank: int = 0, world: int = 1, instead: Mapping[int, int] | None = None
    ) -> Rows:
        """This rank's contiguous share of the stream's global batch at `step`; `instead` maps ids of images that cannot
        be had to those that stand in for them."""
        stream, facts, key = self.asked.stream(stream_name), self.facts[stream_name], self._keys[stream_name]
        batch = stream.batch_global
        if isinstance(stream.order, Sequential):
            batch = max(0, min(batch, facts.num_images - step * batch))
        local = np.arange(batch * rank // world, batch * (rank + 1) // world, dtype=np.int64)
        positions = step * stream.batch_global + local
        columns = None
        match stream.order:
            case Balanced(classes_global, per_class):
                index = self._class_index[stream_name]
                ids, columns = balanced(local, step, index, classes_global, per_class, key)
            case Sequential():
                ids = positions if facts.ids is None else facts.ids[positions]
            case _:
                places = shuffled(positions, facts.num_images, stream.batch_global, key)
                ids = places if facts.ids is None else facts.ids[places]
        for lost, substitute in (instead or {}).items():
            ids = np.where(ids == lost, substitute, ids)
        image_keys = mix(key, positions)
        return Rows(
            stream=stream_name,
            step=step,
            positions=positions,
            ids=ids,
            labels=facts.labels[ids],
            columns=columns,
            keys=image_keys,
            views=tuple(_view_rows(view, ids, facts, image_keys) for view in stream.views),
        )

    def repeats(self, stream_name: str) -> str:
        """What is to be said of classes whose images repeat within a batch; "" where none do."""
        order, index = self.asked.stream(stream_name).order, self._class_index.get(stream_name)
        if (
            index is None
            or not isinstance(order, Balanced)
            or not (short := int((index.counts < order.per_class).sum()))
        ):
            return ""
        return (
            f"{short:,} of {len(index.counts):,} classes have fewer than {order.per_class} (the least "
            f"{int(index.counts.min())}), so their images repeat in a batch, cropped anew"
        )

    def masked_share(self, step: int, rank: int = 0, world: int = 1) -> float | None:
        """The share of this rank's copies at `step`, of views with a mask, that are masked; None where no view has
        one."""
        streams = [s.name for s in self.asked.streams if any(view.mask is not None for view in s.views)]
        views = [v for name in streams for v in self.rows(name, step, rank, world).views]
        greys = [v.greys for v in views if v.greys is not None]
        return float((np.concatenate(greys) >= 0).mean()) if greys else None

    def substitute(self, stream_name: str, lost: int, instead: Mapping[int, int]) -> int | None:
        """The next image after `lost` that the stream may draw, of the same label and not itself in `instead`; cyclic.
        None where there is no other."""
        facts = self.facts[stream_name]
        ids = np.arange(len(facts.sizes)) if facts.ids is None else facts.ids
        fitting = ids[(facts.labels[ids] == facts.labels[lost]) & ~np.isin(ids, [lost, *instead])]
        after = fitting[fitting > lost]
        return int(after[0]) if len(after) else int(fitting[0]) if len(fitting) else None

    def substitutes(self, stream_name: str, lost: list[int]) -> dict[int, int]:
        """For each of the images `lost` the one that `substitute` finds, where all of them are known beforehand. Raises
        PlanError where there is none for one of them."""
        facts = self.facts[stream_name]
        ids = np.arange(len(facts.sizes)) if facts.ids is None else facts.ids
        sound = ids[~np.isin(ids, lost)]
        by_label: dict[int, np.ndarray] = {}
        found = {}
        for i in lost:
            label = int(facts.labels[i])
            if label not in by_label:
                by_label[label] = sound[facts.labels[sound] == label]
            fitting = by_label[label]
            if not len(fitting):
                raise PlanError(f"stream {stream_name!r}: no image of class {label} can be used, image {i} among them")
            found[i] = int(fitting[np.searchsorted(fitting, i) % len(fitting)])
        return found

    def _check(self, stream: Stream, facts: StreamFacts) -> None:
        name, batch = stream.name, stream.batch_global
        if facts.num_images == 0:
            raise PlanError(f"stream {name!r} has no images to draw from")
        _check_labels(stream, facts)
        if isinstance(stream.order, Balanced):
            self._check_balanced(stream, stream.order, facts)
        elif not isinstance(stream.order, Sequential) and batch > facts.num_images:
            raise PlanError(f"stream {name!r}: a batch of {batch} needs as many images, there are {facts.num_images}")
        for view in stream.views:
            if view.mask is not None and facts.foreground is None:
                raise PlanError(f"view {view.name!r} has a mask, but nothing says what is foreground in its images")
            if isinstance(view.crop, Centre | FiveCrops):
                shortest = int(facts.sizes.min()) if view.crop.resize is None else view.crop.resize
                if shortest < view.size:
                    raise PlanError(
                        f"view {view.name!r} cuts {view.size} pixels from images whose shorter side is {shortest}: "
                        f"give {type(view.crop).__name__} a resize of {view.size} or more"
                    )

    def _check_balanced(self, stream: Stream, order: Balanced, facts: StreamFacts) -> None:
        ids = np.arange(len(facts.sizes)) if facts.ids is None else facts.ids
        index = ClassIndex.of(ids, facts.labels[ids], facts.num_classes)
        self._class_index[stream.name] = index
        assert stream.batch_global == order.classes_global * order.per_class, "batch_global disagrees with the order"
        if order.classes_global > facts.num_classes:
            raise PlanError(
                f"stream {stream.name!r} wants {order.classes_global} classes a batch, "
                f"the data has {facts.num_classes}: lower classes_global"
            )
        without = np.flatnonzero(index.counts == 0)
        if len(without):
            raise PlanError(
                f"stream {stream.name!r} wants labelled images of every class; class {without[0]} has none "
                f"({len(without)} of {facts.num_classes} classes have none): give labels of every class"
            )


def _check_labels(stream: Stream, facts: StreamFacts) -> None:
    labels = facts.labels if facts.ids is None else facts.labels[facts.ids]
    unlabelled = int((labels < 0).sum())
    if stream.every_image and unlabelled:
        raise PlanError(f"stream {stream.name!r}: {unlabelled} of its {len(labels)} images carry no label")
    missing = np.setdiff1d(np.arange(facts.num_classes), labels)
    if stream.every_class and len(missing):
        raise PlanError(
            f"stream {stream.name!r}: {len(missing)} of {facts.num_classes} classes have no labelled image, first "
            f"class {missing[0]}: give labels of every class"
        )


def check_world(world: int, counts: list[int]) -> None:
    """Raises PlanError unless `world` divides every one of `counts` (global rows a step)."""
    uneven = [n for n in counts if n % world]
    if uneven:
        fitting = [w for w in range(1, min(counts) + 1) if all(n % w == 0 for n in counts)]
        below = max((w for w in fitting if w < world), default=None)
        above = min((w for w in fitting if w > world), default=None)
        nearest = " or ".join(str(w) for w in (below, above) if w is not None)
        raise PlanError(f"batch {uneven[0]} does not divide by {world} ranks; nearest: {nearest}")


def _view_rows(view: View, ids: np.ndarray, facts: StreamFacts, image_keys: np.ndarray) -> ViewRows:
    copies = np.arange(view.copies)[:, None]
    keys = mix(image_keys[None, :], tag(view.name), copies).reshape(-1)
    begun = mix(keys)
    tables = tuple(
        op.parameters(uniforms(mixed_on(begun, tag(type(op).__name__), i), op.num_draws))
        for i, op in enumerate(view.ops)
    )
    box = boxes(view, np.tile(facts.sizes[ids], (view.copies, 1)), mixed_on(begun, tag("box")))
    greys = policy = None
    if view.mask is not None:
        assert facts.foreground is not None
        greys = _greys(view.mask, np.tile(facts.foreground[ids], view.copies), keys)
    if view.policy is not None:
        policy = view.policy.chosen(uniforms(mix(keys, tag("policy")), view.policy.NUM_DRAWS))
    return ViewRows(view, box, tables, greys, policy)


def _greys(mask: SaliencyMask, foreground: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """`ViewRows.greys` of copies with these shares of foreground, float64 [M], and keys, uint64 [M]."""
    u = uniforms(mix(keys, tag("mask")), 2)
    masked = (u[:, 0] < mask.p) & (foreground >= mask.least_foreground)
    return np.where(masked, np.floor(u[:, 1] * 256), -1).astype(np.int16)
