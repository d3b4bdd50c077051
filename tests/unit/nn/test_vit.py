"""Vision transformers against their definition, and what an optimiser makes of their parameters."""

from __future__ import annotations

import math

import pytest
import torch

from fastssl.errors import ConfigError
from fastssl.methods.base import Epochs, Facts, Horizon
from fastssl.nn.encoders.vit import ViT
from fastssl.nn.recompute import recompute_blocks
from fastssl.nn.trunks.vit import interpolated
from fastssl.optim.adamw import AdamW
from fastssl.optim.param_groups import kernel_names, lars_groups
from fastssl.recipes.resolve import resolve

TINY = ViT(size=8, patch=2, width=12, depth=2, heads=3)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def shaken(encoder: ViT, channels: int = 1) -> torch.nn.Module:
    """In float64, with norms, biases and tokens that are neither 1 nor 0."""
    torch.manual_seed(0)
    trunk = encoder.build(channels).double()
    with torch.no_grad():
        for p in trunk.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return trunk


def by_definition(p: dict[str, torch.Tensor], encoder: ViT, image: torch.Tensor) -> torch.Tensor:
    """Features of one image [C, H, W] of the size that positions are for: token by token, head by head."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean()
        return centred / (centred.square().mean() + 1e-6).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return p[f"{name}.weight"] @ x + p[f"{name}.bias"]

    def gelu(x: torch.Tensor) -> torch.Tensor:
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    def scaled(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * p[f"{name}.gamma"] if f"{name}.gamma" in p else x

    step, tokens = encoder.patch, [p["cls_token"][0, 0]]
    positions = list(p["pos_embed"][0])
    if encoder.registers:
        tokens += list(p["reg_token"][0])
    else:
        tokens[0] = tokens[0] + positions.pop(0)
    for i in range(0, image.shape[1], step):
        for j in range(0, image.shape[2], step):
            patch = image[:, i : i + step, j : j + step]
            kernel, bias = p["patch_embed.proj.weight"], p["patch_embed.proj.bias"]
            tokens.append((kernel * patch).sum((1, 2, 3)) + bias + positions.pop(0))
    for number in range(encoder.depth):
        block, size = f"blocks.{number}", encoder.width // encoder.heads
        qkv = [linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").view(3, encoder.heads, size) for x in tokens]
        for t, x in enumerate(tokens):
            found = []
            for head in range(encoder.heads):
                looks = torch.stack([qkv[t][0, head] @ k[1, head] for k in qkv]) / math.sqrt(size)
                found.append(sum(w * v[2, head] for w, v in zip(torch.softmax(looks, 0), qkv, strict=True)))
            tokens[t] = x + scaled(linear(torch.cat(found), f"{block}.attn.proj"), f"{block}.ls1")
        for t, x in enumerate(tokens):
            hidden = gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
            tokens[t] = x + scaled(linear(hidden, f"{block}.mlp.fc2"), f"{block}.ls2")
    return norm(tokens[0], "norm")


@pytest.mark.parametrize(
    "encoder", [TINY, ViT(size=4, patch=2, width=8, depth=1, heads=2, registers=2, layer_scale=0.1)]
)
def test_it_equals_its_definition(encoder):
    """Catches heads mixed up, a scale left out, positions on the wrong patch, registers with positions, another
    epsilon, the tanh form of GELU, and a last norm of the mean."""
    trunk = shaken(encoder, channels=2)
    x = normal(3, 2, encoder.size, encoder.size)
    wanted = torch.stack([by_definition(dict(trunk.named_parameters()), encoder, image) for image in x])
    assert (trunk(x) - wanted).abs().max() < 1e-12


def test_names_and_size_are_timm_s():
    """ViT-S/16's 21,665,664 parameters, under the names that timm's files have."""
    with torch.device("meta"):
        state = ViT().build().state_dict()
    assert sum(t.numel() for t in state.values()) == 21_665_664
    assert state["pos_embed"].shape == (1, 197, 384) and state["cls_token"].shape == (1, 1, 384)
    assert state["patch_embed.proj.weight"].shape == (384, 3, 16, 16)
    block = {"norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"}
    expected = {f"blocks.{n}.{layer}.{kind}" for n in range(12) for layer in block for kind in ("weight", "bias")}
    rest = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
    assert set(state) == expected | rest
    assert [ViT().name, ViT(width=768, heads=12, patch=8).name] == ["ViT-S/16", "ViT-B/8"]
    assert TINY.name == "ViT/2 of width 12, depth 2, 3 heads"
    assert ViT().from_torchvision(3).timm == "vit_small_patch16_224" and TINY.from_torchvision(3).timm is None


def test_positions_of_other_sizes_are_interpolated_between_their_neighbours():
    """Of a slope they are that slope at the patches' centres, away from the edge. Catches corners that are aligned,
    rows taken for columns, and a size that is scaled when it need not be."""
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    slopes = torch.stack([y, x], -1).view(1, 64, 2)
    assert interpolated(slopes, (8, 8)) is slopes
    wider = interpolated(slopes, (8, 16)).view(8, 16, 2)
    centres = (torch.arange(16) + 0.5) / 2 - 0.5
    assert torch.allclose(wider[2:6, 4:12, 1], centres[4:12].expand(4, 8), atol=1e-5)
    assert torch.allclose(wider[2:6, 4:12, 0], torch.arange(2.0, 6).view(4, 1).expand(4, 8), atol=1e-5)
    assert interpolated(slopes.bfloat16(), (4, 4)).dtype == torch.bfloat16


def test_resolutions_in_lockstep_are_passes_of_their_own():
    trunk = shaken(TINY)
    xs = [normal(3, 1, 8, 8), normal(2, 1, 12, 12), normal(2, 1, 4, 8)]
    for together, x in zip(trunk.lockstep(xs), xs, strict=True):
        assert torch.equal(together, trunk(x)) and together.shape == (len(x), 12)


def test_blocks_computed_again_give_the_same_gradients():
    trunk, xs = shaken(TINY), [normal(3, 1, 8, 8), normal(2, 1, 4, 4)]
    found = []
    for again in (False, True):
        assert recompute_blocks(trunk, again) == 1
        total = sum(y.sin().sum() for y in trunk.lockstep(xs))
        found.append(torch.autograd.grad(total, list(trunk.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_it_has_forward_mode_derivatives():
    """Of the fused kernels none has. Against a difference."""
    trunk, x, d = shaken(TINY), normal(2, 1, 8, 8), normal(2, 1, 8, 8).flip(0)
    _, change = torch.func.jvp(trunk, (x,), (d,))
    difference = (trunk(x + 1e-6 * d) - trunk(x - 1e-6 * d)) / 2e-6
    assert torch.allclose(change, difference, atol=1e-7)


def test_under_half_precision_blocks_add_up_in_float32():
    """Catches a sum over all blocks that is rounded to eight bits at each."""
    trunk = TINY.build(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert trunk._tokens(torch.randn(2, 1, 12, 12)).dtype == torch.float32
        assert trunk.blocks(torch.randn(2, 37, 12)).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"size": 10, "patch": 4}, "do not fill images of 10"), ({"width": 10, "heads": 3}, "3 heads cannot share"),
     ({"depth": 0}, "1 at least")],
)  # fmt: skip
def test_what_cannot_be_is_refused(settings, why):
    with pytest.raises(ValueError, match=why):
        ViT(**settings)


def test_crops_that_patches_do_not_fill_are_refused_before_the_first_step():
    (stage,) = resolve("paws.digits", ("encoder=vit(8,4,16,1,2)", "global_view.size=10"))
    with pytest.raises(ConfigError, match=r"global_view.size is 10.*no multiple of its patches' 4 pixels"):
        stage.config.build(Facts(10, 1, 0), {})


# ------------------------------------------------------------------------------------------------------- its training


def test_norms_biases_tokens_and_positions_are_not_decayed():
    """Of ViT-S/16's 150 tensors 49 are decayed, by name. Catches positions and tokens, which have three axes."""
    with torch.device("meta"):
        trunk = ViT().build()
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    kernels = {f"blocks.{n}.{layer}.weight" for n in range(12) for layer in layers} | {"patch_embed.proj.weight"}
    assert kernel_names(trunk) == kernels and len(kernels) == 49
    decayed, spared = AdamW(weight_decay=0.04).build([[trunk]]).param_groups
    assert (len(decayed["params"]), decayed["weight_decay"]) == (49, 0.04)
    assert (len(spared["params"]), spared["weight_decay"]) == (101, 0.0)
    adapted, excluded = lars_groups(trunk)
    assert {name for name, _ in adapted["params"]} == kernels and len(excluded["params"]) == 101
    assert kernel_names(torch.nn.ModuleList([trunk])) == {f"0.{name}" for name in kernels}


