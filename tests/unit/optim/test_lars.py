"""LARS against slow per-tensor transcriptions of its sources, and what a step costs in dispatches and launches."""

import copy
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastssl.nn.heads import prediction_head, projection_head
from fastssl.nn.trunks.resnet import resnet
from fastssl.optim.lars import ROW, LarsOptimizer, _dense_stride
from fastssl.optim.param_groups import lars_groups


def paws_reference(w, g, v, lr, momentum, decay, trust, eps, exclude):
    """PAWS's released optimiser, one tensor, Python numbers."""
    if not exclude:
        w_norm, g_norm = w.norm().item(), g.norm().item()
        if w_norm != 0 and g_norm != 0:
            ratio = trust * w_norm / (g_norm + decay * w_norm + eps)
            g = ratio * (g + decay * w)
    v = momentum * v - lr * g
    return w + v, v


def simclr_reference(w, g, v, lr, momentum, decay, trust, eps, exclude):
    """SimCLR's LARS: decay before the norm, no eps, rate inside the buffer."""
    ratio = 1.0
    if not exclude:
        g = g + decay * w
        w_norm, g_norm = w.norm().item(), g.norm().item()
        if w_norm != 0 and g_norm != 0:
            ratio = trust * w_norm / g_norm
    v = momentum * v + lr * ratio * g
    return w - v, v


def byol_reference(w, g, v, lr, momentum, decay, trust, eps, exclude):
    """BYOL's LARS: SimCLR's ratio, rate outside the buffer."""
    ratio = 1.0
    if not exclude:
        g = g + decay * w
        w_norm, g_norm = w.norm().item(), g.norm().item()
        if w_norm != 0 and g_norm != 0:
            ratio = trust * w_norm / g_norm
    v = momentum * v + ratio * g
    return w - lr * v, v


REFERENCES = {"paws": paws_reference, "simclr": simclr_reference, "byol": byol_reference}


def small_params(dtype):
    """Adapted: a channels-last kernel, a matrix over one row, one of exactly a row, a zero weight; two excluded."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    kernel = draw(6, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    adapted = [kernel, draw(37, 29), draw(ROW // 8, 8), torch.zeros(5, 7, dtype=dtype), draw(4, 4)]
    excluded = [draw(11), torch.zeros(3, dtype=dtype)]
    return adapted, excluded


def set_gradients(params, step):
    """Keyed gradients, row-major whatever the weight's memory order, each on a scale of its own; the fifth tensor's is
    zero on every third step."""
    generator = torch.Generator().manual_seed(1000 + step)
    for index, p in enumerate(params):
        g = torch.randn(p.shape, generator=generator, dtype=p.dtype) * 10.0 ** (index - 3)
        p.grad = (g.mul_(0) if index == 4 and step % 3 == 0 else g).to(p.device)


def small_lars(weights, **settings):
    """Parameters that start at copies of `weights` as `small_params` gives them, and their optimiser."""
    params = [torch.nn.Parameter(w.clone()) for w in weights]
    return params, LarsOptimizer([{"params": params[:5]}, {"params": params[5:], "lars_exclude": True}], **settings)


def worst_relative_error(form, num_steps, dtype, decay, trust, eps, device="cpu"):
    """Largest ‖fast - slow‖/‖slow‖ of any tensor at any step, the slow one in float64, under a moving rate."""
    weights = [w.to(device) for w in sum(small_params(dtype), [])]
    settings = {"weight_decay": decay, "trust_coefficient": trust, "eps": eps}
    params, opt = small_lars(weights, lr=1.0, form=form, **settings)
    slow = [(w.double(), torch.zeros_like(w, dtype=torch.float64)) for w in weights]
    worst = 0.0
    for step in range(num_steps):
        lr = 0.3 + 0.25 * math.sin(step / 7)
        for group in opt.param_groups:
            group["lr"] = lr
        set_gradients(params, step)
        slow = [
            REFERENCES[form](w, p.grad.double(), v, lr, 0.9, decay, trust, eps, exclude=index >= 5)
            for index, (p, (w, v)) in enumerate(zip(params, slow, strict=True))
        ]
        opt.step()
        for p, (w, _) in zip(params, slow, strict=True):
            worst = max(worst, ((p.double() - w).norm() / w.norm().clamp_min(1e-30)).item())
    return worst


@pytest.mark.parametrize("form, num_steps", [("paws", 100), ("simclr", 20), ("byol", 20)])
def test_matches_per_tensor_transcription(form, num_steps):
    """Catches the rate on the wrong side of the buffer (the rate moves), decay on the wrong side of the norm, a decayed
    zero gradient, a silenced zero weight, an adapted excluded group, and elements scaled by a neighbour's ratio."""
    strong = {"decay": 0.05, "trust": 0.02, "eps": 1e-3}  # every term of the formula shows
    assert worst_relative_error(form, num_steps, torch.float64, **strong) < 1e-12
    assert worst_relative_error(form, num_steps, torch.float32, decay=1e-6, trust=0.001, eps=1e-8) < 1e-6


