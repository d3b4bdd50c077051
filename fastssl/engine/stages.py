"""A run: a recipe's stages one after the other on this rank, each continued from wherever it was left.

A run with one stage keeps everything in the run directory; with several, each stage has a directory of its name there.
A stage is done when its `result.json` is written; what later stages need of it is its last checkpoint, or what it
produced, named with its hash.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fastssl import dist
from fastssl.clock import Clock
from fastssl.config import ConfigError, differences, to_plain
from fastssl.engine.checkpoint import STATE, Checkpoints, read_json, read_state, sha256_of, write_atomically
from fastssl.engine.train import Trainer
from fastssl.evaluation import load_protocol
from fastssl.evaluation.subject import Subject
from fastssl.methods.base import Artefact, Facts, Method, Ref, Stage, Stages
from fastssl.record import Recorder
from loaders.loader import Bound, Loader, bind
from loaders.store import staging
from loaders.store.data import LABELLED, VALIDATION, DataSets, open_data, search_folders

RESOLVED, RESULT, PRODUCED = "resolved.json", "result.json", "produced.pt"
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


@dataclass(frozen=True)
class Job:
    """Everything that decides what a run computes, the same on every rank."""

    recipe: str
    stages: Stages
    changes: tuple[str, ...]  # what the user set, from which the recipe resolves to `stages`
    data: tuple[str, ...]
    out: Path
    seed: int
    device: Literal["cpu", "cuda"]
    world: int
    loader: str = "auto"
    resume: Literal["auto", "never"] = "auto"
    init_from: Path | None = None
    stage_to: Path | None = None  # where this host keeps copies of the data; None: read in place
    command: str = ""

    def __post_init__(self) -> None:
        for name in {name for stage in self.stages for name in stage.evaluate}:
            load_protocol(name)  # a name that is unknown must not wait for the end of training


def threads_per_rank() -> int:
    """CPU threads of this rank: an equal share of what the processes of this host may use."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def keep_freed_memory() -> None:
    """Let this process keep what it frees. glibc returns large blocks to the kernel, which hands them out again page
    by page, zeroed: a fifth to a quarter of a CPU training step. Where malloc is not glibc's, nothing changes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def run(job: Job) -> dict[str, Any]:
    """Do, or finish, every stage of `job` on this rank; returns what `result.json` holds."""
    threads = threads_per_rank()
    torch.set_num_threads(threads)
    device = torch.device(job.device, dist.local_rank()) if job.device == "cuda" else torch.device("cpu")
    if device.type == "cpu":
        keep_freed_memory()
    data = _opened(job)
    _claim(job, data)
    if (job.out / RESULT).exists():
        return _say_finished(job)

    artefacts: dict[str, Artefact] = {}
    results: dict[str, dict[str, Any]] = {}
    for stage in job.stages:
        folder = stage_folder(job, stage.name)
        inputs = {name: _input(ref, artefacts) for name, ref in stage.needs.items()}
        results[stage.name] = _StageRun(job, stage, folder, data, inputs, device, threads).finish()
        if any(ref.stage == stage.name for later in job.stages for ref in later.needs.values()):
            made = folder / PRODUCED if stage.do == "produce" else _checkpoints(folder).newest() / STATE
            artefacts[stage.name] = Artefact(made, sha256_of(made))
    if len(job.stages) == 1:
        return results[job.stages[0].name]
    result = {**results[job.stages[-1].name], "stages": results}
    if dist.is_main():
        write_atomically(job.out / RESULT, json.dumps(result, indent=2) + "\n")
    return result


def _opened(job: Job) -> DataSets:
    """The job's data, from copies on this host where it asks for them; label lists stay beside the originals."""
    if job.stage_to is None:
        return open_data(job.data)
    copies = staging.stage(job.data, job.stage_to, _show_staging)
    return replace(open_data(copies), search=search_folders(job.data))


def _show_staging(file: str, done: int, total: int) -> None:
    """One line each tenth of a file: copies of hundreds of gigabytes take a while."""
    if dist.is_main() and done * 10 // total != max(0, done - (1 << 24)) * 10 // total:
        print(f"copying {file}: {100 * done // total} % of {total / 1e9:.1f} GB", flush=True)


def stage_folder(job: Job, name: str) -> Path:
    """Where the stage called `name` keeps its files."""
    return job.out if len(job.stages) == 1 else job.out / name


def facts_of(data: DataSets, seed: int) -> Facts:
    """What a method may know of `data` before it is built."""
    labelled = data.get(LABELLED)
    return Facts(labelled.num_classes, labelled.channels, seed)


