"""Contenders of the loader's benchmark that need no more than torch beside their own library."""

import json

import pytest
import torch

from benchmarks import loader_peers as peers
from fastssl.methods.paws import GLOBAL_VIEW, SMALL_VIEW

VIEWS = json.loads(peers.laws((GLOBAL_VIEW, SMALL_VIEW)))


@pytest.fixture
def torchvision():
    return pytest.importorskip("torchvision", reason="the extra timm, with torchvision, is not installed")


def test_torchvision_contender_makes_pawss_views(folder, torchvision):
    """Eight normalised float views of the right sizes; grey and flat ones in their share."""
    images = peers.TorchvisionImages(peers.jpegs(folder), VIEWS)
    torch.manual_seed(0)
    items = [images[i] for i in range(12)]
    assert [tuple(view.shape) for view in items[0]] == [(3, 224, 224)] * 2 + [(3, 96, 96)] * 6
    views = torch.stack([view for item in items for view in item[2:]])
    mean, std = (torch.tensor(VIEWS[0]["pixels"][name])[:, None, None] for name in ("mean", "std"))
    values = views * std + mean
    assert values.min() >= -1e-6 and values.max() <= 1 + 1e-6 and values.max() > 0.9
    grey = ((values.amax(1) - values.amin(1)).amax((1, 2)) < 1e-5).float().mean()
    assert 0.08 < grey < 0.4


@pytest.mark.parametrize("name", ("torchvision_v2", "spdl"))
def test_contender_goes_on_handing_out_images(folder, torchvision, name):
    if name == "spdl":
        pytest.importorskip("spdl.io", reason="SPDL is not installed")
    start = peers.PEERS[name](str(folder), 2, VIEWS)
    for _ in range(2):  # windows
        batches = start()
        assert [next(batches) for _ in range(2)] == [peers.BATCH] * 2
        batches.close()
