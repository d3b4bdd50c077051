"""One plan through every renderer: `pil` is the reference, `turbo` and `ffcv` give its bytes, `dali` comes close.

These two are promised to 1/255 and held to the byte: a difference of one would hide another DCT or a wrong weight."""

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from loaders.errors import RenderError
from loaders.plan.plan import Plan, StreamFacts, ViewRows
from loaders.plan.views import Centre, Filter, Rrc, Sequential, Stream, View, Whole
from loaders.renderers.pil import PilRenderer
from loaders.renderers.turbo import TurboRenderer
from loaders.store.beton import BetonSource, BetonWriter
from loaders.store.folder import FolderSource

VIEWS = (
    View("global", 224, Rrc((0.14, 1.0)), copies=2),
    View("small", 96, Rrc((0.05, 0.14)), copies=6),
    View("bicubic", 64, Rrc((0.2, 1.0)), filter=Filter.BICUBIC),
    View("aliased", 64, Rrc((0.2, 1.0)), filter=Filter.BICUBIC_ALIASED),
    View("enlarged", 160, Rrc((0.01, 0.02))),
    View("centre", 224, Centre(256)),
    View("whole", 128, Whole()),
)
FAST = pytest.mark.parametrize("kind", ["turbo", "ffcv", "dali"])
ALL = pytest.mark.parametrize("kind", ["pil", "turbo", "ffcv", "dali"])


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(2) as pool:
        yield pool


def make(kind, source, pool):
    """The renderer, or a skip that names what is not installed."""
    if kind == "pil":
        return PilRenderer(source, pool)
    if kind == "turbo":
        return TurboRenderer(source, pool)
    module = pytest.importorskip(f"loaders.renderers.{kind}", exc_type=ImportError)
    return module.FfcvRenderer(source, pool) if kind == "ffcv" else module.DaliRenderer(source, pool, threads=2)


def rows_of(source, views=VIEWS, batch=None, step=0):
    batch = batch or len(source)
    labels = np.zeros(len(source), np.int64)
    plan = Plan((Stream("s", "train", views, Sequential(), batch),), "s", seed=5)
    return plan.bind({"s": StreamFacts(None, labels, np.array(source.sizes), 1)}).rows("s", step)


def rows_at(source, i, *views):
    """Rows of image `i` alone, with boxes chosen by the test."""
    return replace(rows_of(source, VIEWS[:1], batch=1, step=i), views=views)


def render(renderer, rows):
    out = {v.view.name: np.full((len(v.boxes), v.view.size, v.view.size, 3), 99, np.uint8) for v in rows.views}
    renderer.render(rows, out)
    return out


def difference(a, b):
    """Mean absolute difference of each row, and the greatest of all."""
    d = np.abs(a.astype(np.int16) - b)
    return d.reshape(len(d), -1).mean(axis=1), int(d.max())


@pytest.fixture(scope="module")
def sample(test_data):
    return FolderSource(test_data / "imagenet-sample")


@pytest.fixture(scope="module")
def reference(sample, pool):
    """The sample's rows, and `pil`'s crops of them."""
    rows = rows_of(sample)
    return rows, render(PilRenderer(sample, pool), rows)


@pytest.mark.parametrize("kind", ["turbo", "ffcv"])
def test_crops_of_photographs_are_pillows(kind, sample, reference, pool):
    rows, expected = reference
    out = render(make(kind, sample, pool), rows)
    assert len(rows.ids) == 250
    for name in expected:
        assert difference(out[name], expected[name])[1] == 0, name


def test_dali_crops_of_photographs_are_close(sample, reference, pool):
    rows, expected = reference
    out = render(make("dali", sample, pool), rows)
    for name in expected:
        mean, _ = difference(out[name], expected[name])
        assert mean.max() <= 2, name
        assert mean.mean() <= 0.5, name  # measured 0.17; INTER_AREA, or no antialias, would be well above


@FAST
def test_decoded_photographs_are_pillows_to_the_bit(kind, sample, pool):
    """Unscaled squares from two opposite corners show (nearly) every pixel. The fast DCT, plain chroma upsampling, or
    EXIF rotation would show; a resampler could hide them."""
    seen = 0
    for i in range(0, len(sample), 10 if kind == "dali" else 1):
        height, width = sample.sizes[i].tolist()
        side = min(height, width)
        view = View("square", side, Rrc((0.1, 1.0)), copies=2)
        boxes = np.array([[0, 0, side, side], [width - side, height - side, width, height]], float)
        rows = rows_at(sample, i, ViewRows(view, boxes, ()))
        out = render(make(kind, sample, pool), rows)["square"]
        whole = np.asarray(Image.open(io.BytesIO(sample.jpeg(i))).convert("RGB"))
        assert (out[0] == whole[:side, :side]).all() and (out[1] == whole[-side:, -side:]).all(), sample.name_of(i)
        seen += 1
    assert seen >= 25


@ALL
def test_ramp_keeps_its_place_and_direction(kind, tmp_path, pool):
    """Red is x, green is y: every crop reads off its own coordinates. Catches shifts by a pixel or a box's origin,
    flips, exchanged axes and exchanged channels."""
    x, y = np.meshgrid(np.arange(240), np.arange(200))
    image = np.stack([x, y, np.full_like(x, 77)], axis=2).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "ramp.jpg", quality=100, subsampling=0)
    source = FolderSource(tmp_path)
    rows = rows_of(source)
    out = render(make(kind, source, pool), rows)
    for v in rows.views:
        steps = (np.arange(v.view.size) + 0.5) / v.view.size
        for crop, (x0, y0, x1, y1) in zip(out[v.view.name].astype(float), v.boxes, strict=True):
            inner = slice(2, -2)  # the border's taps end at the crop's edge
            at_x, at_y = (x0 + steps * (x1 - x0) - 0.5)[inner], (y0 + steps * (y1 - y0) - 0.5)[inner]
            assert np.abs(crop[inner, inner, 0] - at_x).max() <= 4, v.view.name
            assert np.abs(crop[inner, inner, 1] - at_y[:, None]).max() <= 4, v.view.name
            assert abs((crop[inner, inner, 0] - at_x).mean()) <= 0.6, v.view.name  # half a pixel would be a box's shift
            assert np.abs(crop[..., 2] - 77).max() <= 6, v.view.name


