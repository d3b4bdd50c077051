"""Averages of networks: what follows, what does not, and how fast."""

import pytest
import torch

from fastssl.nn.ema import copy_of, cosine_decay, follow
from fastssl.nn.norm.global_batch_norm import GlobalBatchNorm


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), GlobalBatchNorm(4)).double()


def test_parameters_follow_and_statistics_stay():
    """Catches decay and its complement exchanged, an average of running statistics, and one that shares memory with
    what it follows."""
    online = network()
    target = copy_of(online)
    before = {name: t.clone() for name, t in target.state_dict().items()}
    with torch.no_grad():
        for p in online.parameters():
            p.add_(1.0)
    online(torch.randn(5, 3, dtype=torch.float64))  # moves running statistics
    follow(target, online, 0.75)
    for name, p in target.named_parameters():
        torch.testing.assert_close(p, before[name] + 0.25, rtol=0, atol=1e-15)
    for name, b in target.named_buffers():
        assert torch.equal(b, before[name]), name


def test_an_average_gets_no_gradient():
    online = network()
    target = copy_of(online)
    assert all(p.requires_grad for p in online.parameters())
    assert not any(p.requires_grad for p in target.parameters())
    assert not target(torch.randn(5, 3, dtype=torch.float64)).requires_grad


def test_byols_ramp_by_hand():
    """From `start` at step 0 to 1 at the end; step 50,000 of 93,835 from 0.996 gives 0.998206. Catches a ramp that
    falls, and one over half the run."""
    assert cosine_decay(0, 93_835, 0.996) == 0.996
    assert cosine_decay(93_835, 93_835, 0.996) == 1.0
    assert cosine_decay(50_000, 93_835, 0.996) == pytest.approx(0.998206, abs=5e-7)
    assert cosine_decay(500, 1000, 0.9) == pytest.approx(0.95, abs=1e-12)
