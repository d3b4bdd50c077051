"""Preparing a step compares its gradients with eager's: what is lost is noticed, what is only rounded is not."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from torch import nn

from fastssl.engine import gradient_check
from fastssl.engine.gradient_check import Compared, Watched, num_few
from fastssl.engine.step import TrainingStep
from fastssl.nn import recompute
from fastssl.nn.norm import fused, global_batch_norm
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.profiling.live_memory import LiveMemory
from tests.support.card import Card
from tests.support.stepped import stepped
from tests.test_every_method import paws, semppl, simclrv2, supervised

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def card(monkeypatch):
    with Card(monkeypatch) as card:
        yield card


@pytest.fixture
def quickly(monkeypatch):
    """Compiling traces, and generates no code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def prepared(how, stages, device=CPU, steps=1, watch=None):
    return stepped(how, stages, device, steps, watch)


def plant(monkeypatch, when):
    """Have batch norm put out nothing but zeros, of which the weights behind it learn nothing, `when` that is so."""
    affine = fused.affine

    def planted(x, *args):
        return affine(x, *args) * (0.0 if when() else 1.0)  # the same operators, as computing again insists

    monkeypatch.setattr(fused, "affine", planted)
    monkeypatch.setattr(global_batch_norm, "_must_be_ours", lambda: True)


def test_a_gradient_that_compiling_loses_is_noticed(quickly, monkeypatch):
    """Catches a run whose last layer alone learns, as with compilers that drop gradients without a word."""
    plant(monkeypatch, torch.compiler.is_compiling)
    step, (warning,), losses = prepared("compiled", paws())
    assert step.how == "eager" and "--step compiled is not used" in warning
    assert "parameters are not those of an eager step" in warning and "trunk.conv1.weight" in warning
    assert losses == prepared("eager", paws())[2]


def test_a_gradient_that_a_graph_would_repeat_lost_is_noticed(card, monkeypatch):
    """Catches the same before it is captured: what stands for the compiled network here is the network itself."""
    inside = []

    def compiled(what, **_):
        if not isinstance(what, nn.Module):
            return what

        def call(*args):
            inside.append(True)
            try:
                return what(*args)
            finally:
                inside.pop()

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(TrainingStep, "_averaged", lambda self, online: online)
    plant(monkeypatch, lambda: bool(inside))
    step, (warning,), losses = prepared("graphed", paws(), CUDA, steps=14)
    assert step.how == "eager" and step._stream is None and "--step graphed is not used" in warning
    assert "trunk.conv1.weight" in warning and losses == prepared("eager", paws(), CUDA, steps=14)[2]


def test_a_gradient_that_computing_again_loses_is_noticed(monkeypatch):
    """Catches blocks that are not, for backward, what they were."""
    again = []
    leaving_buffers = recompute._leaving_buffers

    @contextmanager
    def noted(*args):
        with leaving_buffers(*args):
            again.append(True)
            try:
                yield
            finally:
                again.pop()

    monkeypatch.setattr(recompute, "_leaving_buffers", noted)
    plant(monkeypatch, lambda: bool(again))
    step, (warning,), losses = prepared("eager-recompute", paws())
    assert step.how == "eager" and "--step eager-recompute is not used" in warning
    assert losses == prepared("eager", paws())[2]


@pytest.mark.parametrize(
    "stages",
    [paws, partial(paws, precision="bf16"), partial(paws, precision="fp16"), supervised, semppl, simclrv2],
    ids=["paws", "bf16", "fp16", "supervised", "semppl", "simclrv2"],
)
@pytest.mark.parametrize("how", ["compiled", "eager-recompute"])
def test_what_is_right_is_used(how, stages, quickly):
    """Catches an alarm where nothing is wrong: a run that is slow for no reason."""
    step, warnings, _ = prepared(how, stages())
    assert (step.how, warnings) == (how, [])


def test_the_check_takes_no_more_memory_than_the_step(monkeypatch):
    """Catches a reference on a whole batch, which an eager step may not fit on the card."""
    monkeypatch.setattr(torch, "compile", lambda what, **_: what)
    monkeypatch.setattr(gradient_check, "compare", lambda *args: {})
    with LiveMemory() as without:
        prepared("compiled", paws(batch_global=256), watch=without)
    monkeypatch.undo()
    monkeypatch.setattr(torch, "compile", lambda what, **_: what)
    with LiveMemory() as with_check:
        step, _, _ = prepared("compiled", paws(batch_global=256), watch=with_check)
    gradients = sum(p.nbytes for p in step.nets.online.parameters())
    assert with_check.peak <= without.peak + 3 * gradients  # on the host, which is the device here
    assert 3 * gradients < 0.05 * without.peak


def test_images_that_repeat_have_the_gradients_of_a_few():
    """Catches a comparison of two different losses."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), GlobalBatchNorm(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).double()
    watched = Watched(net)
    watched(torch.randn(48, 3, 6, 6, dtype=torch.float64))
    assert watched.call is not None and watched.call.lengths == [8] and watched.lengths == [48]
    found = gradient_check.compare(net, watched, nullcontext, dict(net.named_parameters()))
    assert max(c.distance for c in found.values()) < 1e-9 and all(c.is_right for c in found.values())


def test_how_few_images_will_do():
    assert [num_few(n) for n in (1, 8, 16, 22, 26, 27, 338, 37, 512)] == [1, 8, 8, 11, 13, 9, 13, 37, 8]


def test_what_is_right_and_what_is_not():
    """Catches a limit that lets a lost gradient pass where rounding is all there is, as in deep networks' bfloat16."""
    assert Compared(1e-5, 1e-6, 1.0).is_right and Compared(0.3, 0.1, 0.9).is_right and Compared(1.4, 1.3, 0.5).is_right
    assert not Compared(1.0, 1e-6, 0.0).is_right and not Compared(1.0, 1.3, 0.0).is_right
    assert not Compared(0.1, 1e-6, 1.0).is_right and not Compared(0.9, 0.3, 0.1).is_right
    assert not Compared(float("nan"), 0.1, float("nan")).is_right


def test_dead_parameters_are_counted(quickly, monkeypatch):
    """Catches a layer that the loss can no longer reach, and that only the log of weights would show."""
    from fastssl.methods.paws import PawsNet

    lockstep = PawsNet.forward

    def dead(net, xs):
        h, z = lockstep(net, xs)
        return h, [z_ND * 0 + z_ND.detach() for z_ND in z]

    monkeypatch.setattr(PawsNet, "forward", dead)
    step, (warning,), _ = prepared("eager-recompute", paws())
    num = sum(p.requires_grad for p in step.nets.online.parameters())
    assert f"{num} of {num} parameters get a gradient of zero from the loss" in warning
