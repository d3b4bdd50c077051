"""One of each kind of fault that no other test here does to real training; `python -m tools.faults` does all of them as
often as one likes. About 80 s.

SIGKILL to ranks and launcher: test_resume. SIGTERM: test_signals. A requeue: test_slurm. A stopped rank: test_watchdog.
Another number of ranks: test_other_ranks.
"""

import random
import shutil

import pytest
import torch

from tools.faults.kinds import KINDS, missing
from tools.faults.repetition import repetition, whole_run
from tools.faults.scene import Scene

ELSEWHERE = {"kill-rank", "kill-all-ranks", "kill-launcher", "terminate", "requeue", "rank-stopped"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return whole_run(tmp_path_factory.mktemp("whole"))


@pytest.mark.timeout(900)  # several starts of several processes, on a machine that may be busy
@pytest.mark.parametrize("kind", sorted(KINDS.keys() - ELSEWHERE))
def test_nothing_is_lost(kind, whole):
    """Catches a checkpoint that a kill or a full disk leaves half written and that counts as whole, one that is damaged
    and loaded all the same, ranks that wait for ever for a host that is gone, and ones that give up too early."""
    if why := missing(kind):
        pytest.skip(why)
    assert repetition(kind, whole, seed=kind)


def test_the_comparison_would_notice(whole, tmp_path):
    """Catches a comparison that finds all runs the same."""
    scene = Scene(tmp_path, whole, random.Random(0))
    shutil.copytree(whole, scene.run_dir)
    scene.compare()
    path = scene.checkpoints()[-1] / "state.pt"
    state = torch.load(path, weights_only=True)
    weight = next(iter(state["nets"]["online"].values())).view(-1)
    weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    torch.save(state, path)
    with pytest.raises(AssertionError):
        scene.compare()
