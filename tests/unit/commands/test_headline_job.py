"""The 64-GPU job without 64 GPUs: what its ranks would be given, what its dry run says, and what it refuses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from fastssl.commands.main import main
from fastssl.losses.similarity import BalancedLabels
from fastssl.methods.base import Facts
from fastssl.recipes.resolve import resolve
from loaders.errors import PlanError
from loaders.plan.plan import StreamFacts

GOLDEN = Path(__file__).parents[2] / "golden" / "dry_run_64_gpus.txt"
STEP = 7


@pytest.fixture(scope="module")
def bound():
    """The headline recipe's plan on as many classes as ImageNet has, 25 images each."""
    (stage,) = resolve("paws.rn50_100ep", ("labels=all",))
    plan = stage.config.build(Facts(1000, 3, 0), {}).plan()
    num = 25_000
    sizes = np.tile(np.array([[375, 500]], dtype=np.int32), (num, 1))
    facts = StreamFacts(None, np.arange(num) % 1000, sizes, 1000)
    return plan.bind({stream.name: facts for stream in plan.streams})


def fits(world):
    return 4096 % world == 0 and 6720 % world == 0


@pytest.mark.parametrize("world", [w for w in range(1, 65) if fits(w)])
def test_ranks_tile_the_global_batch(bound, world):
    """Catches rows lost, doubled or out of order between ranks, boxes and colours that depend on the number of ranks,
    and support columns that are not those the loss assumes."""
    bound.check_world(world)
    for stream in ("unlabelled", "support"):
        whole = bound.rows(stream, STEP)
        shares = [bound.rows(stream, STEP, rank, world) for rank in range(world)]
        for name in ("positions", "ids", "labels"):
            assert np.array_equal(np.concatenate([getattr(s, name) for s in shares]), getattr(whole, name))
        for number, view in enumerate(whole.views):
            copies = view.view.copies
            for array in ("boxes", *range(len(view.tables))):
                parts = [s.views[number].boxes if array == "boxes" else s.views[number].tables[array] for s in shares]
                full = view.boxes if array == "boxes" else view.tables[array]
                by_copy = np.concatenate([p.reshape(copies, -1, p.shape[-1]) for p in parts], axis=1)
                assert np.array_equal(by_copy.reshape(full.shape), full)
    columns = np.concatenate([bound.rows("support", STEP, rank, world).columns for rank in range(world)])
    assumed = BalancedLabels(960, 7, ranks=world).columns(torch.device("cpu")).numpy()
    assert np.array_equal(columns, assumed)
    assert all(len(np.unique(whole.labels[columns == column])) == 1 for column in range(0, 960, 97))


@pytest.mark.parametrize("world", [w for w in range(1, 65) if not fits(w)])
def test_other_counts_are_refused_with_the_nearest(bound, world):
    nearest = [w for w in range(1, 129) if fits(w)]
    below, above = max(w for w in nearest if w < world), min(w for w in nearest if w > world)
    with pytest.raises(PlanError, match=f"does not divide by {world} ranks; nearest: {below} or {above}$"):
        bound.check_world(world)


def test_the_dry_run_of_the_headline_job_is_what_it_was(monkeypatch):
    """Catches a change in batch, steps, memory, messages or launch lines that nobody meant."""
    arguments = ["train", "paws.rn50_100ep", "--gpus", "64", "--dry-run"]
    monkeypatch.setattr("sys.argv", ["fastssl", *arguments])
    said = CliRunner().invoke(main, arguments, catch_exceptions=False).output
    lines = [line for line in said.splitlines(keepends=True) if not line.startswith("warning: this host has")]
    assert "".join(lines) == GOLDEN.read_text()


def test_the_headline_job_on_one_gpu_names_the_recipes_for_few():
    """Catches an out-of-memory error hours later, where the message could have come at once."""
    said = CliRunner().invoke(main, ["train", "paws.rn50_100ep", "--gpus", "1", "--data", "nowhere"])
    assert said.exit_code == 1
    assert "paws.rn50_100ep_4gpus, paws.rn50_100ep_1gpu" in said.output and "--step" in said.output
