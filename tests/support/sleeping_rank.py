"""Two ranks, of which the last falls asleep in step 3's loss: `python -m tests.support.sleeping_rank OUT LIMIT_S`."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from fastssl import dist
from fastssl.api.on_ranks import on_ranks
from fastssl.errors import EXIT_HUNG, Hung
from fastssl.methods.base import Artefact, Facts, Method, Nets
from loaders.batch import Batch
from tests.support import fakes


@dataclass(frozen=True)
class SleepyConfig(fakes.TinyConfig):
    def build(self, facts: Facts, inputs: Mapping[str, Artefact]) -> Method:
        return Sleepy(self, facts, inputs)


class Sleepy(fakes.TinyPaws):
    def loss(self, nets: Nets, batch: Batch) -> dict[str, Tensor]:
        if int(batch.step) == 3 and dist.rank() == 1:
            time.sleep(600)
        return super().loss(nets, batch)


if __name__ == "__main__":
    (stage,) = fakes.stages("paws")
    config = SleepyConfig("digits", fakes.EVAL, labels="per-class=10", precision="fp32")
    job = fakes.job((replace(stage, config=config),), Path(sys.argv[1]), world=2, watchdog_s=float(sys.argv[2]))
    try:
        on_ranks(job)
    except Hung:
        sys.exit(EXIT_HUNG)
