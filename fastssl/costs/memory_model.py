"""What a rank's card must hold, for each setting of `--step`, and which cards hold it. Modelled, not measured.

Eager is counted: what the traced step keeps alive. The other settings keep, instead of each convolution's input and
output, little more than the outputs. How much more was measured on ResNet-50, whose convolutions put out 22.2 MB
for each 224-pixel image under bf16; at the peak (benchmarks/results/step_memory_202611.md):

    eager             44.2 MB   inputs and outputs
    eager-recompute   23.5 MB   blocks checkpointed; each one's last convolution, and the shortcut's, computed again
    compiled          24.9 MB   batch norms and ReLUs computed again
                      42.6 MB   nothing computed again, as where there is room: 44 of 390 MB less to read and write

A transformer's blocks, which have no convolution, keep their inputs and, at their turn, one block's all when they are
computed again; compiled, their inputs and the outputs of their products: modelled, not measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from fastssl.costs.cost import FP32
from fastssl.costs.trace import Trace, Untraceable, traced
from fastssl.engine.job import Job
from fastssl.engine.step import default_how
from fastssl.errors import ConfigError
from fastssl.methods.base import Facts, Stage
from fastssl.recipes.datasets import KNOWN_SETS
from fastssl.recipes.resolve import recipes
from loaders.plan.plan import Plan
from loaders.plan.views import Sequential

KEPT_PER_OUTPUT = {"eager-recompute": 23.5 / 22.2, "compiled": 24.9 / 22.2, "graphed": 24.9 / 22.2}
WHOLE_PER_OUTPUT = 42.6 / 22.2  # compiled, nothing computed again
ROOM = 0.9  # of a card, which a step that need not take it leaves to fragments of memory
PREFERENCE = ("compiled", "graphed", "eager", "eager-recompute")  # the setting to name first where several fit

BYTES_PER_PARAMETER = 12  # float32 weight, gradient (which is DDP's bucket) and momentum
BATCHES_IN_FLIGHT = 4  # one in use, two ready, one being prepared: loaders.loader.Loader's prefetch
DRIVER_BYTES = 1e9  # CUDA context, NCCL's buffers, cuDNN's workspaces: an estimate

CARDS_GB = (16, 40, 80, 141)  # V100, A100, A100 or H100, H200; in 10^9 bytes, a little less than each has


@dataclass(frozen=True)
class MemoryNeeded:
    """Bytes of one rank. `activations` by setting, those that there are; `workspace_bytes` is what the backward pass
    needs beyond them."""

    state_bytes: float
    batch_bytes: float
    workspace_bytes: float
    activations: Mapping[str, float]
    whole_bytes: float = float("inf")  # activations of a compiled step that computes nothing again

    def needed(self, how: str) -> float:
        """Bytes that `--step how` needs: where there is no such setting, which the step says, those of eager."""
        copies = BATCHES_IN_FLIGHT + (how == "graphed")  # a graph reads its batch from a place of its own
        return self.shared_bytes + copies * self.batch_bytes + self.workspace_bytes + self._kept(how)

    def has_room(self, how: str, card_bytes: float) -> bool:
        """Whether the card holds `--step how`, of the compiled ones, with nothing computed again."""
        return self.needed(how) - self._kept(how) + self.whole_bytes <= ROOM * card_bytes

    def _kept(self, how: str) -> float:
        return self.activations.get(how, self.activations["eager"])

    @property
    def shared_bytes(self) -> float:
        """What more ranks do not make smaller."""
        return self.state_bytes + DRIVER_BYTES

    def settings_within(self, card_bytes: float) -> list[str]:
        """The settings that fit, the one to prefer first."""
        return [how for how in PREFERENCE if how in self.activations and self.needed(how) <= card_bytes]


def memory_of(trace: Trace) -> MemoryNeeded:
    """What a rank of the traced step needs."""
    (inputs_bytes, outputs_bytes), tokens = trace.conv_io_bytes, trace.tokens
    # Heads and loss keep theirs in any case.
    rest = max(0, trace.saved_bytes - inputs_bytes - outputs_bytes - tokens.kept)
    of_tokens = dict.fromkeys(KEPT_PER_OUTPUT, tokens.inputs + tokens.outputs)
    of_tokens["eager-recompute"] = tokens.inputs + tokens.kept // max(tokens.num, 1)  # of one block, backward
    recomputed = {how: rest + kept * outputs_bytes + of_tokens[how] for how, kept in KEPT_PER_OUTPUT.items()}
    if not trace.recomputes:
        del recomputed["eager-recompute"]
    moments_bytes = FP32 * (trace.num_moments - 1)  # beside the momentum
    return MemoryNeeded(
        state_bytes=trace.num_parameters * (BYTES_PER_PARAMETER + moments_bytes) + trace.fixed_bytes,
        batch_bytes=trace.batch_bytes,
        workspace_bytes=trace.peak_bytes - trace.saved_bytes,
        activations={"eager": trace.saved_bytes, **recomputed},
        whole_bytes=rest + WHOLE_PER_OUTPUT * outputs_bytes + tokens.kept,
    )


def refuse_job(job: Job, card_bytes: float | None) -> None:
    """Raise ConfigError where a rank of a GPU job would not fit a card of `card_bytes`, naming the setting, or else the
    number of ranks, that would, and the job's recipes for fewer GPUs. `card_bytes` None: no card is at hand, so the
    largest of CARDS_GB is what it would need. To be called before the ranks are joined; takes seconds. Says nothing
    about a stage that cannot be traced."""
    card_bytes = card_bytes or CARDS_GB[-1] * 1e9
    for stage, facts in _of_stages(job):
        try:
            refuse_what_cannot_fit(stage, facts, job.world, _how(job), card_bytes)
        except ConfigError as error:
            fewer = [name for name in recipes() if name.startswith(f"{job.recipe}_") and name.endswith(("gpu", "gpus"))]
            hint = f"; made for fewer GPUs: {', '.join(fewer)}" if fewer else ""
            raise ConfigError(f"{error}{hint}") from None


def stages_with_room(job: Job, card_bytes: float) -> tuple[str, ...]:
    """The stages of a GPU job whose compiled step fits a card of `card_bytes` without computing anything again."""
    how = _how(job)
    if how not in ("compiled", "graphed"):
        return ()
    found = ((stage.name, _needs(stage, facts, job.world)) for stage, facts in _of_stages(job))
    return tuple(name for name, needs in found if needs is not None and needs[0].has_room(how, card_bytes))


def _how(job: Job) -> str:
    return job.how or default_how(torch.device("cuda"))


def _of_stages(job: Job) -> Iterator[tuple[Stage, Facts]]:
    """The job's stages that train and whose batches the ranks can share."""
    for stage in job.stages:
        known = KNOWN_SETS[stage.config.dataset]
        facts = Facts(known.num_classes, known.channels, job.seed)
        streams = stage.config.build(facts, {}).plan().streams if stage.do == "train" else ()
        if not streams or any(s.batch_global % job.world for s in streams if not isinstance(s.order, Sequential)):
            continue  # batches that the ranks cannot share are refused for that
        yield stage, facts


