"""LARS's Triton form against the transcriptions and the foreach form: on a GPU where there is one, else under Triton's
interpreter (conftest.py)."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from fastssl.optim import lars, lars_triton
from fastssl.optim.lars import Foreach, LarsOptimizer
from fastssl.optim.lars_triton import Fused
from tests.unit.optim.test_lars import set_gradients, small_lars, small_params, worst_relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = ("paws", "simclr", "byol")
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")


@pytest.fixture(autouse=True)
def kernels_everywhere(monkeypatch):
    """The kernels take CPU tensors too, which the interpreter reads."""
    monkeypatch.setattr(lars, "_fits_kernels", lambda params: True)


def weights():
    return [w.to(DEVICE) for w in sum(small_params(torch.float32), [])]


def foreach_lars(monkeypatch, start, **settings):
    """`small_lars` whose steps are the foreach form's: its first one is made here, so the form is settled."""
    with monkeypatch.context() as patch:
        patch.setattr(lars, "_fits_kernels", lambda params: False)
        params, opt = small_lars(start, **settings)
        for p in params:
            p.grad = torch.zeros_like(p)
        opt._engine_for([group["params"] for group in opt.param_groups])
    assert isinstance(opt._engine, Foreach)
    return params, opt


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def momenta(opt):
    return [opt.state[p]["momentum_buffer"] for group in opt.param_groups for p in group["params"]]


@pytest.mark.parametrize(("form", "num_steps"), (("paws", 24), ("simclr", 6), ("byol", 6)))
def test_matches_per_tensor_transcription(form, num_steps, monkeypatch):
    """Catches all that the foreach form's test does, and gradients read in another order than weights, tails of chunks,
    a chunk scaled by its neighbour's ratio, chunks counted from another group's first, sums cut off after a block."""
    usual = {"decay": 1e-6, "trust": 0.001, "eps": 1e-8}
    assert worst_relative_error(form, num_steps, torch.float32, **usual, device=DEVICE) < 1e-6
    for name, size in (("CHUNK", 256), ("BLOCK", 64), ("SUMS", 2)):
        monkeypatch.setattr(lars_triton, name, size)
    strong = {"decay": 0.05, "trust": 0.02, "eps": 1e-3}  # every term of the formula shows
    assert worst_relative_error(form, 3, torch.float32, **strong, device=DEVICE) < 2e-6