def versions() -> dict[str, str]:
    """What this process computes with."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "machine": platform.machine(),
        "commit": commit.stdout.strip() or "unknown",
    }


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
    ):
        self.job, self.stage, self.folder, self.data = job, stage, folder, data
        self.device, self.threads = device, threads
        torch.manual_seed(job.seed)
        self.method: Method = stage.method.build(facts_of(data, job.seed), inputs)
        self.bound: Bound = bind(self.method.plan(), data)
        self.protocols = stage.evaluate if VALIDATION in data.sources else ()

    def finish(self) -> dict[str, Any]:
        """Train or produce what is not done yet; the stage's result."""
        done = self.folder / RESULT
        if done.exists():
            return read_json(done)
        with self._loader() as loader:
            result = self._produce(loader) if self.stage.do == "produce" else self._train(loader)
        if dist.is_main():
            write_atomically(done, json.dumps(result, indent=2) + "\n")
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
        )

    def _train(self, loader: Loader) -> dict[str, Any]:
        checkpoints = _checkpoints(self.folder, self.stage.keep_checkpoints)
        trainer = Trainer(self.stage, self.method, loader, checkpoints, self.device)
        damaged: list[str] = []
        if (state := checkpoints.load_newest(damaged.append)) is not None:
            trainer.load_state(state)
        elif self.job.init_from is not None and self.stage is self.job.stages[0]:
            _load_weights(trainer.nets.online, self.job.init_from, damaged.append)

        clock, evaluations = Clock(), []

        def evaluate() -> dict[str, Any]:
            evaluations.append(self._evaluate(trainer))
            return evaluations[-1]

        with Recorder(self.folder, main=dist.is_main(), resume_step=trainer.step) as recorder:
            for text in damaged:
                recorder.warn(text)
            self._announce(recorder, trainer)
            if self.stage.evaluate and not self.protocols:
                recorder.warn("no validation images, so nothing is evaluated: give --data validation=PATH")
            trainer.run(recorder, evaluate if self.protocols else None, clock)
            scores = evaluations[-1] if evaluations else evaluate() if self.protocols else {}
            result = {
                **scores,
                "recipe": self.job.recipe,
                "stage": self.stage.name,
                "seed": self.job.seed,
                "steps": trainer.step,
                "command": self.job.command,
                "provenance": self._subject(trainer).provenance() if self.protocols else {},
                "versions": versions(),
            }
            recorder.finish(scores, next_commands(self.job))
        return result

    def _subject(self, trainer: Trainer) -> Subject:
        return Subject(self.method, trainer.nets, self.data, device=self.device, threads=self.threads)

    def _evaluate(self, trainer: Trainer) -> dict[str, Any]:
        subject = self._subject(trainer)
        scores: dict[str, Any] = {}
        for protocol in self.protocols:
            scores |= load_protocol(protocol).evaluate(subject)
        return scores

    def _produce(self, loader: Loader) -> dict[str, Any]:
        """Store what the method says of every image of its first stream, in the stream's order."""
        nets = self.method.nets()
        for module in nets.modules().values():
            module.to(self.device).eval()
        stream = self.bound.plan.plan.streams[0].name
        found: dict[str, list[torch.Tensor]] = {}
        with torch.no_grad():
            for batch in loader.batches(0, self.bound.plan.num_steps(stream)):
                rows = self.method.produce(nets, batch) | {"ids": batch.parts[stream].ids}
                for name, values in rows.items():
                    found.setdefault(name, []).append(dist.gather_ragged(values).cpu())
                batch.release()
        tensors = {name: torch.cat(values) for name, values in found.items()}
        if dist.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            partial = self.folder / f".{PRODUCED}.partial"
            torch.save(tensors, partial)
            partial.replace(self.folder / PRODUCED)
        dist.barrier()
        return {"stage": self.stage.name, "images": len(tensors["ids"]), "produced": sorted(tensors)}

    def _announce(self, recorder: Recorder, trainer: Trainer) -> None:
        plan = self.bound.plan.plan
        table: dict[str, object] = {}
        for stream in plan.streams:
            source, subset = self.bound.sources[stream.name], self.bound.subsets[stream.name]
            table[stream.name] = (
                f"{source.name}: {subset.name}, {subset.count:,} images; {stream.batch_global:,} a step"
                + (f", {stream.batch_global // self.job.world:,} a rank" if self.job.world > 1 else "")
            )
        num_parameters = sum(p.numel() for p in trainer.nets.online.parameters())
        table["network"] = f"{num_parameters:,} parameters, {self.method.config.precision}"
        table["ranks"] = f"{self.job.world} x {self.threads} threads, {self.device.type}"
        table["length"] = f"{trainer.horizon.total_steps:,} steps, {trainer.horizon.steps_per_epoch:,} an epoch"
        if trainer.step:
            table["continues"] = f"from step {trainer.step:,}"
        table["directory"] = str(self.folder)
        stage = f", stage {self.stage.name}" if len(self.job.stages) > 1 else ""
        recorder.announce(
            f"{self.job.recipe}{stage}, seed {self.job.seed}", table, total_steps=trainer.horizon.total_steps
        )


