"""The optimiser's benchmark: every contender takes the step it is said to take, and the counts are those of a step."""

import numpy as np
import pytest
import torch

from benchmarks import optimizer as benchmark

CPU = torch.device("cpu")


def small():
    """Two adapted tensors, four excluded ones."""
    torch.manual_seed(0)
    layers = {"fc1": torch.nn.Linear(5, 7), "bn": torch.nn.BatchNorm1d(7), "fc2": torch.nn.Linear(7, 3)}
    return torch.nn.ModuleDict(layers)


def runner(make):
    return benchmark.Runner(make, small, CPU)


@pytest.mark.parametrize("make", (benchmark.fastssl, benchmark.fastssl_foreach))
def test_ours_is_the_authors_step(make):
    """Catches a contender that leaves out work, under a rate that moves."""
    ours, theirs = runner(make), runner(benchmark.authors)
    for contender in (ours, theirs):
        contender.window(6)
    assert benchmark.difference(ours, theirs) < 1e-6
    assert benchmark.difference(ours, ours) == 0.0
    start = runner(benchmark.authors)
    start.num_steps = 6
    assert benchmark.difference(ours, start) > 1e-4


def test_timm_keeps_the_rate_outside_the_momentum():
    """Equal gradients: one step of rate a and one of rate b move an excluded tensor by -(a + 1.9 b) g."""
    contender = runner(benchmark.timm_rule)
    before, gradient = contender.params[-1].detach().clone(), contender.gradients[-1]
    a = contender.prepare()
    contender.step(a)
    b = contender.prepare()
    contender.step(b)
    torch.testing.assert_close(contender.params[-1].detach() - before, -(a + 1.9 * b) * gradient, rtol=1e-4, atol=1e-8)


def test_counts_of_a_step():
    """The authors ask the host four times a tensor that they adapt; nobody else ever does."""
    counts = {make.__name__: benchmark.count(runner(make)) for make in (benchmark.authors, benchmark.timm_rule)}
    ours = runner(benchmark.fastssl)
    ours.window(1)
    counts["fastssl"] = benchmark.count(ours)
    assert [row["host_waits"] for row in counts.values()] == [8, 0, 0]
    assert counts["fastssl"]["dispatches"] == 21


def test_another_apex_is_not_taken_for_nvidias(tmp_path, monkeypatch):
    """PyPI's apex has no LARC."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise RuntimeError('imported')")
    assert not benchmark.has_nvidia_apex() and "nvidia_apex" not in benchmark.contenders(CPU)
    (tmp_path / "apex" / "parallel").mkdir()
    (tmp_path / "apex" / "parallel" / "LARC.py").touch()
    assert benchmark.has_nvidia_apex() and "nvidia_apex" in benchmark.contenders(CPU)


def test_report_has_its_form(capsys):
    runners = {name: runner(make) for name, make in benchmark.contenders(CPU).items()}
    windows = benchmark.measure(runners, rounds=3, steps=2)
    assert all(ms.shape == (3, 2) and (ms > 0).all() for ms in windows.values())
    result = benchmark.summary(windows, {name: benchmark.count(each) for name, each in runners.items()})
    assert set(result["ms_per_step"]) == {"authors", "timm_rule", "fastssl"}
    assert result["ms_per_step"]["authors"] == np.median(windows["authors"][:, 0])
    benchmark.show(result | {"settings": {"steps": 9}, "difference": 1e-8})
    assert "authors / fastssl" in capsys.readouterr().out
