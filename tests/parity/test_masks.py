"""Masked crops from every renderer: cut and flipped with their image, the same bytes, and the rest untouched."""

from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from loaders.errors import StoreError
from loaders.loader import Loader, bind
from loaders.plan.ops import Flip
from loaders.plan.plan import Plan
from loaders.plan.views import UNIT, Balanced, Centre, Filter, Rrc, SaliencyMask, Sequential, Shuffled, Stream, View
from loaders.renderers.cache import CachedRenderer
from loaders.store.beton import BetonWriter
from loaders.store.data import DataSets, open_data
from loaders.store.folder import FolderSource
from loaders.store.masks import MaskFile
from loaders.store.source import ArraySource
from tools import saliency

HEIGHT, WIDTH = 200, 240
SHUFFLED = Shuffled()
ALWAYS = SaliencyMask(p=1.0)
VIEWS = (
    View("large", 96, Rrc((0.3, 1.0)), (Flip(),), UNIT, Filter.BICUBIC, copies=4, mask=ALWAYS),
    View("aliased", 64, Rrc((0.3, 1.0)), (Flip(),), UNIT, Filter.BICUBIC_ALIASED, copies=2, mask=ALWAYS),
    View("centre", 96, Centre(128), (Flip(),), UNIT, copies=2, mask=ALWAYS),
    View("plain", 48, Rrc((0.1, 0.5)), (Flip(),), UNIT, copies=2),
)


class Given:
    """Masks in memory."""

    name, about = "given", "a test"

    def __init__(self, masks):
        self.masks = masks
        self.foreground = np.array([mask.mean() for mask in masks])

    def mask(self, i):
        return self.masks[i]

    def fingerprint(self):
        return "given"


def ramp():
    """Red is x, green is y, blue is 255; and a mask that no flip and no turn leaves as it is."""
    x, y = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    image = np.stack([x, y, np.full_like(x, 255)], axis=2).astype(np.uint8)
    return image, foreground(x, y) > 0


def foreground(x, y):
    """How far (pixels) a place is inside the mask: positive inside a rectangle left of the middle and high up."""
    return np.minimum.reduce([x - 20.5, 150.5 - x, y - 10.5, 120.5 - y])


@pytest.mark.parametrize("kind", ["memory", "pil", "turbo", "ffcv", "cache"])
def test_mask_and_image_are_cropped_and_flipped_together(kind, tmp_path):
    """Every finished pixel says by its colour where in the image it is from: it shows if and only if that place is
    foreground. Catches a mask that is cut, scaled, flipped or turned otherwise than the image, one laid on after the
    flip, a grey that is another copy's or varies in a crop, and a view without a mask that gets one."""
    image, mask = ramp()
    num = 4
    if kind == "memory":
        source = ArraySource("ramps", np.stack([image] * num), np.zeros(num, np.int64), ("ramp",))
    else:
        for i in range(num):
            Image.fromarray(image).save(tmp_path / f"{i}.jpg", quality=100, subsampling=0)
        source = FolderSource(tmp_path)
    plan = Plan((Stream("s", "train", VIEWS, Sequential(), num),), "s", seed=1)
    bound = bind(plan, DataSets({"train": source}, masks={"train": Given([mask] * num)}))
    if kind == "ffcv":
        pytest.importorskip("loaders.renderers.ffcv", exc_type=ImportError)
    with Loader(bound, renderer="pil" if kind == "cache" else kind) as loader:
        if kind == "cache":  # the loader has it for class-balanced streams alone
            loader._renderers["s"] = CachedRenderer(source, loader._pool, 1 << 30, masks=bound.masks["s"])
        (batch,) = loader.batches(0, 1)
        x = {name: 255 * value.permute(0, 2, 3, 1).numpy() for name, value in batch.parts["s"].x.items()}
    for v in bound.plan.rows("s", 0).views:
        steps = (np.arange(v.view.size) + 0.5) / v.view.size
        seen = np.zeros(2)
        for row, (x0, y0, x1, y1) in enumerate(v.boxes):
            pixels = x[v.view.name][row]
            at_x, at_y = np.meshgrid(x0 + steps * (x1 - x0) - 0.5, y0 + steps * (y1 - y0) - 0.5)
            if v.tables[0][row, 0]:
                at_x = at_x[:, ::-1]
            near = 2.5 * max((x1 - x0) / v.view.size, 1.0) + 1  # pixels of the image that the filter reaches
            inside = foreground(at_x, at_y)
            if v.view.mask is None:
                shown, hidden = np.ones(at_x.shape, bool), np.zeros(at_x.shape, bool)
            else:
                shown, hidden = inside > near, inside < -near
            assert np.abs(pixels[hidden] - (v.greys[row] if v.greys is not None else 0)).max(initial=0) < 0.01
            shown[:2] = shown[-2:] = shown[:, :2] = shown[:, -2:] = False  # the border's taps end at the crop's edge
            assert np.abs(pixels[shown] - np.stack([at_x, at_y, np.full_like(at_x, 255)], 2)[shown]).max(initial=0) <= 6
            seen += shown.mean(), hidden.mean()
        assert seen[0] > 0 and (v.view.mask is None or min(seen) / len(v.boxes) > 0.1), v.view.name


