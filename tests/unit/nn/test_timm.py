"""timm's backbones as encoders, against timm itself. Skips where timm, or the torchvision that it needs, is missing."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from fastssl import dist
from fastssl.costs.cost import ours
from fastssl.costs.trace import trace_step
from fastssl.errors import ConfigError
from fastssl.methods.base import Facts, Nets
from fastssl.nn.encoders import timm_models
from fastssl.nn.encoders.resnet import ResNet
from fastssl.nn.encoders.timm_models import Timm
from fastssl.nn.encoders.vit import ViT
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from fastssl.nn.norm.group_batch_norm import GroupBatchNorm
from fastssl.optim.param_groups import kernel_names
from fastssl.recipes.resolve import resolve
from fastssl.weights.read import load_whole, read_weights
from loaders.batch import Batch, Part
from tests.ranks.pool import run_ranks
from tests.support.definitions import with_moved_norms

try:
    import timm
except ImportError as error:
    pytest.skip(f"the extra `timm` is missing: {error}", allow_module_level=True)

MODELS = (
    "resnet18", "resnet50", "vit_small_patch16_224", "vit_tiny_patch16_224", "convnext_atto", "efficientnet_b0",
    "regnety_002",
)  # fmt: skip
IMAGENET = Facts(1000, 3, 0)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def of_timm(model: str) -> nn.Module:
    sizes = {"dynamic_img_size": True} if model.startswith("vit") else {}
    return timm.create_model(model, num_classes=0, **sizes)


@pytest.mark.parametrize("model", MODELS)
def test_features_are_timm_s_to_the_bit(model):
    """On crops of two sizes, with weights that go from one to the other under timm's names. Catches an activation that
    goes with its batch norm, another epsilon, a head that stays, positions that are not interpolated."""
    theirs = with_moved_norms(of_timm(model)).eval()
    trunk = Timm(model).build().eval()
    trunk.load_state_dict(theirs.state_dict())
    assert trunk.state_dict().keys() == theirs.state_dict().keys()
    for size in (224, 96):
        x = torch.randn(2, 3, size, size)
        with torch.no_grad():
            features = trunk(x)
            assert torch.equal(features, theirs(x)) and features.shape == (2, trunk.num_features)


@pytest.mark.parametrize("model", ["efficientnet_b0", "regnety_002", "resnet18"])
def test_every_batch_norm_is_ours_with_timm_s_settings(model):
    """Catches a norm of a kind that is overlooked, and what timm sets apart: momenta, epsilons."""
    theirs = [m for m in of_timm(model).modules() if isinstance(m, _BatchNorm)]
    norms = [m for m in Timm(model).build().modules() if isinstance(m, _BatchNorm)]
    assert all(isinstance(m, GlobalBatchNorm) for m in norms) and len(norms) == len(theirs) > 15
    assert [(m.eps, m.momentum) for m in norms] == [(m.eps, m.momentum) for m in theirs]
    grouped = Timm(model).build(norm=partial(GroupBatchNorm, num_groups=2, eps=1e-3))
    kinds = {(type(m), m.eps) for m in grouped.modules() if isinstance(m, _BatchNorm)}
    assert kinds == {(GroupBatchNorm, 1e-3)}


def test_our_vision_transformer_is_timm_s():
    """Ours, with timm's weights, on both crop sizes, to the bit; and DINOv2's kind, with registers and layer scale."""
    pairs = {
        "vit_small_patch16_224": ViT(),
        "vit_small_patch14_reg4_dinov2": ViT(518, 14, registers=4, layer_scale=1e-5),
    }
    for model, encoder in pairs.items():
        theirs, trunk = of_timm(model).eval(), encoder.build().eval()
        trunk.load_state_dict(theirs.state_dict())
        for size in (encoder.patch * 8, encoder.patch * 5):
            x = torch.randn(2, 3, size, size)
            with torch.no_grad():
                assert torch.equal(trunk(x), theirs(x))


def test_a_published_dinov3_goes_into_timm_s_network(tmp_path):
    """A file of its structure, made from timm's network by the names of DINOv3's own code."""
    model = "vit_small_patch16_dinov3"
    theirs, published = of_timm(model).eval(), {}
    for key, t in theirs.state_dict().items():
        published[key.replace("reg_token", "storage_tokens").replace("gamma_", "ls")] = t
    published = {k + ".gamma" if k.endswith((".ls1", ".ls2")) else k: t for k, t in published.items()}
    published |= {
        f"blocks.{n}.attn.qkv.{name}": torch.zeros(3 * 384) for n in range(12) for name in ("bias", "bias_mask")
    }
    published |= {"mask_token": torch.zeros(1, 384), "rope_embed.periods": torch.ones(16)}
    torch.save(published, tmp_path / "dinov3.pth")
    trunk = Timm(model).build().eval()
    load_whole(trunk, read_weights(tmp_path / "dinov3.pth").part("trunk"), "it")
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(trunk(x), theirs(x))


def test_what_is_decayed_is_what_timm_decays():
    trunk = Timm("vit_small_patch16_224").build()
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    kernels = {f"model.blocks.{n}.{layer}.weight" for n in range(12) for layer in layers}
    assert kernel_names(trunk) == kernels | {"model.patch_embed.proj.weight"}


def test_one_channel_and_features_of_another_width_than_timm_says():
    """MobileNetV3's head widens what timm calls its features."""
    trunk = Timm("mobilenetv3_small_100").build(in_channels=1).eval()
    assert trunk.num_features == 1024 and trunk(torch.randn(2, 1, 32, 32)).shape == (2, 1024)


