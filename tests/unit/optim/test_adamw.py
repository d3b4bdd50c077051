"""AdamW whose decay moves, through the step that trains, beside torch's own with the decay moved by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fastssl.engine.step import TrainingStep
from fastssl.errors import ConfigError
from fastssl.methods.base import Facts, Horizon, Nets, Steps
from fastssl.nn.encoders.vit import ViT
from fastssl.optim.adamw import AdamW
from fastssl.optim.rates import WarmupCosine
from fastssl.recipes.resolve import resolve

HORIZON = Horizon(steps_per_epoch=10, total_steps=100)
RATE = WarmupCosine(1e-2, Steps(10), start=2e-3, final=1e-5)


def method_and_stage(optimizer: AdamW):
    (stage,) = resolve("supervised.digits")
    encoder = ViT(8, 4, 16, 1, 2)
    stage = stage.with_settings(encoder=encoder, optimizer=optimizer, rate=RATE)
    method = stage.config.build(Facts(10, 1, 0), {})
    return method, stage


def loss(net: torch.nn.Module, step: int) -> torch.Tensor:
    """A sum of cosines, whose gradients depend on the weights and on the step."""
    return sum((p * (n + 1) + step).cos().sum() / (n + 1) for n, p in enumerate(net.parameters()))


def test_a_hundred_steps_are_torch_s_with_the_decay_moved_by_hand():
    """Catches a decay of the step before, one that the rate scales, or that reaches positions, norms and biases."""
    method, stage = method_and_stage(AdamW(weight_decay=0.04, final_decay=0.4))
    torch.manual_seed(0)
    net, other = (method.nets().online.double() for _ in range(2))
    other.load_state_dict(net.state_dict())
    step = TrainingStep(stage, "eager", method, Nets(net), method.optimizer(Nets(net)), torch.device("cpu"))
    kernels, rest = [], []
    for name, p in other.named_parameters():
        spared = p.ndim < 2 or "pos_embed" in name or "cls_token" in name
        (rest if spared else kernels).append(p)
    torchs = torch.optim.AdamW([{"params": kernels}, {"params": rest, "weight_decay": 0.0}], lr=1.0)

    method.loss = lambda nets, number: {"total": loss(nets.online, number)}
    for number in range(100):
        step(number, HORIZON, number)
        loss(other, number).backward()
        for group in torchs.param_groups:
            group["lr"] = RATE.at(number, HORIZON)
        torchs.param_groups[0]["weight_decay"] = 0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * number / 100)) / 2
        torchs.step()
        torchs.zero_grad()
    apart = [(a - b).abs().max() for a, b in zip(net.parameters(), other.parameters(), strict=True)]
    assert max(apart) < 1e-13
    assert [group["weight_decay"] for group in step.optimizer.param_groups[1::2]] == [0.0, 0.0]


def test_a_graph_which_cannot_follow_the_decay_is_refused():
    method, stage = method_and_stage(AdamW(final_decay=0.4))
    nets = method.nets()
    with pytest.raises(ConfigError, match="decay moves, which no graph can follow; choose --step compiled"):
        TrainingStep(stage, "graphed", method, nets, method.optimizer(nets), torch.device("cuda"))
