"""A run: a recipe's stages one after the other on this rank, each continued from wherever it was left.

A stage is done when its `result.json` is written; what later stages need of it is its last checkpoint, or what it
produced, named with its hash.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from signal import Signals
from typing import Any

import torch

from fastssl import dist
from fastssl.config.plain import to_plain
from fastssl.engine import replay
from fastssl.engine.claim import claim, finished
from fastssl.engine.job import Job
from fastssl.engine.produced import RowsSoFar
from fastssl.engine.same_everywhere import check_same_everywhere
from fastssl.engine.settings import How
from fastssl.engine.signals import Agreement, StopRequest
from fastssl.engine.step import default_how
from fastssl.engine.train import Trainer
from fastssl.engine.watchdog import Progress, Watchdog
from fastssl.errors import ConfigError, Stopped
from fastssl.evaluation import load_protocol
from fastssl.evaluation.subject import Subject
from fastssl.machine import keep_freed_memory, threads_per_rank, versions
from fastssl.methods.base import Artefact, Facts, Method, Stage
from fastssl.record.clock import Clock
from fastssl.record.recorder import Recorder, result_lines
from fastssl.run_dir.checkpoint import STATE, Checkpoints, verified_sha256
from fastssl.run_dir.files import CHECKPOINTS, PRODUCED, RESOLVED, RESULT, read_json
from fastssl.run_dir.lock import held
from fastssl.weights.read import BACKBONE, Weights, read_weights
from loaders.files import sha256_of, whole_file, write_file
from loaders.loader import Bound, Loader, bind
from loaders.plan.views import Sequential
from loaders.store import staging
from loaders.store.data import LABELLED, TRAIN, VALIDATION, DataSets, open_data, search_folders

_NUM_KEPT = 20  # a stage that produces has one epoch, so `checkpoint_every` alone might keep nothing on the way


def run(job: Job) -> dict[str, Any]:
    """Do, or finish, every stage of `job` on this rank; returns what `result.json` holds."""
    threads = threads_per_rank()
    torch.set_num_threads(threads)
    device = torch.device(job.device, dist.local_rank()) if job.device == "cuda" else torch.device("cpu")
    if device.type == "cpu":
        keep_freed_memory()
    data = _opened(job)
    check_same_everywhere(job, data)
    result = finished(job, data)
    if job.replay is not None:
        return _replayed(job, data, device, threads)
    if result is not None:
        if dist.is_main():
            print(f"finished: {job.recipe}, seed {job.seed}, in {job.out}")
            for line in result_lines(result, job.next_commands()):
                print(line.plain)
        return result

    with held(job.out), StopRequest() as stop:
        claim(job, data)
        results = _all_stages(job, data, device, threads, stop)
        if len(job.stages) == 1:
            return results[job.stages[0].name]
        result = {**results[job.stages[-1].name], "stages": results}
        if dist.is_main():
            write_file(job.out / RESULT, json.dumps(result, indent=2) + "\n")
        return result


def _all_stages(
    job: Job, data: DataSets, device: torch.device, threads: int, stop: StopRequest
) -> dict[str, dict[str, Any]]:
    """The result of each stage by name, each trained or produced where it is not done yet."""
    for later in job.stages[1:]:
        joined(job, later, data, {})  # what does not fit must not wait for the end of the stages before
    artefacts: dict[str, Artefact] = {}
    results: dict[str, dict[str, Any]] = {}
    for stage in job.stages:
        folder = job.folder(stage)
        inputs = _inputs(job, stage, artefacts)
        results[stage.name] = _StageRun(job, stage, folder, data, inputs, device, threads, stop).finish()
        if any(ref.stage == stage.name for later in job.stages for ref in later.needs.values()):
            artefacts[stage.name] = _made(stage, folder)
    return results


def _replayed(job: Job, data: DataSets, device: torch.device, threads: int) -> dict[str, Any]:
    """What became of the step that `job.replay` describes. Nothing in the run directory changes."""
    assert job.replay is not None
    name = read_json(job.replay)["stage"]
    (stage,) = (stage for stage in job.stages if stage.name == name)
    earlier = {ref.stage for ref in stage.needs.values() if ref.stage is not None}
    artefacts = {each.name: _made(each, job.folder(each)) for each in job.stages if each.name in earlier}
    inputs = _inputs(job, stage, artefacts)
    return _StageRun(job, stage, job.folder(stage), data, inputs, device, threads, StopRequest()).replay()


def _opened(job: Job) -> DataSets:
    """The job's data, from copies on this host where it asks for them; label lists stay beside the originals."""
    validation = job.held_out is None
    if job.stage_to is None:
        return open_data(job.data, validation=validation)
    copies = staging.stage(job.data, job.stage_to, _show_staging)
    return replace(open_data(copies, validation=validation), search=search_folders(job.data))


