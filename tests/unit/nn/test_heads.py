"""The heads of SimCLRv2 and SemPPL against counts and slow definitions."""

import pytest
import torch
from torch import nn

from fastssl.nn.heads import byol_head, projection_head, simclr_head
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm
from tests.support.definitions import (
    assert_same,
    batch_norm,
    normal,
    one_thread,  # noqa: F401  (every test here uses it)
    shaken,
)


def test_parameters_of_heads():
    """Catches biases, a bias of the last norm, other widths: counted in the papers' code."""
    with torch.device("meta"):
        head = simclr_head(2048)
        assert sum(p.numel() for p in head.parameters()) == 8_659_072
        assert sum(p.numel() for p in head[:3].parameters()) == 4_198_400
        assert sum(p.numel() for p in simclr_head(4096)[:3].parameters()) == 16_785_408
        assert sum(p.numel() for p in simclr_head(512, num_layers=2).parameters()) == 512**2 + 2 * 512 + 512 * 128 + 128
        projector, predictor = byol_head(2048), byol_head(256)
        assert sum(p.numel() for p in projector.parameters()) == 2048 * 4096 + 3 * 4096 + 4096 * 256
        assert sum(p.numel() for p in predictor.parameters()) == 256 * 4096 + 3 * 4096 + 4096 * 256
    assert [name for name in head.state_dict() if name.startswith("bn3")] == [
        "bn3.weight", "bn3.running_mean", "bn3.running_var", "bn3.num_batches_tracked",
    ]  # fmt: skip


def test_simclr_s_head_equals_its_definition():
    """Catches a ReLU at the end, none before it, and a last norm that shifts."""
    head = shaken(simclr_head(6, 4))

    def slow(x):
        for index in (1, 2):
            x = x @ getattr(head, f"fc{index}").weight.T
            x = batch_norm(x, getattr(head, f"bn{index}")).clamp(min=0)
        x = x @ head.fc3.weight.T
        return (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() * head.bn3.weight

    assert_same(head, slow, head, [normal(5, 6)])
    first = head(normal(5, 6))
    assert first.mean(0).abs().max() < 1e-12
    assert simclr_head(400).fc1.weight.std().item() == pytest.approx(0.01, rel=0.02)


def test_byol_s_head_equals_its_definition():
    head = shaken(byol_head(6, 8, 4))

    def slow(x):
        x = x @ head.fc1.weight.T + head.fc1.bias
        return batch_norm(x, head.bn1).clamp(min=0) @ head.fc2.weight.T

    assert_same(head, slow, head, [normal(5, 6)])
    drawn = byol_head(400, 100)
    assert (drawn.fc1.bias == 0).all()
    assert drawn.fc1.weight.std().item() == pytest.approx(0.8796 / 20, rel=0.02)


@pytest.mark.parametrize("head", [projection_head(8, 4), simclr_head(8, 4), byol_head(8, 16, 4)])
def test_the_first_three_layers_are_the_first_projection_layer(head):
    """Catches a head whose slice would end before its norm or ReLU."""
    kinds = [type(layer) for layer in head[:3]]
    assert kinds == [nn.Linear, GlobalBatchNorm, nn.ReLU]
    x = torch.randn(5, 8)
    assert torch.equal(head[:3].eval()(x), head.eval()[2](head[1](head[0](x))))