# ------------------------------------------------------------------------------------------------------------ training


def small_method(encoder):
    """PAWS's headline recipe at a size that a CPU runs, and its networks in float64."""
    changes = ("global_view.size=32", "small_view.size=32", "small_view.copies=2", "batch_global=4", "classes_global=4",
               "images_per_class=2", "out_features=8", "precision=fp32", "hidden_features=16")  # fmt: skip
    (stage,) = resolve("paws.rn50_100ep", changes)
    torch.manual_seed(0)
    method = stage.with_settings(encoder=encoder).config.build(IMAGENET, {})
    nets = method.nets()
    nets.online.double().train()
    return method, nets


def drawn_batch(method, seed=0):
    """This rank's share of a batch of noise."""
    parts, generator = {}, torch.Generator().manual_seed(seed)
    for stream in method.plan().streams:
        images = stream.batch_global
        mine = slice(dist.rank() * images // dist.world_size(), (dist.rank() + 1) * images // dist.world_size())
        x = {}
        for view in stream.views:
            shape = (view.copies, images, 3, view.size, view.size)
            x[view.name] = torch.randn(shape, dtype=torch.float64, generator=generator)[:, mine].flatten(0, 1)
        columns = (torch.arange(images) // 2)[mine]
        parts[stream.name] = Part(x, columns, columns, columns, columns, columns)
    return Batch(parts, torch.tensor(0))


def test_timm_s_resnet_50_trains_as_ours():
    """Three steps of PAWS in float64, from the same weights. Catches statistics that move in another order over the
    resolutions, and a gradient that is lost on the way through timm's network."""
    both = [small_method(encoder) for encoder in (ResNet(50), Timm("resnet50"))]
    both[1][1].online.load_state_dict(both[0][1].online.state_dict())
    found = []
    for method, nets in both:
        optimizer = torch.optim.SGD(nets.online.parameters(), lr=0.05)
        losses = []
        for seed in range(3):
            total = method.loss(nets, drawn_batch(method, seed))["total"]
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            losses.append(total.item())
        found.append(losses + [value.double().norm().item() for value in nets.online.state_dict().values()])
    assert found[0] == pytest.approx(found[1], rel=1e-9, abs=1e-9)
    assert abs(found[0][0] - found[0][2]) > 1e-3


def gradients(model):
    """Loss, gradients averaged over ranks, and running statistics."""
    method, nets = small_method(Timm(model))
    online = nets.online
    if dist.world_size() > 1:
        online = DistributedDataParallel(online, broadcast_buffers=False)
    total = method.loss(Nets(online), drawn_batch(method))["total"]
    total.backward()
    return total.item(), {
        **{name: p.grad for name, p in nets.online.named_parameters()},
        **{name: b for name, b in nets.online.named_buffers() if "running" in name},
    }


@pytest.mark.parametrize("model", ["regnety_002", "vit_tiny_patch16_224"])
def test_two_ranks_equal_one_process(model):
    """Catches a norm that sees its rank's rows only, also where an activation comes with it."""
    (total, alone), ranks = gradients(model), run_ranks(2, gradients, model)
    whole = torch.cat([value.flatten() for value in alone.values()]).norm()
    assert sum(of_rank for of_rank, _ in ranks) / 2 == pytest.approx(total, rel=1e-9)
    for name, value in alone.items():
        for _, together in ranks:
            error = (together[name] - value).norm() / torch.maximum(value.norm(), whole * 1e-3)
            assert error < 1e-9, name


@pytest.mark.parametrize("model", ["efficientnet_b0", "vit_tiny_patch16_224"])
def test_its_step_is_counted(model):
    """On shapes alone. Catches initial weights that are drawn by value, and attention that is not seen."""
    (stage,) = resolve("paws.rn50_100ep", ("small_view.size=96", "small_view.copies=1"))
    cost = ours(trace_step(stage.with_settings(encoder=Timm(model)), IMAGENET, 64))
    assert (cost.flops["attention"] > 0) == model.startswith("vit")
    large, small = 2 * 4096 + 6720, 4096
    if model.startswith("vit"):
        assert cost.flops["attention"] == 7 * 12 * 2 * 192 * (large * 197**2 + small * 37**2)
    else:  # 0.4 GFLOPs an image, as published
        assert cost.flops["convolutions"] == pytest.approx(6 * 0.39e9 * (large + small * (96 / 224) ** 2), rel=0.05)


@pytest.mark.parametrize("model", MODELS)
def test_a_step_s_arithmetic_is_three_times_what_torch_counts_forward(model):
    """Against `FlopCounterMode`, which has attention's two products where they are written out: backward adds two
    products a layer, none for pixels, and five to attention's two. Catches groups that are not divided by, and a
    layer that is not seen."""
    (stage,) = resolve("supervised.rn50_100pct", ("view.size=96", "batch_global=2", "precision=fp32"))
    stage = stage.with_settings(encoder=Timm(model))
    found = ours(trace_step(stage, IMAGENET, 1)).flops
    online = stage.config.build(IMAGENET, {}).nets().online
    stem = next(layer for layer in online.modules() if isinstance(layer, nn.Conv2d))
    of_pixels: list[int] = []
    stem.register_forward_hook(lambda layer, _, out: of_pixels.append(2 * out.numel() * layer.weight[0].numel()))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        online(torch.randn(2, 3, 96, 96))
    counted = {str(op).removeprefix("aten."): n for op, n in counter.get_flop_counts()["Global"].items()}
    linear = counted.pop("addmm", 0) + counted.pop("mm", 0)
    assert found["convolutions"] == 3 * counted.pop("convolution") - of_pixels[0]
    assert found["linear layers"] == 3 * linear > 0
    assert found["attention"] == 3.5 * counted.pop("bmm", 0)
    assert counted == {} and found["similarities"] == 0


# ------------------------------------------------------------------------------------------------------ what is refused


def refused(encoder: str, *changes: str) -> str:
    (stage,) = resolve("paws.rn50_100ep", (f"encoder={encoder}", *changes))
    with pytest.raises(ConfigError) as caught:
        stage.config.build(IMAGENET, {})
    return str(caught.value)


def test_an_unknown_name_is_told_the_nearest_three():
    assert refused("timm:resnet5o") == "timm has no model 'resnet5o'; the nearest are resnet50, resnet51q, resnet50t"


def test_sizes_that_a_model_does_not_take_are_refused_by_name():
    told = refused("timm:mixer_s32_224")
    assert told.startswith("small_view.size is 96, which timm's mixer_s32_224 does not take: Input height (96)")
    told = refused("timm:vit_tiny_patch16_224", "small_view.size=90")
    assert told.startswith("small_view.size is 90, which timm's vit_tiny_patch16_224 does not take: Input height (90)")


def test_features_that_are_not_pooled_are_refused(monkeypatch):
    monkeypatch.setattr(timm_models, "_created", lambda model, channels: nn.Conv2d(channels, 8, 3))
    timm_models._features.cache_clear()
    assert "gives [2, 8, 222, 222] for two images: a trunk gives pooled features" in refused("timm:unpooled")


def test_a_missing_library_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    timm_models._features.cache_clear()
    assert "install the extra `timm`" in refused("timm:resnet18")
