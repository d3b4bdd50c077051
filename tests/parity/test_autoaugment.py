"""AutoAugment through whole loaders: the same bytes from every renderer, rank count and restart, and nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastssl.engine import stages
from fastssl.methods.base import Epochs, Steps
from fastssl.recipes.resolve import resolve
from loaders.convert.conversion import Options, convert, prepare
from loaders.errors import StoreError
from loaders.loader import Loader, bind
from loaders.plan.autoaugment import AutoAugment
from loaders.plan.ops import Flip
from loaders.plan.plan import Plan
from loaders.plan.views import UNIT, Balanced, Rrc, Shuffled, Stream, View
from loaders.renderers.autoaugment import augment
from loaders.store.data import DataSets, open_data
from loaders.store.folder import FolderSource
from loaders.store.source import ArraySource
from tests.end_to_end.command import metrics, run_here
from tests.support import fakes
from tests.support.interrupted import assert_same_run, run_in_pieces

SHUFFLED, BATCH = Shuffled(), 24
AUGMENTED = View("large", 64, Rrc((0.14, 1.0)), (), UNIT, copies=2, policy=AutoAugment())
VIEWS = (AUGMENTED, replace(AUGMENTED, name="small", size=48, policy=None))


@pytest.fixture(scope="module")
def photographs(test_data):
    return FolderSource(test_data / "imagenet-sample")


@pytest.fixture(scope="module")
def arrays():
    def of(channels):
        images = np.random.default_rng(2).integers(0, 256, (40, 12, 12, channels), np.uint8).repeat(3, 1).repeat(3, 2)
        return ArraySource("noise", images, np.arange(40) % 2, ("a", "b"))

    return of


def crops(source, renderer="auto", views=VIEWS, order=SHUFFLED, start=0, **settings):
    """The plan's rows and finished crops of step 1, by view."""
    bound = bind(Plan((Stream("s", "train", views, order, BATCH),), "s", 0), DataSets({"train": source}))
    with Loader(bound, renderer=renderer, **settings) as loader:
        for batch in loader.batches(start, 2):
            x = {name: x.clone() for name, x in batch.parts["s"].x.items()}
    return bound.plan.rows("s", 1), x


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def expected(plain, rows):
    """Finished crops [M, C, S, S] that no policy has seen, with what `rows` says done to each."""
    levels = (255 * plain).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    for crop, chosen in zip(levels, rows.policy, strict=True):
        augment(crop, chosen)
    return torch.from_numpy(levels).permute(0, 3, 1, 2).float() / 255


def check(source, renderer="auto"):
    """The view with the policy is the one without, augmented row by row; the other view is untouched."""
    rows, x = crops(source, renderer)
    _, plain = crops(source, renderer, tuple(replace(view, policy=None) for view in VIEWS))
    assert torch.equal(x["small"], plain["small"]) and rows.views[1].policy is None
    assert torch.allclose(x["large"], expected(plain["large"], rows.views[0]), atol=1e-6)
    touched = torch.from_numpy((rows.views[0].policy[:, 1:] != 0).any(axis=1))
    unlike = (x["large"] != plain["large"]).flatten(1).any(dim=1)
    assert not unlike[~touched].any() and unlike[touched].float().mean() > 0.8 and 0 < touched.float().mean() < 1
    return x


@pytest.mark.parametrize("renderer", ["turbo", "pil", "ffcv"])
def test_photographs_are_augmented_after_they_are_cropped(photographs, renderer):
    """Catches rows of another copy, a policy before the resampling, and a view without one that gets one."""
    if renderer == "ffcv":
        pytest.importorskip("loaders.renderers.ffcv", exc_type=ImportError)
    check(photographs, renderer)


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_are_augmented(arrays, channels):
    check(arrays(channels))


def test_all_ways_give_the_same_bytes(photographs, tmp_path):
    """Turbo, Pillow, images stored decoded, images kept decoded; from the start and from step 1; one rank and two."""
    _, x = crops(photographs, "pil")
    assert equal(x, crops(photographs, "turbo")[1])
    assert equal(x, crops(photographs, "turbo", start=1, threads=1)[1])
    halves = [crops(photographs, "turbo", rank=rank, world=2)[1] for rank in (0, 1)]
    for name in x:
        both = torch.cat([half[name].unflatten(0, (2, BATCH // 2)) for half in halves], dim=1).flatten(0, 1)
        assert torch.equal(both, x[name])

    for i in range(0, len(photographs), 10):
        folder = tmp_path / "tree" / "train" / "ab"[i // 10 % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.JPEG").write_bytes(photographs.jpeg(i))
    for raw in (False, True):
        convert(prepare(tmp_path / "tree", Options(raw=raw)), tmp_path / f"{raw}")
    jpegs, raws = (open_data((str(tmp_path / kind), "validation=none")).get("train") for kind in ("False", "True"))
    assert raws.is_raw.all() and not jpegs.is_raw.any() and equal(crops(jpegs)[1], crops(raws)[1])
    kept = crops(jpegs, order=Balanced(2, BATCH // 2), cache_bytes=1 << 28)[1]
    assert equal(kept, crops(jpegs, order=Balanced(2, BATCH // 2))[1])


def test_a_flip_comes_after_the_policy_and_draws_as_before(arrays):
    """Catches a policy whose draws move those of the view's other ops."""
    rows, x = crops(arrays(3))
    flipped_rows, flipped = crops(arrays(3), views=(replace(AUGMENTED, ops=(Flip(),)), VIEWS[1]))
    assert np.array_equal(rows.views[0].policy, flipped_rows.views[0].policy)
    turned = torch.from_numpy(flipped_rows.views[0].tables[0][:, 0] > 0)
    there = torch.where(turned[:, None, None, None], x["large"].flip(3), x["large"])
    assert torch.equal(flipped["large"], there) and 0 < turned.float().mean() < 1


def test_dali_and_odd_channels_are_refused(photographs, arrays):
    match = "^--loader dali: a view has AutoAugment, which DALI's pipeline lacks; choose auto, turbo, ffcv or pil$"
    with pytest.raises(StoreError, match=match):
        crops(photographs, "dali")
    with pytest.raises(StoreError, match="^AutoAugment wants images of 1 or 3 channels, noise has 2$"):
        crops(arrays(2))


def test_digits_train_with_it_and_continue_bitwise(tmp_path):
    """Two steps from the command line; four steps, and the same after a stop at every second."""
    two = ("train", "supervised.digits", "--set", "epochs=2", "--set", "log_every=1steps")
    run_here(tmp_path, *two, "--out", "plain")
    run_here(tmp_path, *two, "--set", "view.policy=autoaugment()", "--out", "augmented")
    losses = [[each["loss"] for each in metrics(tmp_path / run) if "loss" in each] for run in ("plain", "augmented")]
    assert len(losses[1]) == 2 and np.isfinite(losses[1]).all() and losses[0] != losses[1]

    (stage,) = resolve("supervised.digits")
    view = replace(stage.config.view, policy=AutoAugment())
    stage = replace(stage.with_settings(view=view), length=Epochs(4), log_every=Steps(1), checkpoint_every=Steps(1))
    stages.run(fakes.job((stage,), tmp_path / "whole"))
    assert run_in_pieces(fakes.job((stage,), tmp_path / "pieces"), every=2) >= 1
    assert_same_run(tmp_path / "whole", tmp_path / "pieces")
