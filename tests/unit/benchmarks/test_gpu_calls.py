"""The calls of `benchmarks.gpu` by a clock that tests turn: they end in time, go on where they were, say what next."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import calls, fast, right
from benchmarks.gpu import ranks as ranks_module
from benchmarks.gpu.calls import OutOfTime, Part, Record, Run, do, must_wait, next_lines
from benchmarks.step import Contender


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Killed(BaseException):
    """The machine is gone."""


def a_run(path, clock, budget_s=570.0, **changes):
    return Run(torch.device("cpu"), True, Record(path), clock() + budget_s, clock, **changes)


def a_part(clock, seconds, found=None, needs_s=1.0, must_pass=False):
    def work(run):
        clock.now += seconds
        return dict(found or {})

    return Part(work, needs_s, must_pass)


def lines_of(capsys):
    return capsys.readouterr().out.splitlines()


def test_nothing_is_timed_before_all_that_must_pass_has_and_all_of_it_is_tried(tmp_path, capsys):
    """Catches a run that stops at its first fault, so that the second is found on another rented day."""
    clock = Clock()
    parts = {
        "first": a_part(clock, 5, {"passed": False, "difference": 0.3}, must_pass=True),
        "second": a_part(clock, 5, {"passed": True}, must_pass=True),
        "timed": a_part(clock, 5),
    }
    run = a_run(tmp_path / "gpu.json", clock)
    do(run, parts, list(parts), {}, lambda *_: None)
    assert [run.record.state(name) for name in parts] == ["failed", "done", "not begun"]
    assert "timed: left out: first failed" in lines_of(capsys)
    assert must_wait(parts, run.record) == "first failed"
    said = next_lines(parts, (("first", "second"), ("timed",)), run.record, "again")
    assert said[0].startswith("failed, see above") and said[1] == "mended, next: again first"


def test_a_part_that_fails_with_an_exception_does_not_take_the_others_along(tmp_path):
    clock = Clock()

    def breaks(run):
        raise RuntimeError("CUDA error: an illegal memory access")

    parts = {"one": Part(breaks, 1, True), "two": a_part(clock, 1, {"passed": True}, must_pass=True)}
    run = a_run(tmp_path / "gpu.json", clock)
    do(run, parts, list(parts), {}, lambda *_: None)
    assert run.record.parts["one"]["found"]["error"] == "RuntimeError: CUDA error: an illegal memory access"
    assert run.record.state("two") == "done"


def test_what_has_no_time_left_is_left_for_the_next_call(tmp_path, capsys):
    """Catches a part that is begun with seconds to go, and dies with what it measured."""
    clock = Clock()
    parts = {"long": a_part(clock, 500), "other": a_part(clock, 100, needs_s=90)}
    path = tmp_path / "gpu.json"
    do(a_run(path, clock), parts, list(parts), {}, lambda *_: None)
    assert "other: left for another call: 90 s, 70 s are left" in lines_of(capsys)
    run = a_run(path, clock)
    assert next_lines(parts, (tuple(parts),), run.record, "again") == ["next, call 1 of 1: again other"]
    do(run, parts, list(parts), {}, lambda *_: None)
    assert "long: was done before" in lines_of(capsys) and clock.now == 600
    assert next_lines(parts, (tuple(parts),), run.record, "again")[0].startswith("all 1 calls are done")


def windows_of(clock, build_s=60.0, window_s=20.0, killed_at=None):
    """Contenders whose building and windows take time, and a window that may be the last thing on the machine."""
    counted = []

    def build(problem, batch):
        clock.now += build_s
        return Contender(torch.nn.Linear(1, 1), lambda b: b, lambda f: f, lambda step, formed: 0.0)

    def window(step, seconds):
        if seconds:
            counted.append(seconds)
            if killed_at is not None and len(counted) == killed_at:
                raise Killed
            clock.now += window_s
        return 10.0 + len(counted)

    return build, window, counted


def test_windows_stop_in_time_and_go_on_where_they_were(tmp_path, monkeypatch):
    """Catches a call that is cut off within a window, and a later one that measures anew what is there."""
    monkeypatch.setattr(fast, "noise_batch", lambda problem: None)
    problem, clock, path = right.toy_problem(torch.device("cpu")), Clock(), tmp_path / "gpu.json"
    build, window, counted = windows_of(clock)

    def part(run):
        return fast.measured(run, problem, {name: build for name in ("plain", "fastssl")}, window)

    parts = {"timed": Part(part, 60)}
    ends = []
    for _ in range(3):
        run = a_run(path, clock, budget_s=220.0, rounds=3, window_s=20.0)
        do(run, parts, ["timed"], {}, lambda *_: None)
        ends.append((run.record.state("timed"), clock.now <= run.ends_s))
    assert ends == [("begun", True), ("done", True), ("done", True)]
    found = json.loads(path.read_text())["parts"]["timed"]["found"]
    assert len(counted) == 6 and {len(w) for w in found["windows"].values()} == {3}
    assert found["steps_per_s"]["plain"] > 10 and found["ratios"]["fastssl / plain"]["median"] > 0


def test_a_part_that_is_killed_loses_one_window(tmp_path, monkeypatch):
    monkeypatch.setattr(fast, "noise_batch", lambda problem: None)
    problem, clock, path = right.toy_problem(torch.device("cpu")), Clock(), tmp_path / "gpu.json"
    counts = []
    for killed_at in (4, None):
        build, window, counted = windows_of(clock, killed_at=killed_at)
        parts = {"timed": Part(lambda run: fast.measured(run, problem, {"a": build, "b": build}, window), 60)}  # noqa: B023
        run = a_run(path, clock, rounds=3, window_s=20.0)
        try:
            do(run, parts, ["timed"], {}, lambda *_: None)
        except Killed:
            assert Record(path).state("timed") == "begun"
        counts.append(len(counted))
    assert Record(path).state("timed") == "done" and counts == [4, 3]


def test_a_contender_is_not_built_where_its_compilation_would_not_end(tmp_path, monkeypatch):
    monkeypatch.setattr(fast, "noise_batch", lambda problem: None)
    clock = Clock()
    build, window, counted = windows_of(clock)
    run = Run(torch.device("cpu"), False, Record(tmp_path / "gpu.json"), 100.0, clock, part="timed")
    with pytest.raises(OutOfTime):
        fast.measured(run, right.toy_problem(run.device), {"authors": build, "fastssl": build}, window)
    assert clock.now == 60 and counted == []


def test_what_was_found_once_is_not_found_again_and_nothing_is_begun_that_would_not_end(tmp_path):
    """Catches a call that is cut off while it compiles, and does it again in the next."""
    clock, path = Clock(), tmp_path / "gpu.json"

    def part(run):
        for number in range(4):
            run.once(f"step {number}", lambda: setattr(clock, "now", clock.now + 100) or clock.now)
        return run.found

    ends = []
    for _ in range(2):
        run = a_run(path, clock, budget_s=250.0)
        do(run, {"steps": Part(part, 60)}, ["steps"], {}, lambda *_: None)
        ends.append((run.record.state("steps"), clock.now, clock.now <= run.ends_s))
    assert ends == [("begun", 200.0, True), ("done", 400.0, True)]
    assert list(Record(path).parts["steps"]["found"].values()) == [100.0, 200.0, 300.0, 400.0]


@pytest.mark.parametrize("killed_after", range(1, 17))
def test_ranks_that_were_killed_go_on_with_whatever_is_missing(killed_after, tmp_path, monkeypatch):
    """Catches graphs that are left out, and pass, where the machine was lost after the compiled steps."""
    held = []

    def hold(how, recipe, precision, *_):
        held.append((recipe, precision, how))
        return {"passed": True}

    monkeypatch.setattr(ranks_module, "trained", lambda *_, **__: {"losses": [1.0] * ranks_module.NUM_STEPS})
    monkeypatch.setattr(ranks_module, "group_of_one", lambda device: nullcontext())
    monkeypatch.setattr(ranks_module, "held", hold)
    run = Run(torch.device("cuda", 0), False, Record(tmp_path / "gpu.json"), part="ranks")
    whole = ranks_module.ranks(run)
    assert len(held) == 16 and sum(how == "graphed" for *_, how in held) == 4 and whole["passed"]
    held.clear()
    run.found = dict(list(whole.items())[:killed_after])
    assert ranks_module.ranks(run) == whole and len(held) == 16 - killed_after


@pytest.mark.parametrize("recipe", ranks_module.OPTIMISERS.values())
def test_a_group_of_one_changes_no_bit(recipe, monkeypatch):
    """Catches a part that cannot run at all, and sums over one rank that are not what was summed."""
    monkeypatch.setattr(ranks_module, "NUM_STEPS", 2)
    cpu = torch.device("cpu")
    with ranks_module.our_norms():
        lone = ranks_module.trained("eager", recipe, "fp32", cpu)["losses"]
    with ranks_module.group_of_one(cpu):
        found = ranks_module.held("eager", recipe, "fp32", cpu, lone, [0.0] * 2)
    assert found["passed"] and found["difference"] == 0 and len(lone) == 2
    assert ranks_module.trained("eager", recipe, "fp32", cpu, times=1.1)["losses"] != lone


def test_limits_follow_what_rounding_does():
    """Catches a tolerance that a right graph misses, and one that lets another rate pass."""
    limits = right.limits_of([1.0, 1.0, 1.0], [1.0, 1.001, 1.0], "fp32")
    assert limits == pytest.approx([1e-5, 0.01001, 0.01001])
    held = right.compared(lambda: [1.0, 1.02, 1.0], [1.0, 1.0, 1.0], limits)
    assert not held["passed"] and held["at_step"] == 1 and held["difference"] == pytest.approx(0.02)
    assert not right.compared(lambda: [float("nan")] * 3, [1.0] * 3, limits)["passed"]

    same, other = (right.compared(lambda value=value: [1.0, value], [1.0, 2.0], [0.0, 0.0]) for value in (2.0, 3.0))
    assert same["passed"] and not other["passed"] and other["at_step"] == 1

    def breaks():
        raise SystemExit("benchmarks.step: not compiled")

    assert right.told(breaks, 1e-9) == {"passed": False, "error": "SystemExit: benchmarks.step: not compiled"}


def test_every_part_belongs_to_one_call_and_each_call_fits_its_time():
    named = [name for names in gpu.CALLS for name in names]
    assert sorted(named) == sorted(gpu.PARTS) and {"kernels", "steps", "ranks"} <= set(gpu.CALLS[0])
    for names in gpu.CALLS:
        assert sum(gpu.PARTS[name].needs_s for name in names) < 570
    assert calls.MOST_BYTES == 16 * 2**20