def _needs(stage: Stage, facts: Facts, world: int) -> tuple[MemoryNeeded, Plan] | None:
    """None where the stage cannot be traced."""
    try:
        trace = traced(stage, facts, world)
    except Untraceable:
        return None
    return memory_of(trace), trace.plan


def refuse_what_cannot_fit(stage: Stage, facts: Facts, world: int, how: str, card_bytes: float) -> None:
    """Raise ConfigError where a rank of `stage` would not fit a card of `card_bytes` with `--step how`, naming the
    setting, or else the number of ranks, that would. Says nothing about a stage that cannot be traced."""
    needs = _needs(stage, facts, world)
    if needs is None or needs[0].needed(how) <= card_bytes:
        return
    memory, plan = needs
    fitting = memory.settings_within(card_bytes)
    if fitting:
        instead = f"--step {fitting[0]} needs about {_gb(memory.needed(fitting[0]))}"
    elif (ranks := _ranks_that_fit(memory, plan, world, card_bytes)) is not None:
        instead = f"no setting of --step makes it fit; on {ranks} ranks --step {PREFERENCE[0]} would"
    else:
        instead = "no setting of --step fits, however many ranks share the batch: choose a smaller network"
    raise ConfigError(
        f"a rank needs about {_gb(memory.needed(how))} of the card's {_gb(card_bytes)} as --step {how}; {instead}"
    )


def _ranks_that_fit(memory: MemoryNeeded, plan: Plan, world: int, card_bytes: float) -> int | None:
    """The fewest ranks that divide the batches and fit; what depends on the batch shrinks in proportion."""
    batches = [s.batch_global for s in plan.streams if not isinstance(s.order, Sequential)]
    how = PREFERENCE[0]
    shrinking = memory.needed(how) - memory.shared_bytes
    for ranks in range(world + 1, min(batches) + 1):
        fits = memory.shared_bytes + shrinking * world / ranks <= card_bytes
        if fits and all(n % ranks == 0 for n in batches):
            return ranks
    return None


def _gb(num_bytes: float) -> str:
    """In 10^9 bytes, as cards are sold."""
    return f"{num_bytes / 1e9:.0f} GB" if num_bytes >= 10e9 else f"{num_bytes / 1e9:.1f} GB"


def describe(memory: MemoryNeeded) -> tuple[str, str]:
    """In words: what each setting needs, and which settings fit which card."""
    needs = ", ".join(f"{_gb(memory.needed(how))} {how}" for how in memory.activations)
    fits = []
    for card_gb in CARDS_GB:
        settings = memory.settings_within(card_gb * 1e9)
        everything = len(settings) == len(memory.activations)
        fits.append(f"{card_gb} GB {'all' if everything else ', '.join(settings) or 'none'}")
        if everything:
            break  # larger ones hold all too
    return f"a GPU needs, by --step: {needs} (modelled)", "; ".join(fits)
