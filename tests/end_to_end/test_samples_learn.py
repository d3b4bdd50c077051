"""`paws.cifar10_small` learns from real images as they come: nearest neighbours in a network that it has trained beside
those in one that it has not. About three minutes; needs FASTSSL_TEST_DATA."""

import os
import shutil
from pathlib import Path

import pytest

from tests.end_to_end import command

pytestmark = pytest.mark.skipif("FASTSSL_TEST_DATA" not in os.environ, reason="FASTSSL_TEST_DATA is not set")

# Labels are targets too, since minutes are too short for neighbours to become right by themselves (Tiny-ImageNet:
# 15.1 % without); a step shows all classes.
LABELS = ("label_targets=true", "images_per_class=8", "batch_global=64")
ROWS = {
    "caltech101-sample": ("rate.start=0.1", "rate.peak=0.4", "rate.final=0.004", "length=100steps", *LABELS),
    "tiny-imagenet-sample": (
        "rate.start=0.4", "rate.peak=1.6", "rate.final=0.016", "rate.warmup=100steps", "length=600steps",
        "classes_global=20", *LABELS,
    ),
}  # fmt: skip


def laid_out(sample, folder):
    """The sample as it is; Caltech-101's, which has no split, with two of five images of each class held out."""
    data = Path(os.environ["FASTSSL_TEST_DATA"]) / sample
    if (data / "val").exists():
        return data
    for k, path in enumerate(sorted(data.glob("*/*.jpg"))):
        place = folder / ("val" if k % 5 < 2 else "train") / path.parent.name
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    return folder


def neighbours(folder, run, data, changes):
    """kNN top-1 of a run, in percent."""
    common = ("precision=fp32", "evaluate=knn", "log_every=100steps")
    settings = [part for change in (*common, *changes) for part in ("--set", change)]
    code, log = command.run(
        folder, "train", "paws.cifar10_small", "--data", str(data), "--labels", "all", "--out", run, *settings
    )
    assert code == 0, log
    return 100 * command.metrics(folder / run)[-1]["evaluation"]["knn_top1"]


@pytest.mark.parametrize("sample", ROWS)
def test_it_learns_from(sample, tmp_path):
    data = laid_out(sample, tmp_path / "data")
    nothing = ("rate.start=1e-9", "rate.peak=1e-9", "rate.final=1e-9", "length=1steps")
    untrained = neighbours(tmp_path, "untrained", data, (*ROWS[sample], *nothing))
    trained = neighbours(tmp_path, "trained", data, ROWS[sample])
    assert trained >= untrained + 8, f"from {untrained:.1f} to {trained:.1f} %"
