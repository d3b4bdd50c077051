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
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastssl import dist
from fastssl.errors import ConfigError
from fastssl.evaluation.accuracies import top5, top5_correct, wilson
from fastssl.evaluation.cosine import full_fp32
from fastssl.evaluation.subject import Roles, Subject
from loaders.plan.draws import mix, tag
from loaders.store.data import LABELLED

Solver = Literal["l-bfgs", "sgd"]
Setting = Mapping[str, float]

LARGEST_FOR_LBFGS = 2**31  # images x features x classes: all of CIFAR-10 with 4,096 features
CS = tuple(10.0**k for k in range(-5, 4))  # decades; SimCLR sweeps 1 / C from 1e5 down, in finer steps
MAX_ITERATIONS = 1000
RATES = tuple(10.0 ** (k / 3) for k in range(-9, 4))  # thirteen over four decades, as in DINOv2; for 256 images a step
BATCH, EPOCHS, MOMENTUM = 1024, 100, 0.9  # SemPPL's release; Nesterov, cosine to 0, no warm-up
HELD_OUT_PER_CLASS = 12  # as on PAWS's list of training images for such choices
HELD_OUT_SHARE = 5  # one labelled image in so many, where that is fewer
_QUERIES = 4096  # classified at a time


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
    held_N = held_out(labelled.labels, labelled.ids)
    found = choose_head(labelled.values, labelled.labels, held_N, subject.num_classes, device=subject.device)
    head, about = dist.broadcast_object(found)  # ranks round alike, but nothing promises it
    correct = int((head.classes(validation.values) == validation.labels).sum())
    among_five = sum(
        top5_correct(head.logits(x_qD)[0], labels_q)
        for x_qD, labels_q in zip(validation.values.split(_QUERIES), validation.labels.split(_QUERIES), strict=True)
    )
    images = len(validation.labels)
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

    labels_N int64 without -1; held_N bool. `solver` None: by size, as above. SGD tries the weight `decays` beside every
    rate, and computes on `device`; L-BFGS, whose C is one, on the CPU; the head is on the CPU. Raises ConfigError where
    nothing is held out, or one class alone is learnt from.
    """
    _check_choice(labels_N, held_N)
    if solver is None:
        solver = "l-bfgs" if train_ND.numel() * num_classes <= LARGEST_FOR_LBFGS else "sgd"

    def fitted(rows: Tensor | slice, settings: Sequence[Setting]) -> Heads:
        if solver == "l-bfgs":
            return logistic_regression(train_ND[rows], labels_N[rows], num_classes, [s["C"] for s in settings])
        pairs = [(s["rate"], s["weight_decay"]) for s in settings]
        return linear_heads(train_ND[rows], labels_N[rows], num_classes, pairs, device=device)

    settings: list[Setting]
    if solver == "l-bfgs":
        settings = [{"C": c} for c in CS]
    else:
        settings = [{"rate": rate, "weight_decay": decay} for rate in RATES for decay in decays]
    classes_SH = fitted(~held_N, settings).classes(train_ND[held_N])
    scores = [score(classes_H, labels_N[held_N]) for classes_H in classes_SH]
    best = [setting for setting, found in zip(settings, scores, strict=True) if found == max(scores)]
    chosen = best[(len(best) - 1) // 2]
    about = {
        "solver": solver,
        "augmented": False,
        "chosen": chosen,
        "held_out": {
            "images": int(held_N.sum()),
            score.__name__: {in_words(setting): found for setting, found in zip(settings, scores, strict=True)},
        },
        "labelled_images": len(labels_N),
        **({"max_iterations": MAX_ITERATIONS} if solver == "l-bfgs" else
           {"batch": min(BATCH, len(labels_N)), "epochs": EPOCHS, "momentum": MOMENTUM}),
    }  # fmt: skip
    return fitted(slice(None), [chosen]).cpu(), about


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


@dataclass(frozen=True)
class Heads:
    """S linear classifiers of the same D features: logits are `x @ weight.T + bias`.

    weight_SKD  [S, K, D]
    bias_SK     [S, K], -inf for a class that no labelled image had, where the solver leaves such classes out
    """

    weight_SKD: Tensor
    bias_SK: Tensor

    def logits(self, x_QD: Tensor) -> Tensor:
        """[S, Q, K], in the heads' dtype and on their device."""
        with full_fp32():
            return torch.einsum("qd,skd->sqk", x_QD.to(self.weight_SKD), self.weight_SKD) + self.bias_SK[:, None]

    def classes(self, x_QD: Tensor) -> Tensor:
        """The class of each head's largest logit, int64 [S, Q] on the CPU; -1 for a head that has diverged."""
        whole_S = self.weight_SKD.isfinite().all(dim=(1, 2)) & ~self.bias_SK.isnan().any(dim=1)
        classes_SQ = torch.cat([self.logits(x_qD).argmax(dim=2) for x_qD in x_QD.split(_QUERIES)], dim=1)
        return torch.where(whole_S[:, None], classes_SQ, -1).cpu()

    def cpu(self) -> Heads:
        return Heads(self.weight_SKD.cpu(), self.bias_SK.cpu())


