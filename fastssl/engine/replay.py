"""A step that was not finite, done again and looked into: `fastssl replay DUMP`.

The steps between the last checkpoint and it are done again too; randomness is a function of the step, so on as many
ranks of the same kind they come out the same, bit for bit, where the run itself was eager.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from torch import Tensor, nn

from fastssl import dist
from fastssl.engine.train import Trainer
from fastssl.run_dir.checkpoint import CheckpointError
from loaders.batch import Batch


def restored(trainer: Trainer, step: int) -> bool:
    """Bring `trainer` to the newest whole checkpoint from before `step`, if there is one."""
    for saved in reversed([s for s in trainer.checkpoints.steps() if s <= step]):
        try:
            trainer.load_state(trainer.checkpoints.load(saved))
            return True
        except CheckpointError as error:
            _say(f"note: {error}; going further back")
    return False


def replay(trainer: Trainer, dump: dict[str, Any]) -> dict[str, Any]:
    """Step up to the step that `dump` describes, or to the first before it that is not finite; print, and return by
    "found", what was not finite there: images, modules, parts of the loss, gradients, weights, each where it first
    showed, on the first rank where anything did."""
    start, target, world = trainer.step, dump["step"], dist.world_size()
    origin = f"checkpoint {trainer.checkpoints.path(start)}" if start else "the initial weights"
    _say(f"from {origin} by eager steps to step {target + 1}; ranks: {world}")
    if world != dump["ranks"]:
        _say(f"note: the run had {dump['ranks']} ranks: the same images, other rounding")
    found: list[str] = []
    trainer.prepare(_say)
    with closing(trainer.loader.batches(start, target + 1)) as batches:
        for step, batch in enumerate(batches, start=start):
            found = _looked_into(trainer, step, batch)
            batch.release()
            everyone = dist.gather_objects((socket.gethostname(), found))
            rank = next((rank for rank, (_, theirs) in enumerate(everyone) if theirs), None)
            if rank is not None:
                host, found = everyone[rank]
                _say(f"step {step + 1}, rank {rank} on {host}:")
                for line in found:
                    _say(f"  {line}")
                return {"step": step, "rank": rank, "found": found}
    _say(f"step {target + 1} and all before it are finite: on this machine, eager, it does not come about again")
    return {"step": None, "rank": None, "found": []}


def _looked_into(trainer: Trainer, step: int, batch: Batch) -> list[str]:
    """Do the step; what of this rank's was not finite, in the order in which it came about."""
    found = [
        f"images of {stream}, view {view}: {_amount(x)}"
        for stream, part in batch.parts.items()
        for view, x in part.x.items()
        if not x.isfinite().all()
    ]
    with _noted_outputs(trainer) as outputs, _noted_gradients(trainer) as gradients:
        parts = trainer.training_step(step, trainer.horizon, batch)
    trainer.step = step + 1
    values = {name: value.item() for name, value in sorted(parts.items())}
    losses = [name for name, value in parts.items() if not value.isfinite()]
    weights = [(name, p) for name, p in trainer.nets.online.named_parameters() if not p.isfinite().all()]
    if outputs:
        found.append(f"module {outputs[0]}, the first of {len(outputs)}")
    if losses:
        found.append("loss: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
    if gradients:
        found.append(f"gradient of {gradients[0]}, the first of {len(gradients)}")
    if weights:
        name, weight = weights[0]
        found.append(f"weights of {name} after the step: {_amount(weight)}, the first of {len(weights)}")
    return found


@contextmanager
def _noted_outputs(trainer: Trainer) -> Iterator[list[str]]:
    """Fills with the modules whose output is not finite, innermost first, in the order in which they ran."""
    found: list[str] = []

    def hook(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            bad = [x for x in _tensors(output) if not x.isfinite().all()]
            if bad:
                found.append(f"{name} ({type(module).__name__}): {_amount(bad[0])}")

        return look

    handles = [
        module.register_forward_hook(hook(f"{kind}.{name}" if name else kind))
        for kind, net in trainer.nets.modules().items()
        for name, module in net.named_modules()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _noted_gradients(trainer: Trainer) -> Iterator[list[str]]:
    """Fills with the weights whose gradient is not finite on this rank, from the loss down."""
    found: list[str] = []

    def hook(name: str) -> Any:
        def look(gradient: Tensor) -> None:
            if not gradient.isfinite().all():
                found.append(f"{name}: {_amount(gradient)}")

        return look

    named = trainer.nets.online.named_parameters()
    handles = [p.register_hook(hook(name)) for name, p in named if p.requires_grad]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> list[Tensor]:
    """The floating-point tensors in a module's output."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [x for each in value for x in _tensors(each)] if isinstance(value, list | tuple) else []


def _amount(x: Tensor) -> str:
    return f"{int(x.isnan().sum())} nan and {int(x.isinf().sum())} inf of {x.numel()}"


def _say(text: str) -> None:
    if dist.is_main():
        print(text, flush=True)
