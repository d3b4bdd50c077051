"""The loader's benchmark: every contender does the work it is said to do, and the report has the promised form."""

import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("loaders.renderers.ffcv", reason="the extra ffcv is not installed", exc_type=ImportError)

from benchmarks import loader as benchmark  # noqa: E402
from benchmarks.loader_peers import Served  # noqa: E402


def test_every_contender_goes_on_handing_out_images(folder, tmp_path):
    source, paths = benchmark.beton_of(folder, tmp_path / "train.beton"), sorted(folder.glob("*/*.JPEG"))
    assert len(source) == len(paths) == 40
    contenders = [
        benchmark.pil_dataloader(paths, 2),
        benchmark.fastssl(source, 1, "ffcv", benchmark.apart()),
        benchmark.fastssl(source, 1, "pil", benchmark.together()),
        benchmark.rendered(source, 1, cut=False),
        benchmark.rendered(source, 1, cut=True),
    ]
    for batches in contenders:
        assert [next(batches) for _ in range(3)] == [benchmark.BATCH] * 3
        batches.close()


def test_containers_hold_the_same_images(folder, tmp_path):
    """Would catch shards of other images, and files of FFCV's that are not half raw, or not all JPEG."""
    files, shards = benchmark.FolderSource(folder), benchmark.shards_of(folder, tmp_path / "shards")
    assert [shards.jpeg(i) for i in range(40)] == [files.jpeg(i) for i in range(40)]
    assert shards.labels.tolist() == files.labels.tolist()
    half, none = (benchmark.ffcvs_beton_of(folder, tmp_path / f"{share}.beton", share) for share in (0.5, 1.0))
    assert len(half) == len(none) == 40
    assert 10 <= half.is_raw.sum() <= 30 and not none.is_raw.any()
    batches = benchmark.fastssl(half, 1, "turbo", benchmark.together())
    assert [next(batches) for _ in range(2)] == [benchmark.BATCH] * 2
    batches.close()


def test_dali_contender_hands_out_images(folder):
    pytest.importorskip("nvidia.dali", reason="the extra dali is not installed")
    batches = benchmark.dali_own_ops(sorted(folder.glob("*/*.JPEG")), 1)
    assert [next(batches) for _ in range(3)] == [benchmark.BATCH] * 3


def test_pil_contender_makes_pawss_views(folder):
    """Eight normalised float views of the right sizes; grey, blurred and untouched ones among them."""
    images = benchmark.PilImages(sorted(folder.glob("*/*.JPEG")))
    items = [images[i] for i in range(12)]
    assert [tuple(view.shape) for view in items[0]] == [(3, 224, 224)] * 2 + [(3, 96, 96)] * 6
    views = torch.stack([view for item in items for view in item[2:]])
    std = torch.tensor(benchmark.IMAGENET.std)[:, None, None]
    values = views * std + torch.tensor(benchmark.IMAGENET.mean)[:, None, None]
    assert values.min() >= -1e-6 and values.max() <= 1 + 1e-6 and values.max() > 0.9
    grey = ((values.amax(1) - values.amin(1)).amax((1, 2)) < 1e-5).float().mean()
    assert 0.08 < grey < 0.4


def test_windows_count_images_and_the_report_has_its_form(monkeypatch):
    monkeypatch.setattr(benchmark.gc, "collect", lambda: 0)  # a third of a second a window, amid all that tests import

    def batches():
        while True:
            sum(range(10_000))  # some CPU time
            yield 7

    names = (
        "pil_dataloader", "eight_decodes", "dali_own_ops", "fastssl_ffcv", "fastssl_dali", "decode_only",
        "fastssl_turbo", "fastssl_raw", "build_41f6bfd_ffcv", "torchvision_v2",
    )  # fmt: skip
    others = {name for pair in benchmark.TARGETS for name in pair} - {*names}
    contenders = {name: benchmark.here(batches) for name in (*names, *others, "decode_and_crops")}
    rates = benchmark.measure(contenders, rounds=3, seconds=0.02)
    assert all(values.shape == (3, 2) and (values > 0).all() for values in rates.values())
    result = benchmark.summary(rates, {"fastssl_turbo": True}, {})
    assert tuple(result["unlabelled_images_per_s"]) == names
    assert result["left_out"] == ["spdl", "ffcv_loader_raw"]
    assert len(result["ratios"]) == len(benchmark.TARGETS)
    assert result["unlabelled_images_per_s"]["decode_only"] == np.median(rates["decode_only"][:, 0])
    benchmark.show(result)
    rates.pop("torchvision_v2")
    result = benchmark.summary(rates, {}, {})
    assert result["left_out"] == ["torchvision_v2", "spdl", "ffcv_loader_raw"]
    assert "fastssl_raw / torchvision_v2" not in result["ratios"]


def test_crops_of_every_image_are_compared(folder, tmp_path):
    """Would catch a comparison that leaves a renderer or an image out."""
    source = benchmark.beton_of(folder, tmp_path / "train.beton")
    raw = benchmark.raw_beton_of(folder, tmp_path / "raw")
    assert benchmark.same_crops(source, raw) == {"fastssl_turbo": True, "fastssl_raw": True}
    shutil.copytree(folder, tmp_path / "changed")
    shutil.copy(folder / "a/1.JPEG", tmp_path / "changed/a/0.JPEG")
    changed = benchmark.raw_beton_of(tmp_path / "changed", tmp_path / "raw_changed")
    assert benchmark.same_crops(source, changed) == {"fastssl_turbo": True, "fastssl_raw": False}


def test_another_build_gives_windows_from_a_process_of_its_own(folder, capfd):
    """And where it has no images, its last words come before ours."""
    root, views = Path(benchmark.__file__).parents[1], benchmark.laws(benchmark.VIEWS)
    with Served(Path(sys.executable), "build", folder, 1, views, cwd=root) as peer:
        assert peer.versions["torch"] == version("torch")
        assert min(peer(0.1)) > 0 and min(peer(0.1)) > 0
    assert peer.process.returncode == 0
    with pytest.raises(RuntimeError, match="build ended with exit status 1"):
        Served(Path(sys.executable), "build", folder / "none", 1, views, cwd=root)
    assert "StoreError" in capfd.readouterr().err
