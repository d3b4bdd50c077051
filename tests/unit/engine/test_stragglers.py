"""Who waits for data longer than the others."""

import json
import time
from contextlib import redirect_stdout

from fastssl import dist
from fastssl.engine import stages, stragglers
from fastssl.engine.stragglers import side_by_side, slowest
from fastssl.record.clock import Clock, Pace
from loaders.loader import Loader
from tests.ranks.pool import run_ranks
from tests.support import fakes


def test_the_rank_that_waits_is_slow_not_those_that_wait_for_it():
    """Catches the obvious reading: the steps of the others are the long ones, for they wait in their collectives."""
    ranks = {"step_s_p50": [1.0, 0.5, 1.0], "wait_s_p50": [0.01, 0.51, 0.01], "wait_s_p90": [0.1, 0.9, 0.1]}
    said = "rank 1 on b is slow: it waits 0.51 s a step for data (one in ten 0.9 s), the others 0.01 s"
    assert slowest(["a", "b", "c"], ranks) == said


def test_ranks_that_all_wait_or_differ_by_little_are_not_slow():
    ranks = {"step_s_p50": [1.0, 1.0], "wait_s_p50": [0.5, 0.6], "wait_s_p90": [0.5, 0.7]}
    assert slowest(["a", "b"], ranks) == ""


def test_alone_there_is_nobody_to_compare_with():
    assert side_by_side([Pace(1.0, 0.0)] * 5) == ({}, "")


def test_each_steps_pace_leaves_out_pauses_and_tells_waiting_from_stepping():
    now = 0.0
    clock = Clock(lambda: now)
    for wait_s, step_s, pause_s in ((1.0, 2.0, 0.0), (0.5, 3.0, 100.0)):
        with clock.waiting():
            now += wait_s
        with clock.paused():
            now += pause_s
        now += step_s
        clock.step(1)
    assert clock.paces() == [Pace(2.0, 1.0), Pace(3.0, 0.5)] and clock.paces() == []


def a_slow_loader(folder):
    batch = Loader._batch
    if dist.rank() == 1:
        Loader._batch = lambda self, step: time.sleep(0.1) or batch(self, step)
    stragglers.EVERY = 3
    (stage,) = fakes.stages("paws", steps=9)
    with (folder / f"said-by-{dist.rank()}").open("w") as file, redirect_stdout(file):
        stages.run(fakes.job((stage,), folder / "run", world=2))


def test_a_rank_with_a_slow_loader_is_named_with_its_host(tmp_path):
    run_ranks(2, a_slow_loader, tmp_path)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    reported = [record["time"]["ranks"] for record in records if "ranks" in record["time"]]
    assert [record["step"] for record in records if "ranks" in record["time"]] == [3, 6, 9]
    assert set(reported[0]) == {"step_s_p50", "step_s_p90", "wait_s_p50", "wait_s_p90"}
    waits_s = reported[-1]["wait_s_p50"]
    assert len(waits_s) == 2 and waits_s[1] > waits_s[0] + 0.03
    assert "warning: rank 1 on " in (tmp_path / "said-by-0").read_text()
