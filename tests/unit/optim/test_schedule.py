"""The warm-up and cosine schedule at points worked out by hand."""

import pytest

from fastssl.optim.rates import warmup_cosine

PAWS_IMAGENET = {"start": 0.3, "peak": 6.4, "final": 0.064, "warmup_steps": 3120, "total_steps": 31200}


def test_paws_imagenet_by_hand():
    """Step 0 is `start`, not 0 or one increment in; the cosine's clock starts at the end of warm-up, not at step 0."""
    at = lambda step: warmup_cosine(step, **PAWS_IMAGENET)  # noqa: E731
    assert at(0) == 0.3
    assert at(1560) == pytest.approx((0.3 + 6.4) / 2, rel=1e-12)
    assert at(3120) == 6.4
    assert at(3120 + 14040) == pytest.approx((6.4 + 0.064) / 2, rel=1e-12)
    assert at(3120 + 28080 // 3) == pytest.approx(0.064 + 6.336 * 0.75, rel=1e-12)
    assert at(31200) == 0.064 == at(40000)


def test_semppl_check_values():
    """Warm-up 3,128 of 93,835 steps to 4.8: half way 2.4; step 50,000 gives 2.27384."""
    settings = {"start": 0.0, "peak": 4.8, "final": 0.0, "warmup_steps": 3128, "total_steps": 93835}
    assert warmup_cosine(1564, **settings) == pytest.approx(2.4, rel=1e-12)
    assert warmup_cosine(50_000, **settings) == pytest.approx(2.27384, abs=5e-6)


def test_edges_without_warmup_or_without_cosine():
    """No division by zero where either part has no length."""
    assert warmup_cosine(0, start=1.0, peak=2.0, final=0.5, warmup_steps=0, total_steps=10) == 2.0
    assert warmup_cosine(9, start=0.0, peak=2.0, final=0.5, warmup_steps=10, total_steps=10) == pytest.approx(1.8)
    assert warmup_cosine(10, start=0.0, peak=2.0, final=0.5, warmup_steps=10, total_steps=10) == 0.5


@pytest.mark.parametrize("wrong", [{"step": -1}, {"warmup_steps": -1}, {"warmup_steps": 31201}])
def test_impossible_counts_are_refused(wrong):
    with pytest.raises(ValueError, match="warm-up"):
        warmup_cosine(**{"step": 0, **PAWS_IMAGENET, **wrong})