def next_commands(job: Job) -> list[str]:
    """What one would type next."""
    data = "".join(f" --data {spec}" for spec in job.data if spec != "digits")
    return [f"fastssl evaluate {job.out} --protocol knn{data}", f"fastssl embed {job.out}{data}"]


def _claim(job: Job, data: DataSets) -> None:
    """Write `resolved.json`, or check that the run begun there is this one. Raises ConfigError where it is another."""
    resolved = {
        "recipe": job.recipe,
        "seed": job.seed,
        "stages": to_plain(job.stages),
        "data": {key: source.fingerprint() for key, source in sorted(data.sources.items())},
    }
    path = job.out / RESOLVED
    if path.exists() and job.resume == "auto" and _has_work(job.out):
        there = read_json(path)
        changed = differences({key: there.get(key) for key in resolved}, json.loads(json.dumps(resolved)))
        if changed:
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            raise ConfigError(
                f"{job.out} holds another run ({'; '.join(changed[:3])}{more}): choose another --out, or run the "
                "command it was made with"
            )
        before = there["run"]["threads"], there["run"]["world"]
        if before != (threads_per_rank(), job.world) and dist.is_main():
            print(f"note: continued on {job.world} ranks of {threads_per_rank()} threads; before {before[1]} of "
                  f"{before[0]}: the same images, other rounding", flush=True)  # fmt: skip
    dist.barrier()  # every rank has compared before anything is written
    if dist.is_main():
        run_facts = {
            "command": job.command,
            "changes": job.changes,
            "data": job.data,
            "world": job.world,
            "threads": threads_per_rank(),
        }
        text = json.dumps({**resolved, "run": run_facts, "versions": versions()}, indent=2)
        try:
            job.out.mkdir(parents=True, exist_ok=True)
            if job.resume == "never":
                _clear(job)
            write_atomically(path, text + "\n")
        except OSError as error:
            raise ConfigError(f"--out {job.out} cannot be written: {error.strerror}") from error
    dist.barrier()


def _has_work(out: Path) -> bool:
    """Whether a run in `out` has come far enough to be worth keeping."""
    patterns = ("**/checkpoints/step-*", f"**/{RESULT}", f"**/{PRODUCED}")
    return any(True for pattern in patterns for _ in out.glob(pattern))


def _clear(job: Job) -> None:
    """Remove what a run would continue from."""
    for folder in {job.out, *(stage_folder(job, stage.name) for stage in job.stages)}:
        (folder / RESULT).unlink(missing_ok=True)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)


def _say_finished(job: Job) -> dict[str, Any]:
    """Show the result of a run that is done; returns it."""
    result, last = read_json(job.out / RESULT), stage_folder(job, job.stages[-1].name)
    with Recorder(last, main=dist.is_main(), resume_step=result.get("steps", 0)) as recorder:
        recorder.announce(f"finished: {job.recipe}, seed {job.seed}", {"directory": job.out})
        recorder.finish(result, next_commands(job))
    return result


def _input(ref: Ref, artefacts: Mapping[str, Artefact]) -> Artefact:
    if ref.stage is not None:
        return artefacts[ref.stage]
    assert ref.path is not None
    path = Path(ref.path)
    if not path.is_file():
        raise ConfigError(f"the recipe needs {path}, which is not there")
    return Artefact(path, sha256_of(path))


def _checkpoints(folder: Path, keep: int = 2) -> Checkpoints:
    return Checkpoints(folder / "checkpoints", keep)


def _load_weights(module: torch.nn.Module, source: Path, warn: Callable[[str], None]) -> None:
    """Weights alone, from a run directory, a checkpoint or its state file; every key must fit."""
    if _checkpoints(source).steps():
        state = _checkpoints(source).load_newest(warn)
    else:
        state = read_state(source / STATE if source.is_dir() else source)
    assert state is not None
    theirs, own = state["nets"]["online"], module.state_dict()
    wrong = [k for k in sorted(theirs.keys() | own.keys()) if k not in theirs or k not in own]
    wrong += [k for k in sorted(theirs.keys() & own.keys()) if theirs[k].shape != own[k].shape]
    if wrong:
        raise ConfigError(
            f"--init-from {source}: {len(wrong)} tensors do not fit, the first {wrong[0]}; nothing loaded"
        )
    module.load_state_dict(theirs)