def test_zero_weight_and_zero_gradient_by_hand():
    """Paws form: w = 0 takes the raw gradient at the plain rate; g = 0 leaves w, decay or no decay."""
    zero_w, zero_g = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.ones(2, 2))
    zero_w.grad, zero_g.grad = torch.full((2, 2), 0.5), torch.zeros(2, 2)
    LarsOptimizer([zero_w, zero_g], lr=2.0, weight_decay=0.1).step()
    assert torch.equal(zero_w, torch.full((2, 2), -1.0))
    assert torch.equal(zero_g, torch.ones(2, 2))


def test_first_step_of_byol_form_by_hand():
    """lr 4.8, decay 1e-6, w = 1 (3x2), g = 0.5: -0.0048; an excluded tensor: -2.4."""
    kernel, bias = torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(3))
    kernel.grad, bias.grad = torch.full((3, 2), 0.5), torch.full((3,), 0.5)
    groups = [{"params": [kernel]}, {"params": [bias], "lars_exclude": True}]
    LarsOptimizer(groups, lr=4.8, weight_decay=1e-6, form="byol").step()
    assert (kernel - 1).detach().numpy() == pytest.approx(-0.0048, rel=1e-4)
    assert (bias - 1).detach().numpy() == pytest.approx(-2.4, rel=1e-6)


def test_state_round_trips_bitwise():
    """A run resumed from state_dict equals the uninterrupted one to the last bit (catches momenta that load beside the
    flat buffer and are then ignored)."""

    def make():
        return small_lars(sum(small_params(torch.float32), []), lr=0.3, weight_decay=0.01)

    params, opt = make()
    for step in range(10):
        if step == 5:
            saved = copy.deepcopy(([p.detach() for p in params], opt.state_dict()))
        set_gradients(params, step)
        opt.step()

    resumed, resumed_opt = make()
    set_gradients(resumed, 99)
    resumed_opt.step()  # a throw-away step before loading, as after a warm-up
    with torch.no_grad():
        for p, w in zip(resumed, saved[0], strict=True):
            p.copy_(w)
    resumed_opt.load_state_dict(saved[1])
    for step in range(5, 10):
        set_gradients(resumed, step)
        resumed_opt.step()
    assert all(torch.equal(a, b) for a, b in zip(params, resumed, strict=True))


@pytest.mark.parametrize("form", ["paws", "simclr", "byol"])
def test_rate_may_be_a_tensor(form):
    """A 0-dim float32 tensor that is refilled gives the bits that a Python float gives; 0.3 is no float32."""
    weights = sum(small_params(torch.float32), [])
    by_float, float_opt = small_lars(weights, lr=0.3, weight_decay=0.01, form=form)
    rate = torch.tensor(0.3)
    by_tensor, tensor_opt = small_lars(weights, lr=rate, weight_decay=0.01, form=form)
    for step in range(4):
        rate.fill_(0.3 + 0.1 * step)
        for group in float_opt.param_groups:
            group["lr"] = 0.3 + 0.1 * step
        for params, opt in ((by_float, float_opt), (by_tensor, tensor_opt)):
            set_gradients(params, step)
            opt.step()
        assert all(torch.equal(a, b) for a, b in zip(by_float, by_tensor, strict=True))


