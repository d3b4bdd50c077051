"""The training loop: fetch, loss, backward, step, record; the same for every method and any number of ranks.

Between logging steps the loop waits for the device no further than for the step before the last, and for the disk not
at all. What must survive a stop is in
`Trainer.state`; everything else is a function of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from signal import Signals
from typing import Any

import torch
from torch import Tensor

from fastssl import dist
from fastssl.config.plain import to_plain
from fastssl.engine import stragglers
from fastssl.engine.nonfinite import FirstNotFinite, LeftOut, describe
from fastssl.engine.settings import How
from fastssl.engine.signals import Agreement, StopRequest
from fastssl.engine.step import TrainingStep
from fastssl.errors import ConfigError, FastsslError, Stopped
from fastssl.methods.base import Horizon, Method, Span, Stage
from fastssl.optim.fused import fuse
from fastssl.record.clock import Clock
from fastssl.record.recorder import Recorder
from fastssl.run_dir.checkpoint import CheckpointError, Checkpoints, failing_together
from fastssl.run_dir.saver import Saver
from loaders.batch import Batch
from loaders.loader import Loader

Evaluate = Callable[[], dict[str, Any]]

SAVE_FAILED = 1 << 8  # what a rank tells the others where it cannot go on; smaller: the signal that asked to stop


class TrainingDiverged(FastsslError):
    """The loss is no longer a finite number."""


class Trainer:
    """One training stage on one rank. With `skip_once`, the first step whose loss is not finite is left out."""

    def __init__(
        self,
        stage: Stage,
        method: Method[Any, Any],
        loader: Loader,
        checkpoints: Checkpoints,
        device: torch.device,
        how: How = "eager",
        skip_once: bool = False,
        keeps_all: bool = False,
    ):
        self.stage, self.method, self.loader, self.checkpoints = stage, method, loader, checkpoints
        self.device = device
        plan = loader.bound.plan
        self.horizon = Horizon(plan.steps_per_epoch, stage.length.steps(plan.steps_per_epoch))
        self.images_per_step = plan.asked.stream(plan.asked.epoch_of).batch_global
        self.nets = method.nets()
        method.load_inputs(self.nets)
        for name, module in self.nets.modules().items():
            module.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            module.train(name != "frozen")
        self.optimizer = method.optimizer(self.nets)
        self.training_step = TrainingStep(stage, how, method, self.nets, self.optimizer, device, keeps_all)
        self.scaler = self.training_step.scaler
        if skip_once and self.scaler.is_enabled():
            raise ConfigError("--nonfinite skip-once: fp16 leaves out steps by itself, as often as it must")
        self.saver = Saver(checkpoints)
        self.step = 0  # optimiser steps done
        self._not_finite = FirstNotFinite(self.horizon.total_steps, device)
        self._left_out = LeftOut(self.nets, self.optimizer, device) if skip_once else None
        self._saves = [span for span in (stage.checkpoint_every, stage.milestone_every) if span is not None]
        self._num_logged = 0
        self._num_replaced = sum(map(len, loader.replaced.values()))  # damaged images that were listed, or are named

    def state(self) -> dict[str, Any]:
        """Tensors and plain types: all that a later process needs to continue bitwise."""
        return {
            "step": self.step,
            "about": to_plain(self.method.about()),
            "nets": {name: module.state_dict() for name, module in self.nets.saved().items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "num_skipped": int(self.training_step.num_skipped),
            "num_left_out": 0 if self._left_out is None else int(self._left_out.num_steps),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.step = state["step"]
        for name, module in self.nets.saved().items():
            module.load_state_dict(state["nets"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        fuse(self.optimizer, self.device)
        self.scaler.load_state_dict(state["scaler"])
        self.training_step.num_skipped.fill_(state["num_skipped"])
        if self._left_out is not None:
            self._left_out.num_steps.fill_(state["num_left_out"])

    def run(self, recorder: Recorder, evaluate: Evaluate | None, clock: Clock, stop: StopRequest | None = None) -> None:
        """Train from `self.step` to the end of the stage, evaluating now and then where `evaluate` is given.

        Raises on every rank alike: Stopped once a signal that any rank's `stop` has seen led to a checkpoint,
        CheckpointError where one cannot be written, TrainingDiverged.
        """
        stop = stop or StopRequest()
        total = self.horizon.total_steps
        self._check_ranks_agree()
        if evaluate is not None and self._lacks_evaluation(recorder):
            self._evaluate(evaluate, recorder)
        if self.step >= total:
            return
        with clock.paused():
            self.prepare(recorder.warn)
        agreement = Agreement()

        with closing(self.loader.batches(self.step, total)) as batches, closing(self.saver):
            while self.step < total:
                with clock.waiting():
                    batch = next(batches)
                parts = self._stepped(batch)
                self.step += 1
                clock.step(self.images_per_step)
                if self._due(self.stage.log_every) or self.step == 1:
                    self._stop_if_diverged()
                    recorder.log(self._record(batch, parts, clock, recorder))
                    self._warn_of_replaced(recorder)
                batch.release()
                asked = agreement.exchange(SAVE_FAILED if self.saver.failed else stop.signum)
                evaluates = evaluate if self._due(self.stage.evaluate_every) else None
                if asked or evaluates or self._due(*self._saves):
                    with clock.paused():
                        self._stop_if_diverged(and_weights=True)
                        self._save()
                        if evaluates:
                            self._evaluate(evaluates, recorder)
                if asked:
                    break
            agreement.close()
            self._finish_saving()
        if self.step < total:
            raise Stopped(f"saved and stopped after step {self.step} of {total}, as {Signals(asked).name} asked; "
                          "the same command continues", asked)  # fmt: skip

    def _evaluate(self, evaluate: Evaluate, recorder: Recorder) -> None:
        """Evaluate and record it, once the checkpoint is on disk: whatever ends the process then takes no step with
        it."""
        self._finish_saving()
        recorder.evaluation({"step": self.step, "epoch": self.epoch, "evaluation": evaluate()})

    def _lacks_evaluation(self, recorder: Recorder) -> bool:
        """Whether the process that wrote this checkpoint ended before the evaluation that was due then."""
        due = self.step > 0 and self._due(self.stage.evaluate_every)
        return due and dist.broadcast_object(recorder.evaluated_step) != self.step

    def _stepped(self, batch: Batch) -> dict[str, Tensor]:
        """Do one step; the parts of its loss."""
        if self._left_out is not None:
            self._left_out.remember()
        parts = self.training_step(self.step, self.horizon, batch)
        undone = None if self._left_out is None else self._left_out.undo_if_not_finite(parts["total"])
        if not self.scaler.is_enabled():  # fp16's skips the steps whose gradients overflow
            self._not_finite.note_loss(self.step, parts, forgiven=undone)
        return parts

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self.step / self.horizon.steps_per_epoch

    def _check_ranks_agree(self) -> None:
        """Raise CheckpointError, on every rank, where ranks have loaded different checkpoints: their collectives would
        not match."""
        first, last = dist.least_over_ranks(torch.tensor([self.step, -self.step], device=self.device)).tolist()
        if first != -last:
            raise CheckpointError(
                f"some ranks would start after step {first}, others after step {-last}: --out must be one folder that "
                "every host sees"
            )

    def _due(self, *every: Span) -> bool:
        """Whether something done so often, and at the end, is due now that `self.step` steps are done."""
        periods = [max(1, span.steps(self.horizon.steps_per_epoch)) for span in every]
        return self.step == self.horizon.total_steps or any(self.step % period == 0 for period in periods)

    def prepare(self, warn: Callable[[str], None]) -> None:
        """Average gradients over ranks and compile, on a throw-away batch; `warn` is told what stood in the way."""
        if not self.training_step.must_prepare:
            return
        with closing(self.loader.batches(self.step, self.step + 1)) as batches:
            batch = next(batches)
            self.training_step.prepare(batch, warn)
            batch.release()

    def _record(self, batch: Batch, parts: dict[str, Tensor], clock: Clock, recorder: Recorder) -> dict[str, Any]:
        with torch.no_grad():
            values = dict(parts) | self.method.metrics(self.nets, batch, self.loader.bound.truth(batch))
        masked = self.loader.bound.plan.masked_share(self.step - 1, self.loader.rank, self.loader.world)
        if masked is not None:
            values["masked_share"] = torch.tensor(masked, dtype=torch.float64, device=self.device)
        names = sorted(values)
        stacked = dist.mean_over_ranks(torch.stack([values[name].detach().double() for name in names]))
        values = dict(zip(names, stacked.tolist(), strict=True))
        rates = {f"lr_{i}" if i else "lr": lr for i, lr in enumerate(self.method.rates(self.step - 1, self.horizon))}
        if len(set(rates.values())) == 1:
            rates = {"lr": rates["lr"]}
        if (decay := self.method.decay(self.step - 1, self.horizon)) is not None:
            rates["weight_decay"] = decay
        if self.scaler.is_enabled():
            rates["skipped_steps"] = int(self.training_step.num_skipped)
        if self._left_out is not None:
            rates["left_out_steps"] = int(self._left_out.num_steps)
        time: dict[str, Any] = clock.window() | {"eta_s": clock.eta_s(self.horizon.total_steps - self.step)}
        self._num_logged += 1
        if self._num_logged % stragglers.EVERY == 0:
            ranks, slow = stragglers.side_by_side(clock.paces())
            time |= {"ranks": ranks} if ranks else {}
            if slow:
                recorder.warn(slow)
        return {"step": self.step, "epoch": self.epoch, "loss": values.pop("total"), **values, **rates, "time": time}

    def _warn_of_replaced(self, recorder: Recorder) -> None:
        """Name each damaged image once, and how many there are."""
        replaced = [(stream, lost) for stream, instead in self.loader.replaced.items() for lost in instead]
        for number, (stream, lost) in enumerate(replaced[self._num_replaced :], start=self._num_replaced + 1):
            name = self.loader.bound.sources[stream].name_of(lost)
            recorder.warn(f"{stream}: image {lost} ({name}) cannot be decoded and is replaced; {number} so far")
        self._num_replaced = len(replaced)

    def _stop_if_diverged(self, and_weights: bool = False) -> None:
        """Raise TrainingDiverged, on every rank, where any rank has met what is not finite, or where under fp16 ever
        smaller scales have not kept gradients finite."""
        if and_weights:
            self._not_finite.note_weights(self.step - 1, self.nets)
        step = int(dist.least_over_ranks(self._not_finite.step))
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:
            step = min(step, self.step - 1)
        if step >= self.horizon.total_steps:
            return
        plan = self.loader.bound.plan
        rows = [plan.rows(stream.name, step) for stream in plan.asked.streams]
        ids = "; ".join(f"{r.stream} {', '.join(map(str, r.ids[:8].tolist()))}, ..." for r in rows)
        self._finish_saving()
        saved = self.checkpoints.steps()
        last = f"the last good checkpoint is {self.checkpoints.path(saved[-1])}" if saved else "no checkpoint was made"
        folder = self.checkpoints.folder.parent
        described = describe(folder, step, self._not_finite, self.stage, plan, self.checkpoints)
        raise TrainingDiverged(
            f"step {step + 1} gave a loss or weights that are not finite (image ids: {ids}); {last}; "
            f"try a lower learning rate or --set precision=fp32; fastssl replay {described} does the step again"
        )

    def _save(self) -> None:
        """Begin to write a checkpoint, once the one before is written."""
        self._finish_saving()
        if dist.is_main():
            self.saver.save(self.step, self.state())

    def _finish_saving(self) -> None:
        """Wait for the checkpoint that is being written. Raises CheckpointError, on every rank, where it failed."""
        with failing_together():
            self.saver.finish()
