"""A stage that produces: what its method says of every image, stored for later stages."""

from __future__ import annotations

from contextlib import closing
from signal import Signals
from typing import Any

import torch

from fastssl import dist
from fastssl.config.plain import to_plain
from fastssl.engine.join import Joined
from fastssl.engine.produced import RowsSoFar
from fastssl.engine.signals import Agreement
from fastssl.errors import Stopped
from fastssl.methods.base import Nets
from fastssl.run_dir.files import PRODUCED
from loaders.files import sha256_of, whole_file
from loaders.plan.views import Sequential

_NUM_KEPT = 20  # a stage that produces has one epoch, so `checkpoint_every` alone might keep nothing on the way


def produce(at: Joined) -> dict[str, Any]:
    """Store what the method says of every image of its first stream, in the stream's order; the stage's result. What is
    done is kept on the way, and at a stop. Raises Stopped."""
    nets = at.method.nets()
    at.method.load_inputs(nets)
    for module in nets.modules().values():
        module.to(at.here.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    rows = RowsSoFar(at.checkpoints, _origin(at))
    _fill(rows, at, nets)
    return dist.broadcast_object(_stored(at, rows.tensors()) if dist.is_main() else {})


@torch.no_grad()
def _fill(rows: RowsSoFar, at: Joined, nets: Nets[Any]) -> None:
    """Add the rows of every batch that is not in them yet."""
    stream = at.bound.plan.asked.streams[0].name
    total = at.bound.plan.num_steps(stream)
    every = max(1, min(at.stage.checkpoint_every.steps(at.bound.plan.steps_per_epoch), total // _NUM_KEPT))
    start, agreement = rows.resume(), Agreement()
    with at.loader() as loader, closing(loader.batches(start, total)) as batches:
        for step, batch in enumerate(batches, start):
            asked = agreement.exchange(at.here.stop.signum)
            if step > start and (asked or step % every == 0):
                rows.keep(step)
            if asked:
                agreement.close()
                raise Stopped(f"kept what stage {at.stage.name} made and stopped after step {step} of {total}, "
                              f"as {Signals(asked).name} asked; the same command continues", asked)  # fmt: skip
            rows.add(at.method.produce(nets, batch) | {"ids": batch.parts[stream].ids})
            batch.release()
    agreement.close()


def _made_of(at: Joined) -> dict[str, Any]:
    """By what, and of what, the stage makes its rows."""
    return {
        "inputs": {name: artefact.sha256 for name, artefact in at.method.inputs.items()},
        "data": {name: source.fingerprint() for name, source in at.bound.sources.items()},
    }


def _origin(at: Joined) -> dict[str, Any]:
    """`_made_of`, and all else that rows must have in common: settings, and which labels show."""
    visible = {name: subset.sha256 for name, subset in at.bound.visible.items()}
    return {**_made_of(at), "visible": visible, "about": to_plain(at.method.about())}


def _stored(at: Joined, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Write what was produced of the images of the first stream, in its order; the stage's result. The row of a damaged
    image that was replaced is its substitute's."""
    stream = at.bound.plan.asked.streams[0]
    assert isinstance(stream.order, Sequential), "rows must be in the images' order"
    facts = at.bound.plan.facts[stream.name]
    ids = torch.arange(facts.num_images) if facts.ids is None else torch.from_numpy(facts.ids)
    replaced = ids != tensors["ids"]
    pairs = zip(ids[replaced].tolist(), tensors["ids"][replaced].tolist(), strict=True)
    instead = {str(lost): substitute for lost, substitute in pairs}
    path = at.folder / PRODUCED
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        torch.save(tensors | {"ids": ids}, file)
    of_this_file = {"sha256": sha256_of(path), "num_images": len(at.bound.sources[stream.name])}
    return {
        "stage": at.stage.name,
        "images": len(ids),
        "produced": sorted(tensors),
        "made_of": of_this_file | _made_of(at),
        "replaced_images": {stream.name: instead} if instead else {},
    }