def test_weight_with_gaps_in_its_memory():
    """Every other column of a matrix moves, the rest stays; such a weight is not one run of memory to a kernel."""
    matrix = torch.ones(4, 6)
    w = torch.nn.Parameter(matrix[:, ::2])
    assert _dense_stride(w) != w.stride() and _dense_stride(matrix) == matrix.stride()
    w.grad = torch.full((4, 3), 0.5)
    LarsOptimizer([{"params": [w], "lars_exclude": True}], lr=1.0).step()
    assert torch.equal(matrix, torch.tensor([[0.5, 1.0] * 3] * 4))


def test_weights_that_move_keep_their_momenta():
    """A weight taken to another memory order between steps goes on as if it had stayed."""
    weights = sum(small_params(torch.float32), [])
    stayed, stayed_opt = small_lars(weights, lr=0.3, weight_decay=0.01)
    moved, moved_opt = small_lars(weights, lr=0.3, weight_decay=0.01)
    for step in range(3):
        for params, opt in ((stayed, stayed_opt), (moved, moved_opt)):
            set_gradients(params, step)
            opt.step()
        moved[0].data = moved[0].data.contiguous()
    buffer = moved_opt.state[moved[0]]["momentum_buffer"]
    assert buffer.stride() == moved[0].stride() != stayed[0].stride()
    torch.testing.assert_close(moved, stayed)


def test_parameter_without_gradient_is_left_alone():
    """Its weight and its momentum stay, and return to use when a gradient comes back."""
    a, b = torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4, 4))
    opt = LarsOptimizer([a, b], lr=0.1)
    a.grad, b.grad = torch.ones(4, 4), torch.ones(4, 4)
    opt.step()
    kept, momentum = b.detach().clone(), opt.state[b]["momentum_buffer"].clone()
    b.grad = None
    opt.step()
    assert torch.equal(b, kept) and torch.equal(opt.state[b]["momentum_buffer"], momentum)
    b.grad = torch.zeros(4, 4)
    opt.step()
    torch.testing.assert_close(b.detach(), kept + 0.9 * momentum)


def test_mistaken_settings_are_refused():
    with pytest.raises(ValueError, match="one of paws, simclr, byol"):
        LarsOptimizer([torch.zeros(2, 2)], lr=0.1, form="apex")
    with pytest.raises(ValueError, match="weight_decay"):
        LarsOptimizer([torch.zeros(2, 2)], lr=0.1, weight_decay=-1.0)
    mixed = [torch.nn.Parameter(torch.zeros(2, 2, dtype=dtype)) for dtype in (torch.float32, torch.float64)]
    for p in mixed:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="one dtype on one device"):
        LarsOptimizer(mixed, lr=0.1).step()


# ---- cost


def fast_route(args):
    """torch's own condition for one fused foreach kernel: matching sizes, strides, dtypes in every list given."""
    lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], torch.Tensor)]
    first = lists[0]
    return all(
        len(other) == len(first)
        and all(
            a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype
            for a, b in zip(first, other, strict=True)
        )
        for other in lists[1:]
    )