def test_nothing_beyond_the_box_shows(tmp_path, pool):
    """A dark square in a bright image, cut first: one stray row or column would brighten its border."""
    image = np.full((120, 120, 3), 255, np.uint8)
    image[32:80, 40:88] = 0
    Image.fromarray(image).save(tmp_path / "square.jpg", quality=100, subsampling=0)
    source = FolderSource(tmp_path)
    view = View("square", 16, Rrc((0.1, 1.0)))
    boxes = np.array([[40.0, 32.0, 88.0, 80.0]])
    rows = rows_at(source, 0, ViewRows(view, boxes, ()))
    for kind in ("pil", "turbo", "ffcv", "dali"):
        assert render(make(kind, source, pool), rows)["square"].max() <= 8, kind


def photograph(seed, height=90, width=120):
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, form="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@FAST
def test_odd_files_look_as_with_pillow(kind, tmp_path, pool):
    """Grey, CMYK, PNG (with alpha), EXIF-rotated, progressive, 4:4:4 and 4:2:2 files, in one batch with plain ones."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    files = {
        "0.jpg": encoded(photograph(0)),
        "1.jpg": encoded(photograph(1).convert("L")),
        "2.jpg": encoded(photograph(2).convert("CMYK")),
        "3.png": encoded(photograph(3).convert("RGBA"), "PNG"),
        "4.jpg": encoded(photograph(4), exif=exif),
        "5.jpg": encoded(photograph(5), progressive=True),
        "6.jpg": encoded(photograph(6), subsampling=0),
        "7.jpg": encoded(photograph(7, 91, 121), subsampling=1),
        "8.jpg": encoded(photograph(8, 33, 17)),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    source = FolderSource(tmp_path)
    rows = rows_of(source, (View("crop", 32, Rrc((0.3, 1.0)), copies=2), View("whole", 40, Whole())))
    expected, out = render(PilRenderer(source, pool), rows), render(make(kind, source, pool), rows)
    for name in expected:
        mean, worst = difference(out[name], expected[name])
        assert (mean.max() <= 2) if kind == "dali" else (worst == 0), name


DAMAGE = {
    "cut in half": lambda data: data[: len(data) // 2],
    "not an image": lambda data: b"GIF89a" + data[6:],
    "empty": lambda data: b"",
    "of another size": lambda data: encoded(photograph(1, 60, 60)),
    "bomb": lambda data: _with_size(data, 65500, 65500),
    "zeros": lambda data: bytes(len(data)),
}


def _with_size(data, height, width):
    """The same JPEG, whose header claims another size."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[at + 4 :]


@ALL
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_an_error_that_names_id_and_file(kind, damage, tmp_path, pool):
    """An image damaged after conversion: FFCV's own decoder would hand out garbage, DALI's pipeline would be unusable.
    The renderer goes on after it."""
    for i in range(8):
        (tmp_path / f"img_{i}.jpg").write_bytes(encoded(photograph(i)))
    source = FolderSource(tmp_path)
    renderer, rows = make(kind, source, pool), rows_of(source, VIEWS[:2])
    before = render(renderer, rows)
    damaged = tmp_path / "img_5.jpg"
    whole = damaged.read_bytes()
    damaged.write_bytes(DAMAGE[damage](whole))
    with pytest.raises(RenderError, match=r"image 5 \(img_5\.jpg\)"):
        render(renderer, rows)
    damaged.write_bytes(whole)
    after = render(renderer, rows)
    assert all((before[name] == after[name]).all() for name in before)


@ALL
def test_shrunk_file_is_an_error_not_a_crash(kind, tmp_path, pool):
    """A file that loses its end while it is open: a mapped one would be a SIGBUS."""
    path = tmp_path / "set.beton"
    with BetonWriter(path, 6, page_size=1 << 21) as writer:
        for i in range(6):
            writer.add(encoded(photograph(i)), 0, f"n01_{i}.JPEG")
    source = BetonSource(path)
    renderer, rows = make(kind, source, pool), rows_of(source, VIEWS[:2])
    render(renderer, rows)
    with open(path, "r+b") as file:
        file.truncate((1 << 21) + 100)
    with pytest.raises(RenderError, match=r"image 0 .*became shorter"):
        render(renderer, rows)


@ALL
def test_last_batch_may_be_short_and_the_first_may_be_the_short_one(kind, tmp_path, pool):
    for i in range(7):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(photograph(i)))
    source = FolderSource(tmp_path)
    renderer = make(kind, source, pool)
    whole = render(renderer, rows_of(source, VIEWS[:2]))
    short = render(make(kind, source, pool), rows_of(source, VIEWS[:2], batch=4, step=1))
    copies = {v.name: v.copies for v in VIEWS}
    for name, crops in short.items():
        assert (crops.reshape(copies[name], 3, -1) == whole[name].reshape(copies[name], 7, -1)[:, 4:]).all()
    again = make(kind, source, pool)
    render(again, rows_of(source, VIEWS[:2], batch=4, step=1))
    grown = render(again, rows_of(source, VIEWS[:2], batch=4, step=0))
    for name, crops in grown.items():
        assert (crops.reshape(copies[name], 4, -1) == whole[name].reshape(copies[name], 7, -1)[:, :4]).all()