def _show_staging(file: str, done: int, total: int) -> None:
    """One line each tenth of a file: copies of hundreds of gigabytes take a while."""
    if dist.is_main() and done * 10 // total != max(0, done - (1 << 24)) * 10 // total:
        print(f"copying {file}: {100 * done // total} % of {total / 1e9:.1f} GB", flush=True)


def facts_of(data: DataSets, seed: int) -> Facts:
    """What a method may know of `data` before it is built."""
    labelled, train = data.get(LABELLED), data.sources.get(TRAIN)
    fingerprint, all_labelled = ("", True) if train is None else (train.fingerprint(), bool((train.labels >= 0).all()))
    one_set = data.get(LABELLED) is data.get("unlabelled")
    return Facts(
        labelled.num_classes, labelled.channels, seed, fingerprint, all_labelled, labelled.class_names, one_set
    )


def joined(job: Job, stage: Stage, data: DataSets, inputs: Mapping[str, Artefact]) -> tuple[Method, Bound]:
    """`stage`'s method, and its plan joined with `data`; nothing in `inputs` is opened, none need be there. Raises
    FastsslError or LoaderError where method, data and number of ranks do not fit."""
    method = stage.method.build(facts_of(data, job.seed), inputs)
    bound = bind(method.plan(), data)
    bound.plan.check_world(job.world)
    return method, bound


