"""Ranks that find different checkpoints, as with an --out that is a folder of each host's own."""

import shutil

from fastssl import dist
from fastssl.engine.stages import run
from fastssl.errors import FastsslError
from tests.ranks.pool import run_ranks
from tests.support import fakes


def on_a_rank(folder):
    """The first rank finds the checkpoint of step 3, the second an empty directory; what each is told."""
    try:
        run(fakes.job(fakes.stages("paws"), folder / str(dist.rank()), world=2))
    except FastsslError as error:
        return str(error)
    return "trained"


def test_ranks_that_loaded_different_checkpoints_stop_at_the_door(tmp_path):
    """Catches ranks that train from different steps: DDP hides it by copying the first rank's weights, but not its
    momentum, and the run ends in a hang or a wrong result."""
    run(fakes.job(fakes.stages("paws"), tmp_path / "0", world=2))
    (tmp_path / "0" / "result.json").unlink()
    shutil.rmtree(tmp_path / "0" / "checkpoints" / "step-00000006")
    told = run_ranks(2, on_a_rank, tmp_path)
    assert told == ["some ranks would start after step 0, others after step 3: --out must be one folder that every "
                    "host sees"] * 2  # fmt: skip
