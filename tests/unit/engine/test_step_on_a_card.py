"""The step on a GPU that is not there (`tests.support.card`): what would end, slow or spoil the first run on one."""

from __future__ import annotations

import threading

import pytest
import torch
import torch.distributed as td

from fastssl.engine import step as step_module
from fastssl.engine.step import WARM_UP_STEPS, TrainingStep
from fastssl.methods.base import Epochs
from fastssl.optim.adamw import AdamW
from fastssl.optim.rates import WarmupCosine
from tests.support.card import Card, Event
from tests.support.stepped import stepped
from tests.test_every_method import paws, supervised

CUDA = torch.device("cuda", 0)
STEPS = WARM_UP_STEPS + 4


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda what, **_: what)  # what is captured is the eager network
    with Card(monkeypatch) as card:
        yield card


@pytest.fixture
def one_rank(tmp_path):
    """A process group of one, in which gradients are averaged."""
    td.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    td.destroy_process_group()


@pytest.mark.parametrize(("capability", "how"), [((9, 0), "compiled"), ((8, 0), "compiled"), ((7, 0), "eager")])
def test_the_default_follows_the_gpu_which_is_asked_once(card, monkeypatch, capability, how):
    """Catches a V100 that is handed what Triton generates, and a driver that is asked 800 times a step."""
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: asked.append(device) or capability)
    assert {step_module.default_how(CUDA) for _ in range(100)} == {how}
    assert len(asked) == 1


@pytest.mark.parametrize("keeps_all", [False, True])
def test_norms_are_computed_again_unless_there_is_room(card, monkeypatch, keeps_all):
    told = []
    monkeypatch.setattr(step_module, "keep_what_is_dear", told.append)
    stepped("compiled", supervised(), CUDA, 1, keeps_all=keeps_all)
    assert told == [not keeps_all]


def on_a_card(how, stages, steps=STEPS):
    return stepped(how, stages, CUDA, steps)


def slow_paws():
    return paws(rate=WarmupCosine(0.1, Epochs(5), start=0.8, final=0.032))  # fast, it is done before a graph is warm


def with_adamw():
    return supervised(optimizer=AdamW(), rate=WarmupCosine(0.001))


@pytest.mark.parametrize("stages", [slow_paws, supervised, with_adamw], ids=["LARS", "SGD", "AdamW"])
def test_a_graph_of_each_optimiser_is_captured_and_does_the_eager_steps(card, stages):
    """Catches an optimiser that asks the host for its rate while a graph is captured, a rate that a graph has frozen,
    a batch it does not read, a gradient that adds up from replay to replay."""
    _, _, eager = on_a_card("eager", stages())
    step, warnings, graphed = on_a_card("graphed", stages())
    assert (step.how, warnings) == ("graphed", [])
    assert step._graph is not None and graphed == pytest.approx(eager, rel=1e-3, abs=2e-4)


def test_what_is_captured_with_ddp_was_made_on_the_graphs_own_stream(card, one_rank, monkeypatch):
    """Catches DDP made, or warmed up, on another stream than the one that captures: the capture ends in
    cudaErrorStreamCaptureImplicit."""
    averaged = step_module.DistributedDataParallel
    monkeypatch.setattr(TrainingStep, "_averaged", lambda self, online: averaged(online, broadcast_buffers=False))
    step, warnings, _ = on_a_card("graphed", supervised())
    assert (step.how, warnings) == ("graphed", []) and step._graph is not None
    assert card.captures[0]["stream"] is step._stream


def test_warming_up_for_a_graph_takes_one_stream(card):
    """Catches a stream, and so a pool of memory with all activations, for each of the steps before the capture."""
    on_a_card("graphed", paws())
    assert len(card.streams) == 1


def test_a_loader_may_allocate_while_a_graph_is_captured(card, monkeypatch):
    """Catches a capture that is spoilt by the planning thread: a run that starts only sometimes."""
    failed = []

    def allocate_meanwhile(step, batch):
        def plan():
            try:
                with card.mode():
                    torch.empty(1 << 10, pin_memory=True)
            except RuntimeError as error:
                failed.append(error)

        if card.capturing is not None:
            thread = threading.Thread(target=plan)
            thread.start()
            thread.join()
        return original(step, batch)

    original = TrainingStep._forward_backward_update
    monkeypatch.setattr(TrainingStep, "_forward_backward_update", allocate_meanwhile)
    step, warnings, _ = on_a_card("graphed", paws())
    assert failed == [] and (step.how, warnings) == ("graphed", [])


def test_a_graph_that_does_another_step_is_not_used(card, monkeypatch):
    """Catches a replay that leaves something out: training goes on, with weights that do not move as they should."""
    from fastssl.engine.graph import Graph

    replay = Graph.replay

    def forgets(graph, batch):
        graph.graph.calls = graph.graph.calls[:-20]  # of the optimiser's
        return replay(graph, batch)

    _, _, eager = on_a_card("eager", supervised())
    monkeypatch.setattr(Graph, "replay", forgets)
    step, (warning,), same = on_a_card("graphed", supervised())
    assert step.how == "compiled" and "a replay moves the weights" in warning
    assert same == pytest.approx(eager, rel=1e-4)


def test_sgd_under_fp16_waits_for_no_verdict(card):
    """Catches torch's SGD asking, each step, whether a gradient has overflowed."""
    step, _, _ = on_a_card("eager", supervised(precision="fp16"), steps=2)
    assert step.optimizer._step_supports_amp_scaling and all(g["fused"] for g in step.optimizer.param_groups)


def test_the_host_runs_two_steps_ahead_at_most(card):
    """Catches batches that pile up on the card, and clocks that measure how fast work is queued."""
    Event.num_waits = 0
    on_a_card("eager", paws(), steps=6)
    assert Event.num_waits == 6 - step_module.NUM_AHEAD
