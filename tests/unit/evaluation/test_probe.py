"""The probe's curve against torch's own linear layer and optimiser; and on digits."""

import numpy as np
import pytest
import torch
from torch import nn

from fastssl.evaluation.probe import learnt
from loaders.plan.draws import mix, tag


def test_the_curve_is_that_of_torchs_sgd():
    """Three epochs of four batches in float64, the rate rising over the first and falling after the second. Catches a
    velocity that holds the rate, another warm-up, rows left out, and a bias that is not trained."""
    torch.manual_seed(0)
    train, labels = 1 + torch.randn(70, 6, dtype=torch.float64), torch.randint(0, 4, (70,))
    test, test_labels = 1 + torch.randn(50, 6, dtype=torch.float64), torch.randint(0, 4, (50,))
    curve, logits = learnt(train, labels, test, test_labels, 4, epochs=3, falls=(2,), batch=16)
    scale = train.square().mean().sqrt()
    layer = nn.Linear(6, 4, dtype=torch.float64)
    nn.init.zeros_(layer.weight), nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    expected, rates = {}, [0.025, 0.05, 0.075, *[0.1] * 4, *[0.01] * 5]
    for epoch in range(3):
        order = torch.from_numpy(np.argsort(mix(tag("probe"), epoch, np.arange(70)), kind="stable"))
        for rows in order[:64].split(16):
            optimizer.param_groups[0]["lr"] = rates.pop(0)
            optimizer.zero_grad()
            nn.functional.cross_entropy(layer(train[rows] / scale), labels[rows]).backward()
            optimizer.step()
        expected[str(epoch + 1)] = (layer(test / scale).argmax(dim=1) == test_labels).double().mean().item()
    assert torch.allclose(logits, layer(test / scale), rtol=1e-9, atol=1e-12)
    assert curve == pytest.approx(expected) and min(curve.values()) > 0.0
