"""Starting from vision transformers of others: files as timm, DINOv2 and DINOv3 publish them, made here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastssl.methods.base import Facts
from fastssl.nn.encoders.vit import ViT
from fastssl.nn.trunks.vit import interpolated
from fastssl.recipes.resolve import resolve
from fastssl.weights.layouts import TIMM
from fastssl.weights.read import WeightsError, load_whole, read_weights
from fastssl.weights.transformers import DINOV2, DINOV3, TIMM_VIT

TINY = ViT(size=16, patch=4, width=8, depth=2, heads=2)
SCALED = ViT(size=16, patch=4, width=8, depth=2, heads=2, registers=3, layer_scale=0.1)
Tensors = dict[str, torch.Tensor]


def drawn(encoder: ViT) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(t.shape, generator=generator) for key, t in encoder.build().state_dict().items()}


def as_timm(state: Tensors) -> Tensors:
    return state | {"head.weight": torch.ones(5, 8), "head.bias": torch.ones(5)}


def as_dinov2(state: Tensors) -> Tensors:
    """Positions for the class token as well, registers by another name, and the token that hides patches."""
    found = dict(state)
    found["register_tokens"] = found.pop("reg_token")
    found["pos_embed"] = torch.cat([torch.full((1, 1, 8), 7.0), found["pos_embed"]], 1)
    return found | {"mask_token": torch.zeros(1, 8)}


def saved(folder: Path, content: object) -> Path:
    torch.save(content, folder / "weights.pth")
    return folder / "weights.pth"


def test_timm_s_file_is_taken_whole_from_pth_and_safetensors(tmp_path):
    state = as_timm(drawn(TINY))
    save_file(state, tmp_path / "model.safetensors")
    for path in (saved(tmp_path, state), saved(tmp_path, {"state_dict": state, "epoch": 3}),
                 tmp_path / "model.safetensors"):  # fmt: skip
        weights = read_weights(path)
        assert weights.layout == TIMM_VIT and set(weights.part("fc")) == {"weight", "bias"}
        trunk = TINY.build()
        load_whole(trunk, weights.part("trunk"), "it")
        assert all(torch.equal(t, state[key]) for key, t in trunk.state_dict().items())


def test_dinov2_s_tokens_come_as_its_code_lays_them(tmp_path):
    """Class token plus its position, registers without any, patches plus theirs. Catches registers that get the first
    positions, and a class token without its own."""
    state = as_dinov2(drawn(SCALED))
    weights = read_weights(saved(tmp_path, state))
    assert (weights.layout, weights.left) == (DINOV2, ("mask_token",))
    assert str(weights).endswith("DINOv2's vision transformer; left alone: mask_token")
    trunk = SCALED.build()
    load_whole(trunk, weights.part("trunk"), "it")
    x = torch.randn(2, 3, 16, 16)
    patches = torch.nn.functional.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], 4)
    first = (state["cls_token"] + state["pos_embed"][:, :1]).expand(2, -1, -1)
    rest = patches.flatten(2).transpose(1, 2) + state["pos_embed"][:, 1:]
    tokens = torch.cat([first, state["register_tokens"].expand(2, -1, -1), rest], 1)
    assert torch.allclose(trunk._tokens(x), tokens, atol=1e-6)


def test_dinov3_s_names_become_timm_s(tmp_path):
    """Biases of query and value alone, and none where all are zero. What its code computes anew is named as left."""
    state = drawn(SCALED)
    state["storage_tokens"] = state.pop("reg_token")
    del state["pos_embed"]
    state["blocks.1.attn.qkv.bias"].zero_()
    state |= {"rope_embed.periods": torch.ones(4), "blocks.0.attn.qkv.bias_mask": torch.ones(24)}
    weights = read_weights(saved(tmp_path, state | {"mask_token": torch.zeros(1, 8)}))
    assert weights.layout == DINOV3
    assert set(weights.left) == {
        "rope_embed.periods", "blocks.0.attn.qkv.bias_mask", "mask_token", "blocks.1.attn.qkv.bias",
    }  # fmt: skip
    trunk = weights.part("trunk")
    assert torch.equal(trunk["reg_token"], state["storage_tokens"])
    assert torch.equal(trunk["blocks.0.gamma_1"], state["blocks.0.ls1.gamma"])
    assert torch.equal(trunk["blocks.0.attn.q_bias"], state["blocks.0.attn.qkv.bias"][:8])
    assert torch.equal(trunk["blocks.0.attn.v_bias"], state["blocks.0.attn.qkv.bias"][16:])
    assert "blocks.1.attn.q_bias" not in trunk
    with pytest.raises(WeightsError, match="0 table of positions, not 1"):
        load_whole(SCALED.build(), trunk, "it")


@pytest.mark.parametrize("encoder", [TINY, SCALED])
def test_positions_are_interpolated_to_the_network_s_size(encoder, tmp_path):
    """As the network itself interpolates them for other crops. Catches the class token's among the square's."""
    state = drawn(encoder)
    weights = read_weights(saved(tmp_path, state))
    trunk = ViT(**{**vars(encoder), "size": 28}).build()
    load_whole(trunk, weights.part("trunk"), "it")
    first = 0 if encoder.registers else 1
    positions, wanted = trunk.state_dict()["pos_embed"], interpolated(state["pos_embed"][:, first:], (7, 7))
    assert torch.equal(positions[:, :first], state["pos_embed"][:, :first])
    assert torch.allclose(positions[:, first:], wanted, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"patch": 2, "size": 8}, "patches of 4 pixels, not 2"),
        ({"width": 12}, "width 8, not 12"),
        ({"depth": 3}, "2 blocks, not 3"),
        ({"registers": 2}, "0 registers, not 2"),
        ({"layer_scale": 0.1}, "0 scales a block, not 2"),
        ({"patch": 2, "size": 8, "depth": 1}, "patches of 4 pixels, not 2; 2 blocks, not 1"),
    ],
)
def test_another_transformer_is_refused_in_the_user_s_words(changes, why, tmp_path):
    weights = read_weights(saved(tmp_path, drawn(TINY)))
    trunk = ViT(**{**vars(TINY), **changes}).build()
    before = {key: t.clone() for key, t in trunk.state_dict().items()}
    with pytest.raises(WeightsError, match=f"another vision transformer than this recipe's: {why}; nothing loaded"):
        load_whole(trunk, weights.part("trunk"), "it")
    assert all(torch.equal(t, before[key]) for key, t in trunk.state_dict().items())


def test_a_method_starts_from_it_and_says_what_it_did(tmp_path, capsys):
    encoder = "encoder=vit(8,4,8,2,2)"
    (stage,) = resolve("paws.digits", (encoder, "out_features=8"))
    method = stage.config.build(Facts(num_classes=10, channels=3, seed=0), {})
    nets, state = method.nets(), drawn(TINY)
    method.start_from(nets, read_weights(saved(tmp_path, as_timm(state))))
    assert torch.equal(nets.online.trunk.blocks[1].mlp.fc2.weight, state["blocks.1.mlp.fc2.weight"])
    assert capsys.readouterr().out == (
        "interpolated: trunk.pos_embed\ntaken: trunk; as they were drawn: projection; left out: fc\n"
    )


def test_other_networks_of_timm_s_are_recognised_by_their_stems(tmp_path):
    weights = read_weights(saved(tmp_path, {"conv_stem.weight": torch.ones(2), "classifier.weight": torch.ones(3)}))
    assert weights.layout == TIMM and set(weights.nets["online"]) == {"trunk.conv_stem.weight", "fc.weight"}
