"""The ImageNet recipe on real ImageNet images: converted, then trained at reduced size through each renderer and from
decoded images, killed and continued, alone and on several ranks."""

import importlib.util
import json
import shutil

import pytest

from tests.end_to_end import command
from tests.support.interrupted import assert_same_run

MODULES = {"pil": "PIL", "turbo": "simplejpeg", "ffcv": "ffcv", "dali": "nvidia.dali"}
CHANGES = [
    part
    for change in (
        "encoder.depth=10", "encoder.base_width=8", "out_features=16", "global_view.size=48", "small_view.size=24",
        "small_view.copies=2", "batch_global=16", "classes_global=8", "images_per_class=1", "precision=fp32",
        "length=6steps", "log_every=1steps", "checkpoint_every=2steps",
    )
    for part in ("--set", change)
]  # fmt: skip


@pytest.fixture(scope="module")
def stores(test_data, tmp_path_factory):
    """40 of the real images, one a class, converted by the command: as they are; and made smaller, as JPEGs and
    decoded."""
    folder = tmp_path_factory.mktemp("imagenet")
    classes = sorted((test_data / "imagenet-sample").iterdir())[:40]
    for wnid in classes:
        shutil.copytree(wnid, folder / "images" / "train" / wnid.name)
    smaller = ("--max-side", "320")
    for name, more in (("whole", ()), ("small", smaller), ("decoded", (*smaller, "--pixels", "raw"))):
        command.run_here(folder, "convert-imagenet", "images", name, *more)
    return folder


def train(folder, data, loader, *more):
    return ("train", "paws.rn50_100ep", "--data", str(data), "--loader", loader, "--labels", "all", *CHANGES, *more)


@pytest.mark.parametrize(
    ("store", "loader"), [*(("whole", loader) for loader in ("pil", "turbo", "ffcv", "dali")), ("decoded", "turbo")]
)
def test_a_killed_run_continues_to_the_same_pixels(store, loader, stores, tmp_path):
    converted = stores / store
    if importlib.util.find_spec(MODULES[loader].split(".")[0]) is None:
        pytest.skip(f"{MODULES[loader]} is not installed: the extra {loader}")
    command.run_here(tmp_path, *train(tmp_path, converted, loader, "--out", "whole"))
    with command.running(tmp_path, *train(tmp_path, converted, loader, "--out", "killed")) as process:
        command.wait_until(lambda: command.steps_logged(tmp_path / "killed") >= 3 or process.poll() is not None)
        command.kill(process.pid)
        process.wait()
    code, output = command.run(tmp_path, *train(tmp_path, converted, loader, "--out", "killed"))
    assert code == 0, output
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    (said,) = json.loads((tmp_path / "killed" / "resolved.json").read_text())["run"]["data_said"]
    assert ("pixels changed (no side longer than 320, JPEG of quality 90)" in said) == (store == "decoded")


def test_ranks_see_the_global_batches_of_one(stores, tmp_path):
    """Their losses agree to rounding, which other images or crops would not, and on as many ranks to the bit from
    another store."""
    losses = {}
    for row in (("small", "pil", 1), ("small", "pil", 2), ("decoded", "turbo", 2)):
        store, loader, ranks = row
        out = ("--out", f"{store}{ranks}", "--cpu-ranks", str(ranks), "--set", "length=2steps")
        command.run_here(tmp_path, *train(tmp_path, stores / store, loader, *out))
        losses[store, ranks] = [record["cross_entropy"] for record in command.metrics(tmp_path / f"{store}{ranks}")]
    assert losses["small", 2] == losses["decoded", 2]
    for some in losses.values():
        assert some == pytest.approx(losses["small", 1], rel=1e-4)
