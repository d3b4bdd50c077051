"""The sheet shows what the loader hands out, in its place."""

import numpy as np
from PIL import Image

from fastssl.report.pictures import colours
from loaders.loader import Loader
from tools import contact_sheet


def test_a_sheet_shows_every_crop_of_every_renderer(tmp_path, monkeypatch):
    out = tmp_path / "sheet.png"
    arguments = ["contact_sheet", "paws.digits", "--data", "digits", "--renderers", "memory,auto"]
    monkeypatch.setattr("sys.argv", [*arguments, "--images", "2", "--out", str(out)])
    contact_sheet.main()
    page = np.asarray(Image.open(out))
    bound = contact_sheet.bound_to("paws.digits", [], ["digits"], None, 2)
    with Loader(bound) as loader:
        part = next(loader.batches(0, 1)).parts[bound.plan.asked.epoch_of]
    num_crops = sum(len(x) for x in part.x.values()) // 2
    tile = contact_sheet.HEIGHT + contact_sheet.GAP
    assert page.shape[:2] == (2 * 3 * tile, contact_sheet.LABEL + num_crops * tile)
    view = bound.plan.asked.streams[0].views[0]
    x = next(iter(part.x.values()))[1].permute(1, 2, 0).numpy()  # first copy, second image
    crop = colours(x, view.pixels)
    shown = page[3 * tile :, contact_sheet.LABEL :][: contact_sheet.HEIGHT, : contact_sheet.HEIGHT]
    resized = Image.fromarray(np.ascontiguousarray(crop)).resize(shown.shape[:2], Image.Resampling.NEAREST)
    assert shown.std() > 0 and (shown == np.asarray(resized)).all()
    assert (page[2 * tile :, contact_sheet.LABEL :][: contact_sheet.HEIGHT, : contact_sheet.HEIGHT] == 0).all()