def launches(name, args):
    """CUDA kernels one dispatch stands for, from torch's multi-tensor limits: at most 110/64/48 tensors of 1/2/3 lists
    and 320 chunks of 65,536 elements a launch; a norm adds its clean-up, a stack takes 128 tensors a launch."""
    if name.startswith("_foreach"):
        lists = [a for a in args if isinstance(a, (list, tuple)) and a and isinstance(a[0], torch.Tensor)]
        num_chunks = sum(-(-t.numel() // 65536) for t in lists[0])
        per_list = max(-(-len(lists[0]) // (110, 64, 48)[len(lists) - 1]), -(-num_chunks // 320))
        return per_list + ("norm" in name)
    if name.startswith("stack"):
        return -(-len(args[0]) // 128)
    return 0 if name.startswith("split") else 1


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names, self.num_launches, self.slow = [], 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        if name.startswith("_record_function"):  # torch.optim's marker for profilers
            return func(*args, **(kwargs or {}))
        self.names.append(name)
        if name.startswith("_foreach") and not fast_route(args):
            self.slow.append(name)
        self.num_launches += launches(name, args)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def resnet50():
    """PAWS's ResNet-50 with both heads, channels-last, every weight 0.01 and every gradient 0.001."""
    torch.set_num_threads(1)
    with torch.device("meta"):
        parts = {"trunk": resnet(50), "proj": projection_head(2048, 2048), "pred": prediction_head(2048)}
    module = torch.nn.ModuleDict(parts).to_empty(device="cpu").to(memory_format=torch.channels_last)
    for p in module.parameters():
        torch.nn.init.constant_(p, 0.01)
        p.grad = torch.full_like(p, 1e-3)
    return module


def test_groups_of_resnet50(resnet50):
    """The authors' names leave the four shortcut norms under LARS: 62 tensors; the paper's rule excludes them: 58."""
    assert len(list(resnet50.parameters())) == 177
    assert sum(p.numel() for p in resnet50.parameters()) == 38_210_112
    counts = {rule: [len(g["params"]) for g in lars_groups(resnet50, rule)] for rule in ("paper", "authors")}
    assert counts == {"paper": [58, 119], "authors": [62, 115]}
    paper, authors = ({name for name, _ in lars_groups(resnet50, rule)[0]["params"]} for rule in counts)
    assert authors - paper == {f"trunk.layer{stage}.0.downsample.1.weight" for stage in (1, 2, 3, 4)}
    with pytest.raises(ValueError, match="paper, authors"):
        lars_groups(resnet50, "names")


@pytest.mark.parametrize(
    "form, scaled, rate, num_dispatches",
    [
        ("paws", False, 0.3, 21),
        ("paws", False, torch.tensor(0.3), 23),
        ("simclr", False, 0.3, 19),
        ("byol", False, 0.3, 21),
        ("byol", False, torch.tensor(0.3), 23),
        ("paws", True, 0.3, 25),
    ],
)
def test_step_is_few_operations_and_no_sync(resnet50, form, scaled, rate, num_dispatches):
    """At most 25 dispatches and about 40 launches for 177 tensors; no foreach call off its fused route; no wait."""
    opt = LarsOptimizer(lars_groups(resnet50, "authors"), lr=rate, weight_decay=1e-6, form=form)
    opt.step()
    if scaled:
        opt.grad_scale, opt.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    with Count() as count:
        opt.step()
    assert len(count.names) == num_dispatches, count.names
    assert count.num_launches <= 45
    assert count.slow == []
    assert not {"_local_scalar_dense.default", "_to_copy.default", "nonzero.default"} & set(count.names)


# ---- loss scaling


def scaled_step(scaler, params, opt, gradient):
    """One step of `opt` whose scaled gradients are `gradient` times the scale."""
    opt.zero_grad()
    loss = sum((p * gradient).sum() for p in params)
    scaler.scale(loss).backward()
    scaler.step(opt)
    scaler.update()


@pytest.mark.parametrize("form", ["paws", "simclr", "byol"])
def test_grad_scaler_unscales_and_skips_on_the_device(form):
    """Scaled and unscaled runs agree exactly (the scale is a power of two); an overflow changes neither weights nor
    momenta by a bit, and the next step goes on as if it had not been."""

    def make():
        return small_lars(sum(small_params(torch.float32), []), lr=0.2, weight_decay=0.01, form=form)

    plain, plain_opt = make()
    scaled, scaled_opt = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for gradient in (0.5, 0.25):
        for p in plain:
            p.grad = torch.full_like(p, gradient)
        plain_opt.step()
        scaled_step(scaler, scaled, scaled_opt, gradient)
        assert all(torch.equal(a, b) for a, b in zip(plain, scaled, strict=True))
        before = copy.deepcopy(([p.detach() for p in scaled], scaled_opt.state_dict()["state"]))
        scaled_step(scaler, scaled, scaled_opt, math.inf)
        after = [p.detach() for p in scaled], scaled_opt.state_dict()["state"]
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(before), tree_leaves(after), strict=True))
    assert scaler.get_scale() == 2.0**8  # both overflows were seen


def test_unscaled_gradients_are_not_unscaled_twice():
    """After scaler.unscale_ (clipping) the scaler passes no scale."""
    p = torch.nn.Parameter(torch.zeros(2, 2))
    opt, scaler = LarsOptimizer([p], lr=1.0), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(p.sum()).backward()
    scaler.unscale_(opt)
    scaler.step(opt)
    assert torch.equal(p, torch.full((2, 2), -1.0))
