"""The comparison with another commit notices every bit; a verdict is given of every path."""

import json

import pytest
import torch

from tools.same_as import LOST, NEW, SAME, difference, verdicts


def make(folder, losses=(1.0, 0.5), online=((0.0, 1.0),), produced=None, **nets):
    """A run directory of one stage, as far as the comparison looks."""
    (folder / "checkpoints" / "step-00000002").mkdir(parents=True)
    lines = [{"step": i + 1, "loss": loss, "time": {"elapsed_s": id(folder)}} for i, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    states = {"online": {"weight": torch.tensor(online)}} | nets
    torch.save({"nets": states}, folder / "checkpoints" / "step-00000002" / "state.pt")
    if produced is not None:
        torch.save({"ids": produced}, folder / "produced.pt")
    return folder


def told(tmp_path, **changes):
    return difference(make(tmp_path / "one"), make(tmp_path / "other", **changes))


def test_the_same_run_twice_is_the_same_whatever_the_clock_says(tmp_path):
    assert told(tmp_path) is None


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"losses": (1.0, 0.5 + 2**-53)}, "step 2: loss 0.5 against 0.5000000000000001"),
        ({"losses": (1.0,)}, "2 steps logged against 1"),
        ({"online": ((0.0, 1.0 + 2**-23),)}, "1 of 1 tensors: online weight in 1 of 2 values, by 1.19e-07 at most"),
        ({"online": ((-0.0, 1.0),)}, "1 of 1 tensors: online weight in 0 of 2 values, by 0 at most"),
        ({"online": ((0.0,),)}, "1 of 1 tensors: online weight is torch.float32 (1, 2) against torch.float32 (1, 1)"),
        ({"target": {"weight": torch.ones(1)}}, "1 tensors are in one only: target weight in theirs"),
        ({"produced": torch.ones(1)}, "2 tensors are in one only: ids in theirs"),
    ],
)
def test_a_difference_is_named(tmp_path, changes, said):
    assert told(tmp_path, **changes) == said


def test_each_stage_of_a_chain_is_compared(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for run in (one, other):
        make(run / "pretrain")
    make(one / "tune")
    assert difference(one, other) == "stages ['pretrain', 'tune'] against ['pretrain']"
    make(other / "tune", losses=(1.0, 0.25))
    assert difference(one, other) == "tune: step 2: loss 0.5 against 0.25"


def test_an_empty_run_is_not_the_same_as_another(tmp_path):
    (tmp_path / "one").mkdir(), (tmp_path / "other").mkdir()
    assert difference(tmp_path / "one", tmp_path / "other") == "stages [] against []"


def side(folder, paths, refused):
    folder.mkdir()
    (folder / "paths.json").write_text(json.dumps(paths))
    (folder / "refused.json").write_text(json.dumps(refused))
    for path in paths:
        if path not in refused:
            make(folder / path)
    return folder


def test_every_path_gets_a_verdict(tmp_path):
    ours = side(tmp_path / "ours", ["paws", "new", "broken"], {"broken": "TypeError: no"})
    theirs = side(tmp_path / "theirs", ["lost", "paws", "broken"], {})
    broken = "this checkout raises TypeError: no"
    assert verdicts(ours, theirs, []) == {"lost": LOST, "paws": SAME, "broken": broken, "new": NEW}
    assert verdicts(ours, theirs, ["paws", "pows"]) == {"paws": SAME, "pows": "there is no such path"}