def test_masked_photographs_are_the_same_from_every_renderer(test_data, tmp_path, monkeypatch, capsys):
    """Real JPEGs through the tool into the loader. Catches masks of other images, a renderer that composes after it
    resamples (a few levels at every edge), and a view or copy that is not masked but changed all the same."""
    photographs = FolderSource(test_data / "imagenet-sample")
    beton = tmp_path / "train.beton"
    ids = range(0, len(photographs), 10)
    with BetonWriter(beton, len(ids), ("a", "b"), page_size=1 << 21) as writer:
        for i in ids:
            writer.add(photographs.jpeg(i), i // 10 % 2, photographs.name_of(i))
    monkeypatch.setattr("sys.argv", ["saliency", str(beton)])
    saliency.main()
    printed = capsys.readouterr().out
    masks = MaskFile(tmp_path / "train.masks")
    share = (masks.foreground >= 0.2).mean()
    assert f"{100 * share:.1f} % of the images have 20 % or more" in printed and share > 0.3

    view = View("large", 112, Rrc((0.14, 1.0)), (), UNIT, Filter.BICUBIC, copies=2, mask=SaliencyMask(p=0.5))
    views = (view, replace(view, name="small", size=48, mask=None))
    data = open_data((str(beton), f"masks={masks.path}", "validation=none"))

    def crops(renderer, views=views, order=SHUFFLED, start=0, **settings):
        """The crops of step 1, by view."""
        bound = bind(Plan((Stream("s", "train", views, order, 24),), "s", 0), data)
        with Loader(bound, renderer=renderer, **settings) as loader:
            for batch in loader.batches(start, 2):
                x = {name: x.clone() for name, x in batch.parts["s"].x.items()}
        return bound.plan, x

    plan, pil = crops("pil")
    _, plain = crops("pil", tuple(replace(v, mask=None) for v in views))
    masked = torch.from_numpy(plan.rows("s", 1).views[0].greys >= 0)
    assert 0.1 < masked.float().mean() < 0.5
    differs = (pil["large"] != plain["large"]).flatten(1).any(dim=1)
    assert not differs[~masked].any() and differs[masked].float().mean() > 0.9  # a crop may be all foreground
    assert torch.equal(pil["small"], plain["small"])

    continued = crops("pil", start=1)[1]
    halves = [crops("pil", rank=rank, world=2)[1] for rank in (0, 1)]
    for name, x in pil.items():
        assert torch.equal(continued[name], x)
        assert torch.equal(torch.cat([half[name].unflatten(0, (2, 12)) for half in halves], dim=1).flatten(0, 1), x)

    others = {"cached": crops("pil", order=Balanced(2, 12), cache_bytes=1 << 28)[1]}
    others["turbo"] = crops("turbo")[1]
    expected = {"cached": crops("pil", order=Balanced(2, 12))[1], "ffcv": pil, "turbo": pil}
    if find_spec("ffcv"):
        others["ffcv"] = crops("ffcv")[1]
    for kind, found in others.items():
        assert all(torch.equal(found[name], x) for name, x in expected[kind].items()), kind


def test_dali_refuses_masks(tmp_path):
    Image.fromarray(ramp()[0]).save(tmp_path / "0.jpg")
    source = FolderSource(tmp_path)
    plan = Plan((Stream("s", "train", VIEWS, Sequential(), 1),), "s", 0)
    bound = bind(plan, DataSets({"train": source}, masks={"train": Given([ramp()[1]])}))
    with pytest.raises(StoreError, match="--loader dali: a view has a mask.*choose auto, turbo, ffcv or pil"):
        Loader(bound, renderer="dali")
