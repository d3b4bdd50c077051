"""Probe: how fast a linear classifier learns from frozen backbone features, accuracy by epoch (S4L, arXiv 1905.03670,
section 6 and figure 2, there on Places205; here on whatever images are given: `--data PATH --labels all`).

Logistic regression by SGD with momentum on batches of 2,048, at a rate of .1 that rises over the first epoch, 520
epochs. When the rate falls is not published: to a tenth after 480 and again after 500 epochs, as in the same authors'
earlier code (google/revisiting-self-supervised). Until then the curve is that of any shorter schedule. Nothing is
chosen, so the validation images may be looked at on the way. Without augmentation, of features divided by their root
mean square, so that a rate means the same for any network.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl.evaluation.accuracies import top5, top5_correct, wilson
from fastssl.evaluation.cosine import full_fp32
from fastssl.evaluation.heads import root_mean_square
from fastssl.evaluation.shards import Rows, totals, whole
from fastssl.evaluation.subject import Subject
from fastssl.optim.rates import warmup_stairs
from loaders.plan.draws import mix, tag

BATCH, RATE, MOMENTUM, EPOCHS, FALLS = 2048, 0.1, 0.9, 520, (480, 500)
_EVERY_EPOCH, _EVERY = 30, 10  # how often it is looked at: first after every epoch, later after each tenth


def evaluate(subject: Subject) -> dict[str, Any]:
    """`probe_top1` and `_top5` at the end, on the validation images; under `probe` the curve, accuracy by epoch."""
    tap = subject.method.taps[0]
    labelled, validation = subject.labelled_and_validation(tap)
    sets = labelled.values, labelled.labels, validation.values, validation.labels
    curve, logits_QK = learnt(*sets, subject.num_classes, epochs=EPOCHS, device=subject.device)
    correct, among_five, images, num_labelled = totals(
        int((logits_QK.argmax(dim=1) == validation.labels).sum()),
        top5_correct(logits_QK, validation.labels),
        len(validation.labels),
        len(labelled.labels),
    )
    settings = {"batch": min(BATCH, num_labelled), "rate": RATE, "momentum": MOMENTUM, "epochs": EPOCHS}
    return {
        "probe_top1": correct / images,
        **top5("probe", among_five, images, subject.num_classes),
        "probe": {"tap": tap, **settings, "by_epoch": curve, "images": images, "top1_ci95": wilson(correct, images)},
    }


def learnt(
    train_ND: Tensor,
    labels_N: Tensor,
    test_QD: Tensor,
    test_labels_Q: Tensor,
    num_classes: int,
    *,
    epochs: int = EPOCHS,
    falls: tuple[int, ...] = FALLS,
    batch: int = BATCH,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, float], Tensor]:
    """Top-1 on the test images by epoch, as text; and the last logits [Q, num_classes] on the CPU. Begins at zero;
    batches (at most all N) in a keyed order, the last partial one of an epoch left out. In the features' dtype. Of
    several ranks each gives its own rows, and all learn from each batch alike."""
    rows, labels_N, scale = Rows(train_ND), whole(labels_N), root_mean_square(train_ND)
    batch = min(batch, len(rows))
    steps = len(rows) // batch
    weight_KE = torch.zeros(num_classes, train_ND.shape[1] + 1, dtype=train_ND.dtype, device=device)
    velocity_KE, curve = torch.zeros_like(weight_KE), {}
    test_QE = _with_ones(test_QD.to(device) / scale)
    test_labels_Q = test_labels_Q.to(device)
    with full_fp32():
        for epoch in range(epochs):
            order_N = torch.from_numpy(np.argsort(mix(tag("probe"), epoch, np.arange(len(rows))), kind="stable"))
            for at in range(steps):
                numbers_B = order_N[at * batch : (at + 1) * batch]
                x_BE = _with_ones(rows.gathered(numbers_B, device) / scale)
                p_BK = (x_BE @ weight_KE.T).softmax(dim=1)
                velocity_KE *= MOMENTUM
                velocity_KE += (p_BK - F.one_hot(labels_N[numbers_B].to(device), num_classes)).T @ x_BE / batch
                at_steps = [fall * steps for fall in falls]
                step = epoch * steps + at
                rate = warmup_stairs(step + 1, peak=RATE, factor=0.1, at_steps=at_steps, warmup_steps=steps)
                weight_KE -= rate * velocity_KE
            if epoch < _EVERY_EPOCH or (epoch + 1) % _EVERY == 0 or epoch + 1 == epochs:
                right_Q = (test_QE @ weight_KE.T).argmax(dim=1) == test_labels_Q
                right, tested = totals(int(right_Q.sum()), len(right_Q))
                curve[str(epoch + 1)] = right / tested
        return curve, (test_QE @ weight_KE.T).cpu()


def _with_ones(x: Tensor) -> Tensor:
    """The bias is the weight of one more feature, which is 1."""
    return F.pad(x, (0, 1), value=1.0)
