"""The step's benchmark, on a CPU and on a GPU: what it counts, what it hands to each contender, what it reports."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from benchmarks import step as benchmark
from benchmarks import trunks
from benchmarks.gpu import fast, right
from benchmarks.gpu.calls import Record, Run, Skipped
from fastssl.methods.base import Facts
from fastssl.recipes.paws import digits
from loaders.plan.views import Rrc

CPU = torch.device("cpu")
EAGER = {name: benchmark.CONTENDERS[name] for name in ("authors", "plain", "fastssl_eager")}


def test_networks_of_the_peers_are_the_recipes():
    """Parameter counts of PAWS's released networks."""
    for problem, num in (
        (benchmark.wrn_problem(16, CPU), 1_518_400),
        (benchmark.rn50_problem(4, 6, 1, CPU), 38_210_112),
        (trunks.vits16_problem(4, 6, 1), 21_665_664 + 231_168 + 132_608),  # trunk and heads of 256
    ):
        assert sum(p.numel() for p in problem.peer().parameters()) == num


def test_image_equivalents_are_those_of_the_job():
    """A whole step of the ResNet-50 job, counted by hand: 8,192 + 6,720 large images and 24,576 small ones."""
    problem = benchmark.rn50_problem(4096, 960, 7, CPU)
    assert problem.image_equivalents == pytest.approx(14_912 + 24_576 * (96 / 224) ** 2)
    shard = benchmark.rn50_problem(256, 60, 7, CPU)
    assert shard.image_equivalents == pytest.approx(problem.image_equivalents / 16)
    assert benchmark.wrn_problem(16, CPU).image_equivalents == pytest.approx(16 * (2 + 6 * (18 / 32) ** 2) + 80)


def test_noise_has_the_form_of_the_loaders_batches():
    """Catches contenders that are timed on shapes, layouts or columns which no loader hands out."""
    (stage,) = digits()
    small = replace(stage.config.global_view, name="small", size=6, crop=Rrc((0.3, 0.6)), copies=3)
    config = replace(stage.config, small_view=small, batch_global=8, images_per_class=2)
    problem = benchmark.Problem("digits", config, Facts(10, 1, 0), None, CPU)
    noise, (real,) = benchmark.noise_batch(problem), benchmark.real_batches(problem, "digits")
    assert noise.parts.keys() == real.parts.keys()
    for name, part in real.parts.items():
        assert part.x.keys() == noise.parts[name].x.keys()
        for view, x in part.x.items():
            other = noise.parts[name].x[view]
            assert (x.shape, x.dtype) == (other.shape, other.dtype)
            assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, other))
    assert torch.equal(noise.parts["support"].columns, real.parts["support"].columns)


def test_each_contender_gets_the_batch_in_its_own_form():
    problem = right.toy_problem(CPU)
    batch = benchmark.noise_batch(problem)
    views, labels_SK = benchmark.authors(problem, batch).formed(batch)
    assert [tuple(v.shape) for v in views] == 2 * [(8, 3, 32, 32)] + 2 * [(4, 3, 32, 32)] + 6 * [(4, 3, 18, 18)]
    assert all(v.is_contiguous() for v in views)
    assert torch.equal(torch.cat(views[:2]), batch.parts["support"].x["support"])
    assert labels_SK.shape == (16, 4) and torch.allclose(labels_SK.sum(1), torch.ones(16))
    views, _, images = benchmark.plain(problem, batch).formed(batch)
    assert images == 4 and all(v.is_contiguous(memory_format=torch.channels_last) for v in views)


def test_contenders_take_turns_and_the_report_has_its_form():
    problem = right.toy_problem(CPU)
    measured = benchmark.measure(problem, benchmark.noise_batch(problem), EAGER, rounds=3, seconds=0.0)
    assert all(len(m.steps_per_s) == 3 and min(m.steps_per_s) > 0 for m in measured.values())
    result = benchmark.summary(problem, measured)
    assert result["steps_per_s"].keys() == result["compile_s"].keys() == EAGER.keys()
    assert result["steps_per_s"]["plain"] == sorted(measured["plain"].steps_per_s)[1]
    assert result["problem"]["dtype"] == {"authors": "float32", "plain": "bfloat16", "fastssl_eager": "bfloat16"}
    assert set(result["ratios"]) == {"fastssl_eager / authors", "fastssl_eager / plain"}
    benchmark.show(result)


def test_no_contender_settles_how_another_compiles():
    """Catches plain compiled PyTorch that is timed recomputing what only we recompute."""
    problem, seen, before = right.toy_problem(CPU), [], torch._functorch.config.aggressive_recomputation

    def settles(problem, batch):
        seen.append(torch._functorch.config.aggressive_recomputation)
        torch._functorch.config.aggressive_recomputation = True
        return benchmark.plain(problem, batch)

    benchmark.measure(problem, benchmark.noise_batch(problem), {"one": settles, "other": settles}, 1, 0.0)
    assert seen == [False, False] and torch._functorch.config.aggressive_recomputation == before


def test_windows_count_whole_steps():
    """Catches a window that leaves out its last step's time, or that never ends."""
    rate = benchmark.cpu_window(lambda: time.sleep(0.02), 0.05)
    assert 20 < rate <= 50
    assert 20 < benchmark.cpu_window(lambda: time.sleep(0.02), 0.0) <= 50


def test_rounds_end_with_the_time_that_there_is():
    problem = right.toy_problem(CPU)
    builds = {"authors": benchmark.authors}
    measured = benchmark.measure(problem, benchmark.noise_batch(problem), builds, 50, 0.0, ends=time.perf_counter())
    assert len(measured["authors"].steps_per_s) == benchmark.MIN_ROUNDS


# -------------------------------------------------------------------------------------------------------------- gpu


def test_gpu_parts_run_at_toy_size(monkeypatch):
    """What needs a GPU says so; what does not, goes the whole way and compares what it says it compares."""

    def run():
        return Run(CPU, True, Record(None), rounds=1, window_s=0.0)

    for part in (fast.graph, fast.eighth):
        with pytest.raises(Skipped):
            part(run())
    eager = {name: EAGER.get(name, benchmark.fastssl_eager) for name in benchmark.CONTENDERS}
    monkeypatch.setattr(benchmark, "CONTENDERS", eager)
    found = fast.sixteenth(run())
    assert found["over_authors"]["measured"] == found["steps_per_s"]["fastssl"] / found["steps_per_s"]["authors"]
    for name in ("fastssl", "fastssl_recomputed"):
        monkeypatch.setattr(benchmark, name, benchmark.fastssl_eager)
    assert right.steps(run())["passed"]
    monkeypatch.setattr(benchmark, "fastssl", lambda *a: benchmark.authors(replace(a[0], seed=1), a[1]))
    assert not right.steps(run())["passed"]


def test_fused_roofline_is_that_of_the_cost_table(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert round(fast.roofline(torch.device("cuda"))) == 14_035
    assert fast.roofline(CPU) is None
