"""Linear probe: a linear classifier on frozen backbone features, its one setting chosen on held-out labelled images.

Features are taken once, in eval mode, of the evaluation view: unlike most papers' linear evaluation, which trains the
classifier on random crops, this one is trained WITHOUT augmentation, as probes of transfer usually are.

Two solvers. Where labelled images x features x classes are at most 2^31, L-BFGS finds the optimum of L2-regularised
logistic regression, and C is chosen (as for transfer in SimCLR, arXiv 2002.05709, B.8). Larger sets are learnt by SGD,
thirteen learning rates in one pass over the data (as in DINOv2, arXiv 2304.07193, B.3), with the rest as in the
linear evaluation of SemPPL's release (google-deepmind/semppl, configs/eval.py), which has no weight decay; where a
protocol asks for some, each with every rate.

The choice is made on labelled images held out for it: the validation images give one number, with the chosen setting,
of a classifier that was then trained on all labelled images. To a network that has itself learnt from these labels the
held-out images are no news, and all settings may look alike: of equals the middle one is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl import dist
from fastssl.errors import ConfigError
from fastssl.evaluation.accuracies import top5, top5_correct, wilson
from fastssl.evaluation.cosine import full_fp32
from fastssl.evaluation.heads import Heads, root_mean_square
from fastssl.evaluation.logistic import MAX_ITERATIONS, logistic_regression
from fastssl.evaluation.shards import BLOCK, Rows, first_row, share, totals, whole
from fastssl.evaluation.subject import Features, Roles, Subject
from loaders.plan.draws import mix, tag
from loaders.store.data import LABELLED

Solver = Literal["l-bfgs", "sgd"]
Setting = Mapping[str, float]

LARGEST_FOR_LBFGS = 2**31  # images x features x classes: all of CIFAR-10 with 4,096 features
CS = tuple(10.0**k for k in range(-5, 4))  # decades; SimCLR sweeps 1 / C from 1e5 down, in finer steps
RATES = tuple(10.0 ** (k / 3) for k in range(-9, 4))  # thirteen over four decades, as in DINOv2; for 256 images a step
BATCH, EPOCHS, MOMENTUM = 1024, 100, 0.9  # SemPPL's release; Nesterov, cosine to 0, no warm-up
HELD_OUT_PER_CLASS = 12  # as on PAWS's list of training images for such choices
HELD_OUT_SHARE = 5  # one labelled image in so many, where that is fewer


def check(roles: Roles) -> None:
    """Raises ConfigError where labelled or validation images lack labels, or are the same, and where there are too few
    labelled ones to choose by."""
    roles.check_apart()
    labels_N, ids_N = roles.labels_and_ids(LABELLED)
    _check_choice(labels_N, held_out(labels_N, ids_N))


def evaluate(subject: Subject) -> dict[str, Any]:
    """`linear_top1` and `_top5` on the validation images, and how the classifier came about."""
    tap = subject.chosen_tap(subject.method.taps[0])
    labelled, validation = subject.labelled_and_validation(tap)
    held_N = own_held_out(labelled)
    head, about = choose_head(labelled.values, labelled.labels, held_N, subject.num_classes, device=subject.device)
    blocks = list(zip(validation.values.split(BLOCK), validation.labels.split(BLOCK), strict=True))
    correct, among_five, images = totals(
        int((head.classes(validation.values) == validation.labels).sum()),
        sum(top5_correct(head.logits(x_qD)[0], labels_q) for x_qD, labels_q in blocks),
        len(validation.labels),
    )
    return {
        "linear_top1": correct / images,
        **top5("linear", among_five, images, subject.num_classes),
        "linear": {"tap": tap, **about, "images": images, "top1_ci95": wilson(correct, images)},
    }


def top1(classes_N: Tensor, labels_N: Tensor) -> float:
    """Top-1 accuracy."""
    return float((classes_N == labels_N).double().mean())


def choose_head(
    train_ND: Tensor,
    labels_N: Tensor,
    held_N: Tensor,
    num_classes: int,
    *,
    score: Callable[[Tensor, Tensor], float] = top1,
    decays: Sequence[float] = (0.0,),
    solver: Solver | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Heads, dict[str, Any]]:
    """One head, and in plain values how it came about: with every setting a head is trained on the images not held out;
    that of the best `score(classes, labels)` on those held out (of equals the middle one) is trained again, on all N.

    labels_N int64 without -1; held_N bool. Of several ranks each gives its own rows, and all get the same head.
    `solver` None: by size, as above. SGD tries the weight `decays` beside every rate, and computes on `device`; L-BFGS,
    whose C is one, on the CPU; the head is on the CPU. Raises ConfigError where nothing is held out, or one class alone
    is learnt from.
    """
    all_labels_N, all_held_N = whole(labels_N), whole(held_N.int()).bool()
    _check_choice(all_labels_N, all_held_N)
    if solver is None:
        solver = "l-bfgs" if len(all_labels_N) * train_ND.shape[1] * num_classes <= LARGEST_FOR_LBFGS else "sgd"

    def fitted(used_N: Tensor | None, settings: Sequence[Setting]) -> Heads:
        rows = train_ND, labels_N, num_classes
        if solver == "l-bfgs":
            return logistic_regression(*rows, [s["C"] for s in settings], used_N=used_N, max_iterations=MAX_ITERATIONS)
        pairs = [(s["rate"], s["weight_decay"]) for s in settings]
        return linear_heads(*rows, pairs, used_N=used_N, epochs=EPOCHS, device=device)

    settings: list[Setting]
    if solver == "l-bfgs":
        settings = [{"C": c} for c in CS]
    else:
        settings = [{"rate": rate, "weight_decay": decay} for rate in RATES for decay in decays]
    classes_Sh = fitted(~held_N, settings).classes(train_ND[held_N])
    scores = [score(classes_H, all_labels_N[all_held_N]) for classes_H in whole(classes_Sh.T).T]
    best = [setting for setting, found in zip(settings, scores, strict=True) if found == max(scores)]
    chosen = best[(len(best) - 1) // 2]
    about = {
        "solver": solver,
        "augmented": False,
        "chosen": chosen,
        "held_out": {
            "images": int(all_held_N.sum()),
            score.__name__: {in_words(setting): found for setting, found in zip(settings, scores, strict=True)},
        },
        "labelled_images": len(all_labels_N),
        **({"max_iterations": MAX_ITERATIONS} if solver == "l-bfgs" else
           {"batch": min(BATCH, len(all_labels_N)), "epochs": EPOCHS, "momentum": MOMENTUM}),
    }  # fmt: skip
    return fitted(None, [chosen]).cpu(), about


def _check_choice(labels_N: Tensor, held_N: Tensor) -> None:
    if not held_N.any():
        raise ConfigError("a linear probe holds labelled images out to choose its settings: it needs two of a class")
    if len(labels_N[~held_N].unique()) < 2:
        raise ConfigError("a linear probe needs labelled images of two classes at least")


def in_words(setting: Setting) -> str:
    """`C=0.01`; `rate=0.1, weight_decay=0`."""
    return ", ".join(f"{name}={value:.3g}" for name, value in setting.items())


def held_out(labels_N: Tensor, ids_N: Tensor) -> Tensor:
    """Which of N images choose a setting, bool [N]: of every class 12, or a fifth (rounded up) where that is fewer; of
    a single image none. Keyed by class and id, so the same for every network."""
    held_N = np.zeros(len(labels_N), bool)
    labels, keys = labels_N.numpy(), mix(tag("linear probe, held out"), labels_N.numpy(), ids_N.numpy())
    for c in np.unique(labels):
        rows = np.flatnonzero(labels == c)
        if len(rows) > 1:
            count = min(HELD_OUT_PER_CLASS, -(-len(rows) // HELD_OUT_SHARE))
            held_N[rows[np.argsort(keys[rows], kind="stable")[:count]]] = True
    return torch.from_numpy(held_N)


def own_held_out(features: Features) -> Tensor:
    """Which of this rank's images are among those that `held_out` chooses of all ranks', bool [N]."""
    first = first_row(len(features.ids))
    held_N = held_out(whole(features.labels), whole(features.ids))
    return held_N[first : first + len(features.ids)]


def linear_heads(
    train_ND: Tensor,
    labels_N: Tensor,
    num_classes: int,
    settings: Sequence[tuple[float, float]],
    *,
    used_N: Tensor | None = None,
    batch: int = BATCH,
    epochs: int = EPOCHS,
    device: torch.device | str = "cpu",
) -> Heads:
    """One head for each (rate, weight decay) of `settings`, each batch serving all: every head is what it would be if
    trained alone, and one that diverges leaves the others as they are. On `device`, in the features' dtype. `used_N`
    (bool): the rows to learn from, where they are not all.

    Cross-entropy from zero, Nesterov momentum 0.9, rate x batch / 256 falling to 0 along a cosine; batches (at most all
    N) in a keyed order, the last partial one of an epoch left out. Weight decay is torch's, decay x weight added to the
    gradient, of all but the bias. Features are divided by their root mean square, so that a rate and a decay, which
    then draws at the weights of such features, mean the same for any network; the heads returned take them as they are.

    Several ranks divide the heads among them, not the batches: a batch's rows, which are a few megabytes, come from the
    ranks that hold them, where sums over ranks would be of all heads' gradients. So no sum depends on their number.
    """
    rows = Rows(train_ND, used_N)
    all_labels_N = whole(labels_N if used_N is None else labels_N[used_N])
    scale = root_mean_square(train_ND, used_N)
    own = settings[slice(*share(len(settings)))]
    batch = min(batch, len(rows))
    steps_per_epoch = len(rows) // batch
    total_steps = epochs * steps_per_epoch
    rate_S, decay_S = torch.tensor(own, dtype=train_ND.dtype, device=device).reshape(-1, 2).T
    peak_S11 = rate_S[:, None, None] * (batch / 256)
    # The bias is the weight of one more feature, which is 1.
    heads_SKE = torch.zeros(len(own), num_classes, rows.width + 1, dtype=train_ND.dtype, device=device)
    velocity_SKE = torch.zeros_like(heads_SKE)
    with full_fp32():
        for step in range(total_steps):
            epoch, at = divmod(step, steps_per_epoch)
            if at == 0:
                order_N = torch.from_numpy(
                    np.argsort(mix(tag("linear probe"), epoch, np.arange(len(rows))), kind="stable")
                )
            numbers_B = order_N[at * batch : (at + 1) * batch]
            x_BE = F.pad(rows.gathered(numbers_B, device) / scale, (0, 1), value=1.0)
            if not own:
                continue
            target_BK = F.one_hot(all_labels_N[numbers_B].to(device), num_classes)
            p_SBK = torch.einsum("be,ske->sbk", x_BE, heads_SKE).softmax(dim=2)
            gradient_SKE = torch.einsum("sbk,be->ske", p_SBK - target_BK, x_BE) / batch
            gradient_SKE[:, :, :-1] += decay_S[:, None, None] * heads_SKE[:, :, :-1]
            velocity_SKE.mul_(MOMENTUM).add_(gradient_SKE)
            cosine = (1 + math.cos(math.pi * step / total_steps)) / 2
            heads_SKE -= cosine * peak_S11 * (gradient_SKE + MOMENTUM * velocity_SKE)
    heads_SKE = dist.gather_ragged(heads_SKE)
    return Heads(heads_SKE[:, :, :-1] / scale, heads_SKE[:, :, -1])