def test_rates_and_decays_of_the_recipes_are_their_laws():
    """At step 0, the end of the ten epochs of warm-up, half way down, and the end. An epoch is 1,251 steps."""
    for name, epochs in (("vits16_100ep", 100), ("vits16_300ep", 300), ("vits16_100ep_1pct", 100)):
        (stage,) = resolve(f"paws.{name}")
        assert stage.length == Epochs(epochs)
        config, total = stage.config, epochs * 1251
        horizon = Horizon(1251, total)
        middle = (12510 + total) // 2
        at = {step: config.rate.at(step, horizon) for step in (0, 6255, 12510, middle, total)}
        assert list(at.values()) == pytest.approx([2e-4, 6e-4, 1e-3, (1e-3 + 1e-6) / 2, 1e-6], rel=1e-12)
        decays = [config.optimizer.decay_at(step, horizon) for step in (0, total // 4, total // 2, total)]
        assert decays == pytest.approx([0.04, 0.22 - 0.18 * math.sqrt(0.5), 0.22, 0.4], rel=1e-4)
        assert (config.batch_global, config.classes_global, config.images_per_class) == (1024, 960, 7)


def test_a_decay_that_stays_is_left_alone():
    assert AdamW(weight_decay=0.1).decay_at(3, Horizon(5, 10)) is None


def test_heads_are_as_wide_as_the_recipe_says():
    (stage,) = resolve("paws.vits16_100ep")
    with torch.device("meta"):
        net = stage.config.build(Facts(1000, 3, 0), {}).nets().online
    widths = [(m.in_features, m.out_features) for m in (*net.projection, *net.prediction) if hasattr(m, "in_features")]
    assert widths == [(384, 256), (256, 256), (256, 256), (256, 256), (256, 256)]
    assert sum(isinstance(m, torch.nn.GELU) for m in (*net.projection, *net.prediction)) == 3
    assert not any(isinstance(m, torch.nn.ReLU) for m in net.modules())