def linear_heads(
    train_ND: Tensor,
    labels_N: Tensor,
    num_classes: int,
    settings: Sequence[tuple[float, float]],
    *,
    batch: int = BATCH,
    epochs: int = EPOCHS,
    device: torch.device | str = "cpu",
) -> Heads:
    """One head for each (rate, weight decay) of `settings`, each batch serving all: every head is what it would be if
    trained alone, and one that diverges leaves the others as they are. On `device`, in the features' dtype.

    Cross-entropy from zero, Nesterov momentum 0.9, rate x batch / 256 falling to 0 along a cosine; batches (at most all
    N) in a keyed order, the last partial one of an epoch left out. Weight decay is torch's, decay x weight added to the
    gradient, of all but the bias. Features are divided by their root mean square, so that a rate and a decay, which
    then draws at the weights of such features, mean the same for any network; the heads returned take them as they are.
    """
    count, width = train_ND.shape
    batch = min(batch, count)
    steps_per_epoch = count // batch
    total_steps = epochs * steps_per_epoch
    scale = root_mean_square(train_ND)
    rate_S, decay_S = torch.tensor(settings, dtype=train_ND.dtype, device=device).T
    peak_S11 = rate_S[:, None, None] * (batch / 256)
    # The bias is the weight of one more feature, which is 1.
    heads_SKE = torch.zeros(len(settings), num_classes, width + 1, dtype=train_ND.dtype, device=device)
    velocity_SKE = torch.zeros_like(heads_SKE)
    with full_fp32():
        for step in range(total_steps):
            epoch, at = divmod(step, steps_per_epoch)
            if at == 0:
                order_N = torch.from_numpy(np.argsort(mix(tag("linear probe"), epoch, np.arange(count)), kind="stable"))
            rows_B = order_N[at * batch : (at + 1) * batch]
            x_BE = F.pad(train_ND[rows_B].to(device) / scale, (0, 1), value=1.0)
            target_BK = F.one_hot(labels_N[rows_B].to(device), num_classes)
            p_SBK = torch.einsum("be,ske->sbk", x_BE, heads_SKE).softmax(dim=2)
            gradient_SKE = torch.einsum("sbk,be->ske", p_SBK - target_BK, x_BE) / batch
            gradient_SKE[:, :, :-1] += decay_S[:, None, None] * heads_SKE[:, :, :-1]
            velocity_SKE.mul_(MOMENTUM).add_(gradient_SKE)
            cosine = (1 + math.cos(math.pi * step / total_steps)) / 2
            heads_SKE -= cosine * peak_S11 * (gradient_SKE + MOMENTUM * velocity_SKE)
    return Heads(heads_SKE[:, :, :-1] / scale, heads_SKE[:, :, -1])


def logistic_regression(
    train_ND: Tensor, labels_N: Tensor, num_classes: int, cs: Sequence[float], *, max_iterations: int = MAX_ITERATIONS
) -> Heads:
    """One head for each C of `cs`, ascending: scikit-learn's minimum of C x the summed cross-entropy + |weight|^2 / 2,
    by L-BFGS in float64, each begun at the one before. The bias is free; a class without images gets -inf.

    Features are divided by their root mean square, so that a C means the same for any network; the heads returned take
    them as they are. Two classes at least must have images.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    scale = root_mean_square(train_ND)
    x_ND, labels = train_ND.double().numpy() / scale, labels_N.numpy()
    model = LogisticRegression(max_iter=max_iterations, warm_start=True)
    weight_SKD = torch.zeros(len(cs), num_classes, train_ND.shape[1], dtype=torch.float64)
    bias_SK = torch.full((len(cs), num_classes), -math.inf, dtype=torch.float64)
    for s, c in enumerate(cs):
        model.C = c
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # stopping early is one more way to regularise
            model.fit(x_ND, labels)
        weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
        if len(model.classes_) == 2:  # it keeps the difference alone
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        weight_SKD[s, model.classes_], bias_SK[s, model.classes_] = weight / scale, bias
    return Heads(weight_SKD, bias_SK)


def root_mean_square(x_ND: Tensor) -> float:
    """1 for features that are all 0."""
    return float(torch.linalg.vector_norm(x_ND, dtype=torch.float64)) / math.sqrt(x_ND.numel()) or 1.0