class _StageRun:
    """One stage on one rank, with what it needs around it."""

    def __init__(
        self,
        job: Job,
        stage: Stage,
        folder: Path,
        data: DataSets,
        inputs: Mapping[str, Artefact],
        device: torch.device,
        threads: int,
        stop: StopRequest,
    ):
        self.job, self.stage, self.folder, self.data = job, stage, folder, data
        self.device, self.threads, self.stop = device, threads, stop
        torch.manual_seed(job.seed)
        self.method, self.bound = joined(job, stage, data, inputs)
        self.protocols = stage.evaluate if VALIDATION in data.sources or job.held_out is not None else ()

    def finish(self) -> dict[str, Any]:
        """Train or produce what is not done yet; the stage's result."""
        done = self.folder / RESULT
        # One rank looks, so that none misses the barriers below because another was faster.
        if (result := dist.broadcast_object(read_json(done) if done.exists() else None)) is not None:
            return result
        with self._loader() as loader:
            result = self._produce(loader) if self.stage.do == "produce" else self._train(loader)
        if dist.is_main():
            write_file(done, json.dumps(result, indent=2) + "\n")
            if self.stage.do == "produce":
                shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)  # the rows that were kept on the way
        dist.barrier()
        return result

    def _loader(self) -> Loader:
        return Loader(
            self.bound,
            rank=dist.rank(),
            world=dist.world_size(),
            device=self.device,
            threads=self.threads,
            renderer=self.job.loader,
            replace_damaged=self.job.damaged == "replace",
            cache_bytes=int(self.job.cache_gib * 2**30),
        )

    def _train(self, loader: Loader) -> dict[str, Any]:
        trainer = self._trainer(loader, self.job.how or default_how(self.device))
        checkpoints = trainer.checkpoints
        damaged: list[str] = []
        if (state := checkpoints.load_newest(damaged.append)) is not None:
            trainer.load_state(state)
        elif self.job.init_from is not None and self.stage is self.job.stages[0]:
            self.method.start_from(trainer.nets, self._weights(self.job.init_from, damaged.append))

        clock, evaluations = Clock(), []

        def evaluate() -> dict[str, Any]:
            evaluations.append(self._evaluate(trainer))
            return evaluations[-1]

        with Recorder(self.folder, main=dist.is_main(), resume_step=trainer.step, log_to=self.job.log_to) as recorder:
            for text in damaged:
                recorder.warn(text)
            self._announce(recorder, trainer)
            if self.stage.evaluate and not self.protocols:
                recorder.warn("no validation images, so nothing is evaluated: give --data validation=PATH")
            with Watchdog(self.job.out, self.job.watchdog_s, lambda: Progress(trainer.step, clock.doing)):
                trainer.run(recorder, evaluate if self.protocols else None, clock, self.stop)
            scores = evaluations[-1] if evaluations else evaluate() if self.protocols else {}
            result = {
                **scores,
                "recipe": self.job.recipe,
                "stage": self.stage.name,
                "seed": self.job.seed,
                "steps": trainer.step,
                "command": self.job.command,
                "provenance": self._subject(trainer).provenance() if self.protocols else {},
                "replaced_images": self._replaced(loader),
                "versions": versions(),
            }
            recorder.finish(scores, self.job.next_commands())
        return result

    def _trainer(self, loader: Loader, how: How) -> Trainer:
        stays = self.stage.milestone_every
        every = None if stays is None else max(1, stays.steps(self.bound.plan.steps_per_epoch))
        checkpoints = Checkpoints(self.folder / CHECKPOINTS, self.stage.keep_checkpoints, every)
        skip_once = self.job.nonfinite == "skip-once"
        keeps_all = self.stage.name in self.job.with_room
        return Trainer(self.stage, self.method, loader, checkpoints, self.device, how, skip_once, keeps_all)

    def replay(self) -> dict[str, Any]:
        """Do the step that `job.replay` describes again, from the last checkpoint before it, or from the start."""
        assert self.job.replay is not None
        dump = read_json(self.job.replay)
        with self._loader() as loader:
            trainer = self._trainer(loader, "eager")
            if not replay.restored(trainer, dump["step"]) and self.job.init_from is not None:
                self.method.start_from(trainer.nets, self._weights(self.job.init_from, print))
            return replay.replay(trainer, dump)

    def _weights(self, source: Path, warn: Callable[[str], None]) -> Weights:
        """What `source` holds, and a line that names its layout."""
        weights = read_weights(weights_file(source, warn), self.job.unsafe_pickle)
        if dist.is_main():
            print(weights, flush=True)
        return weights

    def _replaced(self, loader: Loader) -> dict[str, dict[str, int]]:
        """{stream: {damaged id: id in its place}} over all ranks."""
        found = {}
        for stream, instead in loader.replaced.items():
            pairs = torch.tensor(list(instead.items()), dtype=torch.int64, device=self.device).reshape(-1, 2)
            found[stream] = {str(lost): substitute for lost, substitute in sorted(dist.gather_ragged(pairs).tolist())}
        return {stream: instead for stream, instead in found.items() if instead}

    def _subject(self, trainer: Trainer) -> Subject:
        return Subject(
            self.method,
            trainer.nets,
            self.data,
            device=self.device,
            threads=self.threads,
            renderer=self.job.loader,
            held_out=self.job.held_out,
        )

    def _evaluate(self, trainer: Trainer) -> dict[str, Any]:
        subject = self._subject(trainer)
        scores: dict[str, Any] = {}
        for protocol in self.protocols:
            scores |= load_protocol(protocol).evaluate(subject)
        return scores

    def _produce(self, loader: Loader) -> dict[str, Any]:
        """Store what the method says of every image of its first stream, in the stream's order; the stage's result.
        What is done is kept on the way, and at a stop."""
        nets = self.method.nets()
        self.method.load_inputs(nets)
        for module in nets.modules().values():
            module.to(self.device).eval()
        plan = self.bound.plan
        stream = plan.plan.streams[0].name
        total = plan.num_steps(stream)
        every = max(1, min(self.stage.checkpoint_every.steps(plan.steps_per_epoch), total // _NUM_KEPT))
        rows = RowsSoFar(Checkpoints(self.folder / CHECKPOINTS, self.stage.keep_checkpoints), self._origin())
        start, agreement = rows.resume(), Agreement()
        with torch.no_grad(), closing(loader.batches(start, total)) as batches:
            for step, batch in enumerate(batches, start):
                asked = agreement.exchange(self.stop.signum)
                if step > start and (asked or step % every == 0):
                    rows.keep(step)
                if asked:
                    agreement.close()
                    raise Stopped(f"kept what stage {self.stage.name} made and stopped after step {step} of {total}, "
                                  f"as {Signals(asked).name} asked; the same command continues", asked)  # fmt: skip
                rows.add(self.method.produce(nets, batch) | {"ids": batch.parts[stream].ids})
                batch.release()
        agreement.close()
        return dist.broadcast_object(self._stored(stream, rows.tensors()) if dist.is_main() else {})

    def _made_of(self) -> dict[str, Any]:
        """By what, and of what, this stage makes its rows."""
        return {
            "inputs": {name: artefact.sha256 for name, artefact in self.method.inputs.items()},
            "data": {name: source.fingerprint() for name, source in self.bound.sources.items()},
        }

    def _origin(self) -> dict[str, Any]:
        """`_made_of`, and all else that rows must have in common: settings, and which labels show."""
        visible = {name: subset.sha256 for name, subset in self.bound.visible.items()}
        return {**self._made_of(), "visible": visible, "about": to_plain(self.method.about())}

    def _stored(self, stream: str, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Write what was produced of the images of `stream`, in its order; the stage's result. The row of a damaged
        image that was replaced is its substitute's."""
        assert isinstance(self.bound.plan.plan.stream(stream).order, Sequential), "rows must be in the images' order"
        facts = self.bound.plan.facts[stream]
        ids = torch.arange(facts.num_images) if facts.ids is None else torch.from_numpy(facts.ids)
        replaced = ids != tensors["ids"]
        pairs = zip(ids[replaced].tolist(), tensors["ids"][replaced].tolist(), strict=True)
        instead = {str(lost): substitute for lost, substitute in pairs}
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_file(self.folder / PRODUCED) as file:
            torch.save(tensors | {"ids": ids}, file)
        of_this_file = {"sha256": sha256_of(self.folder / PRODUCED), "num_images": len(self.bound.sources[stream])}
        return {
            "stage": self.stage.name,
            "images": len(ids),
            "produced": sorted(tensors),
            "made_of": of_this_file | self._made_of(),
            "replaced_images": {stream: instead} if instead else {},
        }

    def _announce(self, recorder: Recorder, trainer: Trainer) -> None:
        plan = self.bound.plan.plan
        table: dict[str, object] = {}
        for stream in plan.streams:
            source, subset = self.bound.sources[stream.name], self.bound.subsets[stream.name]
            table[stream.name] = (
                f"{source.name}: {subset.name}, {subset.count:,} images; {stream.batch_global:,} a step"
                + (f", {stream.batch_global // self.job.world:,} a rank" if self.job.world > 1 else "")
            )
            if (masks := self.bound.masks.get(stream.name)) is not None:
                table[f"{stream.name} masks"] = f"{masks.name}: {masks.about}"
        num_parameters = sum(p.numel() for p in trainer.nets.online.parameters())
        table["network"] = f"{num_parameters:,} parameters, {self.method.config.precision}"
        table["ranks"] = f"{self.job.world} x {self.threads} threads, {self.device.type}"
        table["step"] = trainer.training_step.how
        table["length"] = f"{trainer.horizon.total_steps:,} steps, {trainer.horizon.steps_per_epoch:,} an epoch"
        if trainer.step:
            table["continues"] = f"from step {trainer.step:,}"
        table["directory"] = str(self.folder)
        stage = f", stage {self.stage.name}" if len(self.job.stages) > 1 else ""
        recorder.announce(
            f"{self.job.recipe}{stage}, seed {self.job.seed}", table, total_steps=trainer.horizon.total_steps
        )


def _inputs(job: Job, stage: Stage, artefacts: Mapping[str, Artefact]) -> dict[str, Artefact]:
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


def _made(stage: Stage, folder: Path) -> Artefact:
    """What `stage` left for later ones. Raises CheckpointError where it is damaged."""
    if stage.do == "produce":
        return Artefact(folder / PRODUCED, sha256_of(folder / PRODUCED))
    newest = Checkpoints(folder / CHECKPOINTS).newest()
    return Artefact(newest / STATE, verified_sha256(newest))