@pytest.mark.parametrize("form", FORMS)
def test_odd_shapes_and_empty_groups(form, monkeypatch):
    """One element, none, a scalar and a tensor of three chunks; groups without parameters, elements or gradients."""
    found = []
    for fits in (True, False):
        monkeypatch.setattr(lars, "_fits_kernels", lambda params, fits=fits: fits)
        generator = torch.Generator().manual_seed(5)
        shapes = ((0, 3), (1,), (), (40_001,), (3, 1, 5))
        params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE)) for shape in shapes]
        idle = torch.nn.Parameter(torch.ones(3, device=DEVICE))
        groups = [{"params": group} for group in ([], params[:1], params[1:], [idle])]
        opt = LarsOptimizer(groups, lr=0.5, weight_decay=0.01, trust_coefficient=0.1, form=form)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(DEVICE)
            opt.step()
        assert torch.equal(idle, torch.ones_like(idle)) and idle not in opt.state
        assert isinstance(opt._engine, Fused if fits else Foreach)
        found.append(params)
    torch.testing.assert_close(*found, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_finite_stays_in_its_tensor(form):
    """Without a scaler a NaN reaches all of an adapted tensor, of an excluded one its own element, and nothing else."""
    params, opt = small_lars(weights(), lr=0.3, weight_decay=0.01, form=form)
    set_gradients(params, 1)
    params[1].grad[3, 4] = math.nan
    params[5].grad[2] = math.nan
    opt.step()
    lost = [int(p.isnan().sum()) for p in params]
    assert lost == [0, params[1].numel(), 0, 0, 0, 1, 0]


@pytest.mark.parametrize("form", FORMS)
def test_scale_is_undone_and_overflow_skipped_on_the_device(form):
    """Catches a scale that is left out of the norms, and an overflow that reaches a weight or a momentum, by a bit."""
    plain, plain_opt = small_lars(weights(), lr=0.3, weight_decay=0.01, form=form)
    scaled, scaled_opt = small_lars(weights(), lr=0.3, weight_decay=0.01, form=form)
    for step in range(3):
        set_gradients(plain, step)
        plain_opt.step()
        set_gradients(scaled, step)
        for p in scaled:
            p.grad.mul_(512.0)
        scaled_opt.grad_scale = torch.tensor(512.0, device=DEVICE)
        scaled_opt.found_inf = torch.tensor(0.0, device=DEVICE)
        scaled_opt.step()
        assert same(plain, scaled)
        before = [t.clone() for t in scaled + momenta(scaled_opt)]
        for p in scaled:
            p.grad.fill_(math.inf)
        scaled_opt.found_inf = torch.tensor(1.0, device=DEVICE)
        scaled_opt.step()
        assert same(before, scaled + momenta(scaled_opt))
    scaled_opt.grad_scale, scaled_opt.found_inf = None, torch.tensor(0.0, device=DEVICE)  # as after scaler.unscale_
    for params, opt in ((plain, plain_opt), (scaled, scaled_opt)):
        set_gradients(params, 3)
        opt.step()
    assert same(plain, scaled)


@pytest.mark.parametrize("form", FORMS)
def test_rate_may_be_a_tensor(form):
    """Catches a tensor's value that is read once and kept, and a float that is rounded in another way."""
    rate = torch.tensor(0.3, device=DEVICE)
    by_float, float_opt = small_lars(weights(), lr=0.3, weight_decay=0.01, form=form)
    by_tensor, tensor_opt = small_lars(weights(), lr=rate, weight_decay=0.01, form=form)
    for step in range(3):
        rate.fill_(0.3 + 0.1 * step)
        for group in float_opt.param_groups:
            group["lr"] = 0.3 + 0.1 * step
        for params, opt in ((by_float, float_opt), (by_tensor, tensor_opt)):
            set_gradients(params, step)
            opt.step()
        assert same(by_float, by_tensor)


def test_groups_keep_their_own_settings(monkeypatch):
    """Catches a rate, decay or momentum of one group that another one's kernel is given."""
    found = []
    for make in (small_lars, lambda *a, **k: foreach_lars(monkeypatch, *a, **k)):
        params, opt = make(weights(), lr=0.3, weight_decay=0.01, trust_coefficient=0.1)
        opt.param_groups[1].update(lr=0.7, momentum=0.5, weight_decay=0.2, lars_exclude=False)
        for step in range(3):
            set_gradients(params, step)
            opt.step()
        found.append(params)
    torch.testing.assert_close(*found, rtol=2e-6, atol=1e-7)


# ---- state


def test_state_goes_from_one_form_to_the_other_and_back(monkeypatch):
    """A run that changes its device twice is the run that did not: same keys, shapes and memory order of the state."""

    def kernels():
        return small_lars(weights(), lr=0.3, weight_decay=0.01)

    def lists():
        return foreach_lars(monkeypatch, weights(), lr=0.3, weight_decay=0.01)

    stayed, stayed_opt = lists()
    moved, moved_opt = lists()
    for make in (kernels, lists, kernels):
        for step in range(2):
            for params, opt in ((stayed, stayed_opt), (moved, moved_opt)):
                set_gradients(params, step)
                opt.step()
        saved, resumed = copy.deepcopy(moved_opt.state_dict()), make()
        with torch.no_grad():
            for p, w in zip(resumed[0], moved, strict=True):
                p.copy_(w)
        moved, moved_opt = resumed
        monkeypatch.setattr(lars, "_fits_kernels", lambda params, make=make: make is kernels)
        moved_opt.load_state_dict(saved)
        assert saved.keys() == stayed_opt.state_dict().keys()
        for mine, theirs in zip(saved["state"].values(), stayed_opt.state_dict()["state"].values(), strict=True):
            assert mine.keys() == theirs.keys() == {"momentum_buffer"}
            assert mine["momentum_buffer"].stride() == theirs["momentum_buffer"].stride()
    set_gradients(moved, 9)
    set_gradients(stayed, 9)
    moved_opt.step()
    stayed_opt.step()
    assert isinstance(moved_opt._engine, Fused)
    torch.testing.assert_close(moved, stayed, rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(momenta(moved_opt), momenta(stayed_opt), rtol=2e-6, atol=1e-7)


def test_resumes_bitwise():
    """Catches momenta that load beside the table of addresses and are then ignored."""
    whole, whole_opt = small_lars(weights(), lr=0.3, weight_decay=0.01)
    for step in range(4):
        if step == 2:
            saved = copy.deepcopy(([p.detach() for p in whole], whole_opt.state_dict()))
        set_gradients(whole, step)
        whole_opt.step()
    resumed, resumed_opt = small_lars(weights(), lr=0.3, weight_decay=0.01)
    set_gradients(resumed, 99)
    resumed_opt.step()  # a throw-away step before loading, as after a warm-up
    with torch.no_grad():
        for p, w in zip(resumed, saved[0], strict=True):
            p.copy_(w)
    resumed_opt.load_state_dict(saved[1])
    for step in (2, 3):
        set_gradients(resumed, step)
        resumed_opt.step()
    assert same(whole, resumed)


# ---- where things lie


def test_gradients_may_move_or_turn_between_steps():
    """Catches a table of addresses that is not renewed: gradients elsewhere, and at the same place in another order."""
    square, reference = (torch.nn.Parameter(torch.arange(16.0, device=DEVICE).view(4, 4)) for _ in range(2))
    opt, reference_opt = (LarsOptimizer([p], lr=0.3, weight_decay=0.1) for p in (square, reference))
    kept = [torch.randn(4, 4, generator=torch.Generator().manual_seed(k)).to(DEVICE) for k in range(3)]
    for gradient in (*kept, kept[2].t()):
        square.grad, reference.grad = gradient, gradient.clone(memory_format=torch.contiguous_format)
        opt.step()
        reference_opt.step()
        assert torch.equal(square, reference)


def test_memory_order_of_gradients_does_not_matter():
    """A channels-last weight takes a row-major gradient, one of its own order, one spread out from a single number, and
    one whose stride differs only on an axis of one element, which needs no copy."""
    start = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    last = torch.channels_last
    row_major = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for gradient in (row_major, torch.ones((), device=DEVICE).expand(6, 4, 3, 3)):
        found = []
        for weight, g in ((start.contiguous(memory_format=last), gradient), (start, gradient.contiguous())):
            p = torch.nn.Parameter(weight.clone())
            p.grad = g
            opt = LarsOptimizer([{"params": [p], "lars_exclude": True}], lr=0.3)
            opt.step()
            assert opt.state[p]["momentum_buffer"].stride() == p.stride() == weight.stride()
            found.append(p)
        assert torch.equal(*found)
    pointwise = torch.nn.Parameter(torch.ones(8, 4, 1, 1, device=DEVICE))
    pointwise.grad = torch.ones(8, 4, device=DEVICE).as_strided((8, 4, 1, 1), (4, 1, 4, 4))
    opt = LarsOptimizer([pointwise], lr=0.3)
    opt.step()
    assert not opt._engine._gradients.copies


def test_addresses_are_written_only_when_one_has_changed():
    """Catches a table that is made anew each step."""
    params, opt = small_lars(weights(), lr=0.3)
    set_gradients(params, 0)
    opt.step()
    table_T = opt._engine._gradients.table_T
    opt.step()
    assert opt._engine._gradients.table_T is table_T
    params[3].grad = params[3].grad.clone()
    opt.step()
    moved = opt._engine._gradients
    assert moved.table_T is not table_T and moved.table_T[3] == params[3].grad.data_ptr()


def test_wide_loads_only_where_every_address_and_size_allows():
    """Sixteen bytes at a time from a tensor that begins at an odd element would fault on a GPU."""
    for numel, offset, align in ((64, 0, 16), (63, 0, 4), (64, 1, 4)):
        p = torch.nn.Parameter(torch.ones(numel, device=DEVICE))
        p.grad = torch.ones(numel + offset, device=DEVICE)[offset:]
        opt = LarsOptimizer([p], lr=0.3)
        opt.step()
        assert opt._engine._gradients.align == align


# ---- on a GPU


@needs_gpu
@pytest.mark.parametrize("scaled", (False, True))
def test_nothing_waits_and_runs_agree(scaled):
    """Steps under torch's error on synchronisation, moved gradients included; two runs agree to the last bit."""
    runs = []
    for _ in range(2):
        params, opt = small_lars(weights(), lr=0.3, weight_decay=0.01)
        set_gradients(params, 0)
        opt.step()
        generator = torch.Generator().manual_seed(7)
        gradients = [[torch.randn(p.shape, generator=generator).to(DEVICE) for p in params] for _ in range(2)]
        scale = torch.tensor(2.0, device=DEVICE), torch.tensor(0.0, device=DEVICE)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            if scaled:
                opt.grad_scale, opt.found_inf = scale
            for row in gradients:
                for p, g in zip(params, row, strict=True):
                    p.grad = g
                opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        runs.append(params)
    assert same(*runs)


@needs_gpu
def test_a_captured_step_is_an_ordinary_one():
    """Catches a captured step that reads where gradients lay before it, a rate baked in, and ordinary steps between two
    runs of a graph that leave it another table."""
    captured, captured_opt = small_lars(weights(), lr=torch.tensor(0.3, device=DEVICE), weight_decay=0.01)
    plain, plain_opt = small_lars(weights(), lr=torch.tensor(0.3, device=DEVICE), weight_decay=0.01)
    for params, opt in ((captured, captured_opt), (plain, plain_opt)):
        set_gradients(params, 0)
        opt.step()
    static = [torch.empty_like(p) for p in captured]
    for p, g in zip(captured, static, strict=True):
        p.grad = g
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured_opt.step()
    for step in range(1, 6):
        for opt in (captured_opt, plain_opt):
            opt.param_groups[0]["lr"].fill_(0.3 + 0.1 * step)
        set_gradients(plain, step)
        plain_opt.step()
        if step == 3:
            set_gradients(captured, step)
            captured_opt.step()
        else:
            for g, p in zip(static, plain, strict=True):
                g.copy_(p.grad)
            graph.replay()
        assert same(captured, plain)
